"""The commands `alp train`, `compare`, `eval`, `report` and `doctor`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from .config import TrainConfig
from .errors import UserError, nearest
from .measures.settings import EvalConfig
from .quiet import leave_out_import_chatter
from .runs.signals import Stopped
from .study.presets import PRESETS, Preset, arms_of, contrasts_of

_Config = Annotated[TrainConfig, tyro.conf.arg(name="")]
_DEFAULT = TrainConfig()
_EvalConfig = Annotated[EvalConfig, tyro.conf.arg(name="")]
_EVAL_DEFAULT = EvalConfig()


def train(config: _Config = _DEFAULT, *, resume: Path | None = None) -> None:
    """Train a model by reinforcement learning on verifiable problems.

    Args:
        resume: Continue this run folder, with its own configuration.
    """
    if resume is not None and config != _DEFAULT:
        raise UserError("--resume continues with the run's own config.json; drop the other options")
    from .train import train as run_training

    run_training(config, resume)


def _compare_from(preset: Preset) -> Callable[..., None]:
    """Build the command `alp compare`; its options override the preset's configuration."""

    def compare(
        config: _Config = preset.base,
        *,
        preset: str | None = None,
        methods: tuple[str, ...] = (),
        vary: tuple[str, ...] = (),
        contrasts: tuple[str, ...] = (),
        seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
        jobs: int | None = None,
        threads: int = 1,
        out: Path | None = None,
    ) -> None:
        """Compare methods over several seeds on equal terms. To continue after a stop, run the same command again.

        Args:
            preset: One of lag, stress, mismatch, clip, ablation, settle, search, tools, sampled; the other options override it.
            methods: Arms: method names in alp/methods.py. Default: the preset's arms.
            vary: Run every arm at each of these values: --vary update.sigma=1e-3,1e-2 rollout.lag=0,8.
            contrasts: Pairs to test, as ARM:BASELINE. Default: the preset's, or ALP against Bypass and all against GRPO.
            seeds: Each seed runs every arm once, from the same warmed-up model.
            jobs: Cells (one arm with one seed) that run at once. Default: one per GPU, or CPU cores / `threads`.
            threads: CPU threads per cell. Results depend on it, so a comparison keeps the number it began with.
            out: The comparison's folder. Default: runs/PRESET, or runs/compare.
        """
        from .study.compare import Comparison, cross
        from .study.compare import compare as run_comparison

        chosen = _preset_called(preset)
        arms, pairs = (arms_of(methods), contrasts_of(methods)) if methods else (chosen.arms, chosen.contrasts)
        if contrasts:
            if any(text.count(":") != 1 for text in contrasts):
                raise UserError(f"contrasts={contrasts}; it needs pairs like alp-sequence:bypass-sequence")
            pairs = tuple((text.split(":")[0], text.split(":")[1]) for text in contrasts)
        arms, pairs = cross(arms, pairs, vary)
        if len(set(methods)) < len(methods):
            raise UserError(f"methods={methods}; each may appear once")
        if config.update.method != chosen.base.update.method or config.seed != chosen.base.seed:
            raise UserError("update.method and seed belong to a single run; a comparison takes --methods and --seeds")
        for name, value, fits in (("jobs", jobs, "1 or more"), ("threads", threads, "1 or more")):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}; it needs {fits}")
        folder = out or Path("runs") / (preset or "compare")
        faults = run_comparison(Comparison(folder, chosen.about, config, arms, seeds, pairs, threads), jobs)
        if faults:
            logs = f"see {folder / 'logs'}; run the same command again to retry them"
            raise UserError(f"{len(faults)} cells failed: {', '.join(faults)}; {logs}")
        print(f"compared {len(arms)} arms on {len(seeds)} seeds: alp report {folder}")

    return compare


def _preset_called(name: str | None) -> Preset:
    if name is None:
        return Preset("methods on the default task", TrainConfig(measure_clean=True), {}, ())
    if name not in PRESETS:
        raise UserError(f"preset={name!r} is not one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return PRESETS[name]


def _preset_in(arguments: list[str]) -> Preset:
    """Read --preset before the other options are parsed: they override its configuration."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    return _preset_called(parser.parse_known_args(arguments)[0].preset)


def evaluate(
    model: tyro.conf.Positional[str], settings: _EvalConfig = _EVAL_DEFAULT, config: _Config = _DEFAULT
) -> None:
    """Measure the accuracy of a run's model or of any Hugging Face model, on the run's task or on benchmarks.

    Without --on: the task's evaluation problems, sampled on both numerical paths and decoded greedily.

    Args:
        model: A run folder (its own task and paths are used), a model directory, or a name on the hub.
    """
    if settings.on:
        from .measures.benchmark import evaluate_on

        evaluate_on(model, config, settings)
        return
    if settings != _EVAL_DEFAULT:
        raise UserError("samples, temperature, top_p, max_new_tokens and json belong to --on TASK ...")
    from .measures.benchmark import evaluate_named

    for name, value in evaluate_named(model, config).items():
        print(f"{name:>10}  {value:.4f}")


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Write one self-contained HTML page about one or several runs, or about a grid (with tables in files beside it).

    Args:
        runs: Run folders, or one grid folder, or one exported grid.
        out: The page to write. Default: report.html, for a grid in its folder. Files of other kinds are not replaced.
    """
    from .study.report import write_report

    print(f"wrote {write_report(list(runs), out)}")


def doctor() -> None:
    """Print what this machine offers: engines (with the reason if one is unavailable), devices, threads, versions."""
    from .doctor import describe_machine

    print(describe_machine())


def _say(what: object) -> None:
    """Print one line on stderr; line breaks in a library's message become spaces."""
    print("alp:", " ".join(str(what).split()), file=sys.stderr)


def run() -> int:
    """Run the command in sys.argv; returns the exit code."""
    leave_out_import_chatter()
    try:
        is_compare = sys.argv[1:2] == ["compare"]
        commands: dict[str, Callable[..., None]] = {
            "train": train,
            "compare": _compare_from(_preset_in(sys.argv[2:] if is_compare else [])),
            "eval": evaluate,
            "report": report,
            "doctor": doctor,
        }
        tyro.extras.subcommand_cli_from_dict(commands, prog="alp")
    except UserError as error:
        _say(error)
        return 2
    except Stopped as stop:
        if str(stop):
            _say(stop)
        return stop.exit_code
    except KeyboardInterrupt:
        again = (
            "run the same command again to continue"
            if is_compare
            else "alp train --resume RUN continues from the last checkpoint"
        )
        _say(f"interrupted; {again}")
        return 130
    return 0
