"""A comparison: equal terms, faults distinguished from divergence, resumed after a kill as if never stopped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alp import cli
from alp.config import TrainConfig
from alp.errors import Diverged, UserError
from alp.measures.step import step_kl
from alp.methods import METHODS, register
from alp.policy.tiny import make_tiny
from alp.ranks.world import World
from alp.runs.files import read_metrics
from alp.setup import make_sampler, make_task
from alp.study.compare import Comparison, _warm_up, compare, cross, locked
from alp.study.grid import load_grid
from alp.study.presets import PRESETS, arms_of, change, contrasts_of
from alp.study.summary import accuracies
from alp.tools.tool_task import ToolTask
from alp.train import Trainer
from alp_kernels import Objective
from tests.support.grids import ARMS, base, grid

ROOT = Path(__file__).parents[2]
TIMES = ("_s", "peak_mib")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def steps(folder: Path, cell: str) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "runs" / cell / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """An undisturbed comparison: two methods, two seeds, two cells at a time."""
    folder = tmp_path_factory.mktemp("grids") / "whole"
    assert compare(grid(folder, base(cache)), jobs=2) == []
    return folder


def test_cells_of_a_seed_start_on_equal_terms(whole: Path) -> None:
    for seed in (0, 1):
        first = [steps(whole, f"{arm}-s{seed}")[0] for arm in ARMS]
        measured = [key for key in first[0] if key.startswith("clean/")]
        assert len(measured) > 20
        for key in ("reward", "accuracy", "num_tokens", *measured):
            assert first[0][key] == first[1][key], key  # the same rollouts from the same weights
    assert steps(whole, "alp-sequence-s0")[0]["reward"] != steps(whole, "alp-sequence-s1")[0]["reward"]
    assert steps(whole, "alp-sequence-s0")[-1] != steps(whole, "bypass-sequence-s0")[-1]


def test_a_finished_cell_holds_evaluations_and_no_checkpoint(whole: Path) -> None:
    folder = whole / "runs" / "alp-sequence-s0"
    metrics = steps(whole, "alp-sequence-s0")
    outcome = json.loads((folder / "outcome.json").read_text())
    assert [m["step"] for m in metrics if "eval/train" in m] == [3, 6]
    assert metrics[-1]["eval/train"] == outcome["after"]["train"]
    assert all(m["step_kl"] > 0 for m in metrics)
    assert sum(metrics[0]["clean/histogram"]["token"]) == metrics[0]["num_tokens"]
    assert sum(metrics[0]["clean/histogram"]["sequence"]) == metrics[0]["num_sequences"]
    assert not (folder / "checkpoints").exists()
    assert (folder / "model" / "config.json").is_file()


def test_a_comparison_names_its_arms_and_where_it_was_made(whole: Path) -> None:
    description = json.loads((whole / "grid.json").read_text())
    assert list(description["arms"]) == list(ARMS)
    assert description["arms"]["alp-sequence"]["update"]["method"] == "alp-sequence"
    assert description["seeds"] == [0, 1]
    assert ["alp-sequence", "bypass-sequence"] in description["contrasts"]
    assert {"commit", "torch", "began", "machine"} <= set(description["provenance"])


COMMAND = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.grids import base, grid
from alp.study.compare import compare
if __name__ == "__main__":
    compare(grid(Path({folder!r}), base(Path({cache!r}))), jobs=1)
"""


def test_a_comparison_killed_in_the_middle_ends_as_if_never_stopped(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder, script = tmp_path / "killed", tmp_path / "command.py"
    script.write_text(COMMAND.format(root=str(ROOT), folder=str(folder), cache=str(cache)))
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    middle = folder / "runs" / "bypass-sequence-s0" / "metrics.jsonl"
    wait_until(lambda: len(read_metrics(middle)) >= 3)
    os.kill(process.pid, signal.SIGKILL)  # kills the command alone; its workers must stop by themselves
    process.wait(timeout=60)
    with pytest.raises(UserError, match="is running on it"), locked(whole), locked(whole):
        pass
    time.sleep(1.0)
    done = len(read_metrics(middle))
    time.sleep(1.0)
    assert len(read_metrics(middle)) == done  # no worker continues in the background
    assert compare(grid(folder, base(cache)), jobs=2) == []
    for arm in ARMS:
        for seed in (0, 1):
            assert steps(folder, f"{arm}-s{seed}") == steps(whole, f"{arm}-s{seed}")


def wait_until(holds: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_divergence_is_an_outcome_and_a_fault_is_not(cache: Path, tmp_path: Path) -> None:
    diverging = {"update.method": "bypass-token", "update.lr": 1e30}
    faulty = {"update.method": "alp-token", "update.layers": "7"}  # the model has two layers
    arms = {"diverging": diverging, "faulty": faulty, **arms_of(("bypass-sequence",))}
    comparison = grid(tmp_path / "grid", base(cache), arms, seeds=(0,))
    assert compare(comparison, jobs=1) == ["faulty-s0"]
    runs = tmp_path / "grid" / "runs"
    assert "norm is" in (runs / "diverging-s0" / "failure.txt").read_text()
    cells = {cell.arm: cell for cell in load_grid(tmp_path / "grid").cells}
    other = cells["bypass-sequence"].outcome
    assert other is not None
    assert accuracies(cells["diverging"]) == (
        [0],
        [other["before"]["train"]],
    )  # it has only the evaluation before training
    assert not (runs / "faulty-s0" / "outcome.json").exists()
    assert "update.layers" in (tmp_path / "grid" / "logs" / "faulty-s0.log").read_text()
    assert (runs / "bypass-sequence-s0" / "outcome.json").is_file()


def test_an_older_comparison_goes_on_unless_it_has_more_draws(cache: Path, tmp_path: Path) -> None:
    comparison = grid(tmp_path / "grid", base(cache))
    comparison.open()
    path = tmp_path / "grid" / "grid.json"
    for draws in (1, 2):
        found = json.loads(path.read_text())
        found["arms"]["alp-sequence"]["update"]["draws"] = draws
        path.write_text(json.dumps(found))
        if draws == 1:
            comparison.open()
            continue
        with pytest.raises(UserError, match=r"grid\.json: alp-sequence: update\.draws=2 is from an older version"):
            comparison.open()


def test_a_folder_keeps_its_comparison(whole: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another comparison: its seeds differ"):
        compare(grid(whole, base(cache), seeds=(0, 2)), jobs=1)
    with pytest.raises(UserError, match="its arms differ"):
        compare(grid(whole, base(cache, steps=7)), jobs=1)
    assert compare(grid(whole, base(cache)), jobs=1) == []
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is not a comparison"):
        compare(grid(tmp_path, base(cache)), jobs=1)


def test_a_comparison_takes_more_seeds(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = arms_of(("bypass-token",))
    config = base(cache, steps=1, eval_every=0)
    assert compare(grid(tmp_path / "grid", config, arms, seeds=(1,)), jobs=1) == []
    path = tmp_path / "grid" / "grid.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": {"commit": "0", "torch": "1.0"}}))
    began = json.loads(path.read_text())["provenance"]
    assert compare(grid(tmp_path / "grid", config, arms, seeds=(0, 1)), jobs=1) == []
    assert "going on with other code than this comparison began with: commit 0 -> " in capsys.readouterr().out
    grown = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert grown["seeds"] == [0, 1]
    assert grown["provenance"] == began
    assert (tmp_path / "grid" / "runs" / "bypass-token-s0" / "outcome.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "no duplicates"),
        ({"arms": {}}, "no arms"),
        ({"arms": {"a/b": {}}}, "cannot name a folder"),
        ({"contrasts": (("alp-sequence", "grpo"),)}, "'grpo' is not an arm"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments = {"arms": ARMS, "seeds": (0,), "contrasts": ()} | changes
    with pytest.raises(UserError, match=message):
        Comparison(tmp_path, "", TrainConfig(), **arguments, threads=1)


def test_settings_cross_arms_and_contrasts() -> None:
    pairs = contrasts_of(tuple(ARMS))
    arms, crossed = cross(ARMS, pairs, ("update.sigma=1e-3,1e-2", "rollout.lag=0,4"))
    assert len(arms) == 2 * 4
    assert arms["alp-sequence_sigma=1e-3_lag=4"] == {
        "update.method": "alp-sequence",
        "update.sigma": 1e-3,
        "rollout.lag": 4,
    }
    assert crossed[0] == ("alp-sequence_sigma=1e-3_lag=0", "bypass-sequence_sigma=1e-3_lag=0")
    assert len(crossed) == 4
    with pytest.raises(UserError, match="not a setting of an arm"):
        cross(ARMS, (), ("update.sgima=1",))
    with pytest.raises(UserError, match="FIELD=VALUE"):
        cross(ARMS, (), ("update.sigma",))
    with pytest.raises(UserError, match="it needs float"):
        cross(ARMS, (), ("update.sigma=big",))
    with pytest.raises(UserError, match="it needs int"):
        cross(ARMS, (), ("rollout.lag=0.5",))


def test_settings_take_values_of_the_fields_own_types() -> None:
    arms, _ = cross(ARMS, (), ("rollout.max_new_tokens=8,null", "task.path=a.jsonl", "update.scale=rms"))
    assert [changes["rollout.max_new_tokens"] for changes in arms.values()] == [8, None] * 2
    assert all(changes["task.path"] == Path("a.jsonl") for changes in arms.values())
    sizes, _ = cross(ARMS, (), ("update.sigma=1e-3,matched",))
    assert [changes["update.sigma"] for changes in sizes.values()] == [1e-3, "matched"] * 2
    for wrong in (
        "rollout.max_new_tokens=abc",
        "update.scale=row",
        "measure_clean=1",
        "seed=7,8",
        "name=x",
        "device=cpu",
    ):
        with pytest.raises(UserError, match="vary"):
            cross(ARMS, (), (wrong,))


def test_what_a_kill_left_half_written_does_not_spoil_a_folder(cache: Path, tmp_path: Path) -> None:
    (tmp_path / ".grid.json-123").write_text("{")
    comparison = grid(tmp_path, base(cache), arms_of(("bypass-token",)), seeds=(0,))
    comparison.open()
    assert json.loads((tmp_path / "grid.json").read_text())["seeds"] == [0]


def test_a_tools_warm_up_is_that_of_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[Any] = []
    monkeypatch.setattr("alp.warmup.warmed_up", lambda config, task, report: (warmed.append(task), "")[::-1])
    _warm_up(PRESETS["tools"].base)
    assert isinstance(warmed[0], ToolTask)


def test_a_policy_that_is_no_longer_a_number_has_diverged(cache: Path, tmp_path: Path) -> None:
    config = base(cache, runs=tmp_path)
    task, world = make_task(config.task, config.seed), World("cpu")
    trainer = Trainer(config, world, make_tiny(config.model), task, make_sampler)
    with torch.no_grad():
        next(trainer.sampler.model.parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match="not finite"):
        trainer.step()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_configurations_that_exist(name: str) -> None:
    preset = PRESETS[name]
    configs = {arm: change(preset.base, changes) for arm, changes in preset.arms.items()}
    assert len({config.to_json() for config in configs.values()}) == len(configs)  # no two arms are the same
    assert all(set(pair) <= set(configs) for pair in preset.contrasts)
    assert all(config.measure_clean for config in configs.values())


def test_one_layer_at_equal_total_noise_has_the_variance_of_all() -> None:
    arms = {name: change(PRESETS["ablation"].base, changes) for name, changes in PRESETS["ablation"].arms.items()}
    layers = arms["all"].model.num_layers
    assert arms["early_equal-total"].update.sigma ** 2 == pytest.approx(layers * arms["all"].update.sigma ** 2)
    assert arms["early"].update.sigma == arms["all"].update.sigma


PLUGIN = """
from alp.methods import register
from alp_kernels import Objective
register("tight-alp", Objective("sequence", clip_low=0.1, clip_high=0.1), perturbed=True)
"""


def test_a_method_of_the_users_own_is_a_file_of_three_lines(cache: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    config = base(cache, plugins=(str(plugin),), steps=1)
    assert compare(grid(tmp_path / "grid", config, arms_of(("tight-alp",)), seeds=(0,)), jobs=1) == []
    assert "sigma" in steps(tmp_path / "grid", "tight-alp-s0")[0]
    METHODS.pop("tight-alp")
    plugin.write_text(PLUGIN.replace("clip_low=0.1", "clip_low=0.2"))
    del sys.modules[next(name for name in sys.modules if name.startswith("alp_plugin_"))]
    with pytest.raises(UserError, match="its objectives differ"):
        compare(grid(tmp_path / "grid", dataclasses.replace(config), arms_of(("tight-alp",)), seeds=(0,)), jobs=1)
    METHODS.pop("tight-alp")


def test_plugins_that_cannot_be_imported_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"broken.py' cannot be imported: ZeroDivisionError"):
        TrainConfig(plugins=(str(broken),))
    with pytest.raises(UserError, match="no_such_module"):
        TrainConfig(plugins=("no_such_module",))


def test_a_method_keeps_its_name() -> None:
    register("grpo", METHODS["grpo"].objective)
    with pytest.raises(ValueError, match="a different method"):
        register("grpo", Objective("sequence"))


def test_step_kl_of_a_known_change() -> None:
    before = torch.tensor([[-1.0, -2.0, -3.0]])
    after = before + torch.tensor([[0.1, -0.2, 5.0]])
    mask = torch.tensor([[True, True, False]])
    expected = (np.expm1(0.1) - 0.1 + np.expm1(-0.2) + 0.2) / 2
    assert step_kl(before, after, mask, World("cpu")) == pytest.approx(expected, abs=1e-6)
    assert step_kl(before, after, torch.zeros_like(mask), World("cpu")) == 0


def test_the_command_refuses_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in [
        (["--preset", "lga"], "preset='lga' is not one of lag"),
        (["--preset", "lag", "--methods", "grop"], "update.method='grop'"),
        (["--preset", "lag", "--contrasts", "alp-token"], "pairs like"),
        (["--preset", "lag", "--jobs", "0"], "jobs=0"),
        (["--methods", "grpo", "--seed", "3"], "--methods and --seeds"),
        (["--methods", "grpo", "--update.method", "mis"], "--methods and --seeds"),
        (["--methods", "grpo", "grpo"], "each may appear once"),
        (["--methods", "grpo", "--vary", "update.lr=1,1"], "a value twice"),
        (["--methods", "grpo", "--vary", "update.method=mis"], "vary: 'update.method'"),
        (["--name", "x", "--methods", "grpo"], "name='x'"),
        ([], "no arms"),
    ]:
        monkeypatch.setattr(sys, "argv", ["alp", "compare", *arguments])
        assert cli.run() == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
