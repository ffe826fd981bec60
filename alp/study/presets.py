"""The comparisons behind docs/evidence.md; each runs with one command, such as `alp compare --preset lag`.

A preset is a base configuration, the arms as changes to it, and the contrasts its report tests. All but
`tools` share a decoder of three layers on mod_chain. One core trains it in half a minute, so five seeds of eight methods
are affordable.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig, RolloutConfig, TrainConfig, UpdateConfig

Changes = dict[str, Any]
"""Fields by dotted name, as on the command line: {"update.clip_low": 0.99}."""
Pair = tuple[str, str]
"""An arm and its baseline."""


@dataclass(frozen=True)
class Preset:
    """One comparison; `about` describes what varies."""

    about: str
    base: TrainConfig
    arms: dict[str, Changes]
    contrasts: tuple[Pair, ...]


def change(config: Any, changes: Changes) -> Any:
    """Return `config` with the fields in `changes`, given by dotted name, replaced."""
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        if group:
            value = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group or field: value})
    return config


METHODS_COMPARED = (
    "grpo",
    "gspo",
    "tis-token",
    "mis",
    "bypass-token",
    "bypass-sequence",
    "alp-token",
    "alp-sequence",
)


def arms_of(methods: tuple[str, ...]) -> dict[str, Changes]:
    """Return one arm for each method, named after the method."""
    return {method: {"update.method": method} for method in methods}


def contrasts_of(arms: tuple[str, ...]) -> tuple[Pair, ...]:
    """Compare ALP with Bypass at the same level, and every method with GRPO: the contrasts behind the paper's claim."""
    pairs = [(f"alp-{level}", f"bypass-{level}") for level in ("token", "sequence")]
    pairs += [(method, "grpo") for method in arms if method != "grpo"]
    return tuple(pair for pair in pairs if set(pair) <= set(arms))


_BASE = TrainConfig(
    model=ModelConfig(hidden_size=64, intermediate_size=168, num_layers=3, num_heads=4),
    rollout=RolloutConfig(path="int8", bits=5, lag=8, prompts=16, samples=8),
    update=UpdateConfig(lr=1e-4, sigma=1e-2, scale="absolute"),
    steps=60,
    eval_prompts=256,
    eval_every=20,
    measure_clean=True,
    cache=Path("runs/cache"),
)


def _methods(about: str, **changes: Any) -> Preset:
    base = change(_BASE, {name.replace("__", "."): value for name, value in changes.items()})
    return Preset(about, base, arms_of(METHODS_COMPARED), contrasts_of(METHODS_COMPARED))


def _clip() -> Preset:
    arms = {
        f"{method}_{low}": {"update.method": method, "update.clip_low": low}
        for method in ("bypass-sequence", "alp-sequence")
        for low in (0.5, 0.99)
    }
    contrasts = [(f"{method}_0.99", f"{method}_0.5") for method in ("bypass-sequence", "alp-sequence")]
    contrasts += [(f"alp-sequence_{low}", f"bypass-sequence_{low}") for low in (0.5, 0.99)]
    return Preset(
        "the lower clip, 0.5 against 0.99, with weights of 3 bits in the rollout engine: a low clip deletes the "
        "gradient of bad tokens that the engine already made unlikely",
        change(_BASE, {"rollout.bits": 3, "rollout.lag": 2}),
        arms,
        tuple(contrasts),
    )


def _ablation() -> Preset:
    """Vary around sigma 1e-2 in all three layers. One layer alone has equal total noise at sqrt(3) times that sigma."""
    alp: Changes = {"update.method": "alp-sequence", "update.sigma_lr": 0.0}
    equal_total = 1e-2 * 3**0.5
    arms: dict[str, Changes] = {"bypass": {"update.method": "bypass-sequence"}, "all": alp}
    for layer, name in enumerate(("early", "middle", "late")):
        arms[name] = alp | {"update.layers": str(layer)}
        arms[f"{name}_equal-total"] = arms[name] | {"update.sigma": equal_total}
    arms["final"] = alp | {"update.layers": "final"}
    arms["logits"] = alp | {"update.layers": "logits"}
    arms["logits_sigma-0.3"] = arms["logits"] | {"update.sigma": 0.3}
    for sigma in (1e-6, 1e-3, 3e-3, 3e-2, 1e-1):
        arms[f"sigma-{sigma:g}"] = alp | {"update.sigma": sigma}
    arms["learned"] = alp | {"update.sigma_lr": 5e-4}
    arms["learned_lr-2e-2"] = alp | {"update.sigma_lr": 2e-2}
    arms["rms"] = alp | {"update.scale": "rms"}
    arms["rms_sigma-3e-2"] = arms["rms"] | {"update.sigma": 3e-2}
    arms["bf16"] = alp | {"model.dtype": "bfloat16", "update.sigma": 1e-3}
    arms["bf16_stochastic"] = arms["bf16"] | {"update.rounding": "stochastic"}
    contrasts = [(name, "bypass") for name in arms if name != "bypass"]
    contrasts.remove(("bf16_stochastic", "bypass"))  # the bf16 arms compute in another dtype than the baseline
    contrasts.remove(("bf16", "bypass"))
    return Preset(
        "where the noise goes and how large it is, on alp-sequence with sigma 1e-2 held fixed in all layers",
        _BASE,
        arms,
        (*contrasts, ("bf16_stochastic", "bf16")),
    )


def _settle() -> Preset:
    methods = ("bypass-token", "alp-token", "bypass-sequence", "alp-sequence")
    return Preset(
        "with and without the noise: is the ratio's maximum and variance above the same thresholds, and does the KL "
        "between consecutive policies jump",
        change(_BASE, {"update.lr": 2e-4, "steps": 120, "measure_step_kl": True, "eval_every": 30}),
        arms_of(methods),
        contrasts_of(methods),
    )


def _search() -> Preset:
    """Settings in which the noise could matter more than in `lag`, each with its own Bypass arms.

    The recorded grid has one more arm for each setting, `alp-token_two-draws`, from the removed option `update.draws`.
    """
    settings: dict[str, Changes] = {
        "sharp": {"update.lr": 4e-4},
        "stale": {"rollout.lag": 16, "update.lr": 2e-4},
        "coarse": {"rollout.bits": 3, "rollout.lag": 0},
        "coarse-stale": {"rollout.bits": 4, "update.lr": 2e-4},
    }
    token: Changes = {"update.method": "alp-token"}
    variants: dict[str, Changes] = {
        "alp-token": token,
        "alp-token_sigma-3e-2": token | {"update.sigma": 3e-2},
        "alp-token_rms": token | {"update.scale": "rms"},
        "alp-sequence": {"update.method": "alp-sequence"},
        "alp-sequence_sigma-3e-2": {"update.method": "alp-sequence", "update.sigma": 3e-2},
    }
    arms = arms_of(("bypass-token", "bypass-sequence")) | variants
    return Preset(
        "settings and forms of the noise in which ALP might beat Bypass: higher learning rate, longer lag, coarser "
        "quantisation; larger sigma, sigma relative to the row's RMS",
        _BASE,
        {f"{setting}_{arm}": changes | more for setting, more in settings.items() for arm, changes in arms.items()},
        tuple(
            (f"{setting}_{arm}", f"{setting}_bypass-{'token' if 'token' in arm else 'sequence'}")
            for setting in settings
            for arm in variants
        ),
    )


def _tools() -> Preset:
    methods = ("grpo", "bypass-token", "bypass-sequence", "alp-token", "alp-sequence", "alp-cum-turn")
    changes = {"task.name": "tool_chain", "model": ModelConfig(), "rollout.lag": 4, "steps": 40}
    return Preset(
        "methods where the model calls a tool over several turns, weights of four batches ago in the rollout engine",
        change(_BASE, changes),
        arms_of(methods),
        (*contrasts_of(methods), ("alp-cum-turn", "alp-sequence")),
    )


THRESHOLDS = (2.0**-10, 2.0**-12, 2.0**-14)


def _sampled() -> Preset:
    """The model has a vocabulary of 32768 (`python -m alp.study.wide runs/wide`)."""
    arms: dict[str, Changes] = {"exact": {}}
    for threshold in THRESHOLDS:
        arms[f"sampled-2^{math.log2(threshold):.0f}"] = {"update.backward": "sampled", "update.threshold": threshold}
    changes = {
        "task.options": ("num_steps=6",),
        "model": ModelConfig(path="runs/wide"),
        "rollout.lag": 2,
        "rollout.prompts": 8,
        "rollout.max_new_tokens": 7,
        "update.minibatches": 2,
        "update.lr": 2e-4,
        "steps": 50,
        "eval_prompts": 128,
        "eval_every": 0,
        "checkpoint_every": 25,
    }
    return Preset(
        "the output head's gradient, exact or sampled below a threshold of 2^-10, 2^-12 or 2^-14, with 32768 tokens",
        change(_BASE, changes),
        arms,
        tuple((arm, "exact") for arm in arms if arm != "exact"),
    )


LONG: Changes = {
    "task.options": ("num_steps=24", "spelled=True"),
    "warmup.error": 0.06,
    "steps": 40,
    "eval_prompts": 128,
    "eval_every": 0,
}
"""The chain of `_BASE` in answers of 120 tokens, with as much to improve: 0.94^24 is 0.23."""


def _sigma(length: str, changes: Changes) -> Preset:
    alp: Changes = {"update.method": "alp-sequence"}
    arms: dict[str, Changes] = {
        "none": {"update.method": "bypass-sequence"},
        "matched": alp | {"update.sigma": "matched", "update.scale": "rms"},
        "fixed": alp | {"update.sigma": 1e-2, "update.scale": "absolute"},
        "rms": alp | {"update.sigma": 1e-2, "update.scale": "rms"},
    }
    return Preset(
        f"the noise's size with answers of {length}: none, matched to the mismatch, sigma 1e-2, and 1e-2 of each row's RMS",
        change(_BASE, {"update.lr": 2e-4} | changes),
        arms,
        (("matched", "none"), ("matched", "fixed"), ("fixed", "none"), ("rms", "none")),
    )


PRESETS: dict[str, Preset] = {
    "lag": _methods("weights of eight batches ago in the rollout engine, 5-bit weights and 8-bit activations"),
    "stress": _methods("the setting of `lag` at twice the learning rate", update__lr=2e-4),
    "mismatch": _methods("no lag, weights of 4 bits in the rollout engine", rollout__lag=0, rollout__bits=4),
    "clip": _clip(),
    "ablation": _ablation(),
    "settle": _settle(),
    "search": _search(),
    "tools": _tools(),
    "sampled": _sampled(),
    "sigma": _sigma("12 tokens", {}),
    "sigma-long": _sigma("120 tokens", LONG),
}
