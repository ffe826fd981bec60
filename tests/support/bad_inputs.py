"""Every public function, with the kind of each argument (bad_values.py): what must be refused by the argument's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alp_kernels import (
    Head,
    LogitNoise,
    NoiseShift,
    Objective,
    Routing,
    Sampled,
    Stats,
    attach,
    detach,
    fused_alp_loss,
    gather_sequence,
    gather_weight,
    importance_weight,
    linear_logprob,
    match_sigma,
    measure_noise,
    normal,
    perturb,
    perturb_rms_norm,
    policy_loss,
    record_routing,
)
from tests.support.bad_values import (
    INF,
    NAN,
    Kind,
    Values,
    choice,
    count,
    defining,
    first_set,
    flag,
    hidden,
    identifiers,
    instance,
    integer,
    log_probabilities,
    mask,
    module,
    no_batch,
    no_tensor,
    number,
    numbers,
    objective,
    optional,
    power_of_two,
    rate,
    row_identifiers,
    size,
    targets,
    temperatures,
    vector,
    weight,
)
from tests.support.decoders import Toy


@dataclass(frozen=True)
class Function:
    where: str  # what messages begin with
    call: Callable[..., Any]
    good: Callable[[], Values]
    kinds: dict[str, Kind]
    named: dict[str, str] | None = None  # what messages call an argument, where it is not its name


class Case(NamedTuple):
    function: Function
    argument: str
    value_name: str
    value: Any

    @property
    def name(self) -> str:
        return f"{self.function.where}({self.argument}={self.value_name})"


BATCH, TIME, CHANNELS, VOCAB = 2, 3, 4, 11


def batch() -> Values:
    g = torch.Generator().manual_seed(0)
    shape = (BATCH, TIME)
    names = ("logp", "rollout_logp", "old_logp", "ref_logp")
    return {name: -0.2 - torch.rand(shape, generator=g) for name in names} | {
        "advantages": torch.tensor([1.0, -0.5]),
        "mask": torch.ones(shape),
        "entropy": torch.rand(shape, generator=g),
        "token_weight": torch.rand(shape, generator=g),
        "turn_ends": torch.ones(shape),
        "objective": Objective("cum-turn", kl="k3", kl_coef=0.1, entropy_coef=0.1, denominator="old"),
        "num_tokens": 6,
        "num_sequences": 2,
        "nonfinite": "raise",
    }


def packed() -> Values:
    flat = {n: v.reshape(-1) if isinstance(v, Tensor) and v.dim() == 2 else v for n, v in batch().items()}
    return flat | {"cu_seqlens": torch.tensor([0, 3, 6]), "objective": Objective("sequence")}


def of_head() -> Values:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden": torch.randn(BATCH, TIME, CHANNELS, generator=g),
        "weight": torch.randn(VOCAB, CHANNELS, generator=g),
        "targets": torch.randint(VOCAB, (BATCH, TIME), generator=g),
        "bias": torch.randn(VOCAB, generator=g),
        "temperature": 0.7,
        "softcap": 30.0,
        "logit_scale": 0.5,
        "logit_noise": LogitNoise(torch.tensor(-4.0), seed=1, step=2),
        "chunk_bytes": 1 << 20,
        "engine": "reference",
    }


def fused() -> Values:
    return of_head() | {n: v for n, v in batch().items() if n not in ("logp", "entropy")}


COORDINATES: dict[str, Kind] = {
    "seed": integer(0, (1 << 64) - 1),
    "step": integer(0, (1 << 32) - 1),
    "layer": integer(0, 0x7FFF),
    "row_ids": row_identifiers,
    "row_start": integer(0),
}


def coordinates() -> Values:
    return {"seed": 1, "step": 2, "layer": 3, "row_ids": torch.arange(6), "row_start": 0}


def noisy() -> Values:
    h = torch.randn(6, CHANNELS, generator=torch.Generator().manual_seed(2))
    options = {"scale": "absolute", "rounding": "nearest", "engine": "reference"}
    return {"hidden": h, "log_sigma": torch.tensor(-4.0)} | coordinates() | options


LOSS: dict[str, Kind] = {
    "rollout_logp": log_probabilities,
    "advantages": numbers,
    "mask": mask,
    "objective": objective,
    "old_logp": log_probabilities,
    "ref_logp": log_probabilities,
    "token_weight": optional(numbers),
    "turn_ends": mask,
    "num_tokens": count,
    "num_sequences": count,
    "nonfinite": choice,
}
HEAD: dict[str, Kind] = {
    "hidden": hidden,
    "weight": weight,
    "targets": targets,
    "bias": vector,
    "temperature": size,
    "softcap": optional(size),
    "logit_scale": lambda good: number(good) | {"0": 0.0, "0 in float32": 1e-46},
    "logit_noise": instance,
    "chunk_bytes": optional(integer(1)),
    "engine": choice,
}
NOISE: dict[str, Kind] = {
    "log_sigma": lambda good: no_tensor(good) | {"float16": good.half(), "two": good.repeat(2)},
    **COORDINATES,
    "scale": choice,
    "rounding": choice,
    "engine": choice,
}


def _with_head(field: str) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        h = of_head()
        return linear_logprob(h["hidden"], Head(h["weight"], **{field: given[field]}), h["targets"])

    return call


def _with_noise(**given: Any) -> Any:
    h = of_head()
    return linear_logprob(h["hidden"], h["weight"], h["targets"], logit_noise=LogitNoise(**given))


def _sampled(where: Callable[..., Any]) -> Callable[..., Any]:
    """`where`, either function of the head, with a backward that is sampled."""

    def call(**given: Any) -> Any:
        b = fused()
        names = ("targets",) if where is linear_logprob else ("targets", *LOSS)
        head = Head(b["weight"].requires_grad_(), backward=Sampled(**given))
        return where(b["hidden"], head, **{name: b[name] for name in names})

    return call


def _in_scope(**given: Any) -> Any:
    model = Toy()
    with attach(model) as handle, handle.perturbed(**given):
        return model(torch.zeros(2, 3, dtype=torch.int64))


def _record_routing(**given: Any) -> Any:
    with record_routing(**given) as routing:
        return routing


def _routing() -> Any:
    routing = Routing()
    routing.experts["blocks.0"] = torch.zeros(6, 1, dtype=torch.int32)
    return routing


def _handle() -> Any:
    return attach(Toy())


def _toy_and_handle() -> tuple[Toy, Any]:
    model = Toy()
    return model, attach(model)


def _logit_noise(**given: Any) -> Any:
    handle = attach(Toy(), layers="logits", scale="absolute")
    with handle.perturbed(step=0):
        return handle.logit_noise(**given)


def _state(**changes: Any) -> Any:
    handle = _handle()
    state = handle.state_dict()
    log_sigma = changes.pop("log_sigma", state["log_sigma"])
    of_noise = {**state["_extra_state"], **changes}
    return handle.load_state_dict({"log_sigma": log_sigma, "_extra_state": of_noise})


def _states(good: Tensor) -> Values:
    values = {str(value): first_set(good.double(), value) for value in (NAN, INF, -INF, 100.0, -100.0, 1e300)}
    return values | {
        "bools": good.bool(),
        "complex": good.to(torch.complex64),
        "integers": good.long(),
        "on meta": good.to("meta"),
    }


def _shift(**changes: Any) -> NoiseShift:
    b = batch()
    named = {"perturbed": b["logp"], "clean": b["ref_logp"], "objective": Objective("cum-turn")}
    kept = {name: b[name] for name in ("rollout_logp", "mask", "old_logp", "turn_ends")}
    return NoiseShift.of(**{**named, **kept, **changes})


def _clean(good: Tensor) -> Values:
    """Bad values of the model's own log-probabilities; those that are not finite show in the numbers."""
    return {name: value for name, value in log_probabilities(good).items() if name not in ("NaN", "inf", "-inf")}


def _sampler(good: Tensor) -> Values:
    """Bad values of rollout_logp where unknown ones are left out."""
    return defining(_clean)(good)


def _measuring(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[], Values]]:
    """`measure_noise` or `match_sigma` of a small model, and good arguments."""
    model, handle = _toy_and_handle()

    def score(noise: Any) -> Tensor:
        with noise(), torch.no_grad():
            logp: Tensor = model(torch.arange(6).view(2, 3)).log_softmax(-1)[..., 0]
        return logp

    def good() -> Values:
        b = batch()
        return {name: b[name] for name in ("rollout_logp", "mask", "turn_ends")} | {
            "handle": handle,
            "score": score,
            "objective": Objective("cum-turn"),
        }

    return function, good


def _stats() -> Stats:
    b = batch()
    kept = {name: b[name] for name in ("logp", "rollout_logp", "advantages", "mask")}
    return policy_loss(**kept, objective=Objective()).stats


def functions() -> Iterator[Function]:
    yield Function("policy_loss", policy_loss, batch, {"logp": defining(log_probabilities), **LOSS, "entropy": numbers})
    ids = {"cu_seqlens": lambda good: identifiers(good) | {"falling": good.flip(0), "short": good[:-1]}}
    yield Function("policy_loss", policy_loss, packed, ids)
    yield Function(
        "policy_loss",
        policy_loss,
        lambda: {**packed(), "cu_seqlens": None, "sequence_ids": torch.tensor([0, 0, 0, 1, 1, 1])},
        {
            "sequence_ids": lambda good: (
                identifiers(good) | {"one less": good[:-1], "returning": torch.tensor([0, 0, 1, 1, 0, 0])}
            )
        },
    )
    yield Function("fused_alp_loss", fused_alp_loss, fused, {**HEAD, **LOSS})
    yield Function(
        "linear_logprob", linear_logprob, lambda: {**of_head(), "mask": torch.ones(2, 3)}, {**HEAD, "mask": mask}
    )
    of_weight = ("old_logp", "rollout_logp", "mask", "objective")
    yield Function(
        "importance_weight",
        importance_weight,
        lambda: {n: Objective.preset("mis") if n == "objective" else batch()[n] for n in of_weight},
        {n: LOSS[n] for n in of_weight} | {"old_logp": defining(log_probabilities)},
    )
    yield Function(
        "linear_logprob",
        linear_logprob,
        lambda: {**of_head(), "temperature": torch.full((2, 3), 0.7)},
        {"temperature": temperatures},
    )
    of_points = {
        "seed": 1,
        "step": 2,
        "threshold": 0.25,
        "row_ids": torch.arange(6).view(2, 3),
        "row_start": 0,
    }
    for function in (linear_logprob, fused_alp_loss):
        kinds = {name: COORDINATES[name] for name in of_points if name != "threshold"}
        yield Function(
            function.__name__, _sampled(function), lambda: of_points, {**kinds, "threshold": power_of_two(-20, -1)}
        )
    fields: list[tuple[str, Kind, Any]] = [
        ("adapters", instance, ()),
        ("split", instance, None),
        ("backward", instance, None),
        ("support", instance, None),
        ("dtype", instance, None),
        ("dtype", choice, "tf32"),
    ]
    for field, kind, good in fields:
        yield Function("linear_logprob", _with_head(field), lambda field=field, good=good: {field: good}, {field: kind})
    yield Function(
        "linear_logprob",
        _with_noise,
        lambda: {
            "log_sigma": torch.tensor(-4.0),
            "seed": 1,
            "step": 2,
            "row_ids": torch.arange(6).view(2, 3),
            "row_start": 0,
        },
        {"log_sigma": NOISE["log_sigma"], **{n: k for n, k in COORDINATES.items() if n != "layer"}},
    )
    yield Function("perturb", perturb, noisy, {"hidden": defining(hidden), **NOISE})
    yield Function(
        "perturb_rms_norm",
        perturb_rms_norm,
        lambda: noisy() | {"weight": torch.ones(CHANNELS), "eps": 1e-6, "offset": 0.0},
        {"weight": lambda good: vector(good) | {"None": None}, "eps": rate, "offset": number, **NOISE},
    )
    yield Function(
        "normal",
        normal,
        lambda: {"num_rows": 6, "num_channels": 4, **coordinates(), "device": "cpu", "engine": "reference"},
        {
            "num_rows": integer(0),
            "num_channels": integer(1),
            **COORDINATES,
            "engine": choice,
            "device": lambda good: {"no device": "nope", "a list": ["cpu"], "1.5": 1.5},
        },
    )
    for_layers = {
        "another word": "some",
        "7": 7,
        "[7]": [7],
        "none": [],
        "[0.5]": [0.5],
        "bools": [True, False],
        "twice": [0, 0],
        "bytes": bytes(1),
        "a dict": {0: 1},
    }
    yield Function(
        "attach",
        attach,
        lambda: (
            {
                "model": Toy(),
                "sigma": 0.01,
                "layers": "all",
                "learnable": True,
                "seed": 0,
                "scale": "rms",
                "rounding": "nearest",
            }
            | {"sigma_bounds": (1e-4, 1.0), "data_rank": 0, "path": None, "engine": None, "capturable": False}
        ),
        {
            "model": module,
            "sigma": lambda good: (
                {n: v for n, v in size(good).items() if n != "a list"}
                | {"a zero": [0.1, 0.0], "a NaN": torch.tensor([NAN, 1.0]), "five": [0.1] * 5, "bools": [True, True]}
                | {
                    "a dict": {1: 0.1, 2: 0.1, 3: 0.1},
                    "bytes": b"abc",
                    "a set": {0.1, 0.2, 0.3},
                    "on meta": torch.ones(3, device="meta"),
                }
            ),
            "layers": lambda good: for_layers | {"None": None},
            "learnable": flag,
            "seed": integer(0, (1 << 64) - 1),
            "scale": choice,
            "rounding": choice,
            "sigma_bounds": lambda good: {
                "one": (1.0,),
                "a number": 1.0,
                "falling": (1.0, 0.1),
                "0": (0.0, 1.0),
                "strings": ("a", "b"),
                "NaN": (NAN, 1.0),
                "inf": (1.0, INF),
                "0 in float32": (1e-46, 1.0),
            },
            "data_rank": optional(integer(0, (1 << 16) - 1)),
            "path": lambda good: {"3": 3, "nowhere": "nope", "a list": ["layers"], "a layer": "embed"},
            "engine": choice,
            "capturable": flag,
        },
    )
    yield Function("detach", detach, lambda: {"model": Toy(), "path": None}, {"model": module})
    paths = {"3": 3, "nowhere": "nope", "a list": ["layers"], "a layer": "embed"}
    yield Function(
        "record_routing",
        _record_routing,
        lambda: {"model": Toy(), "path": "blocks"},
        {"model": module, "path": lambda good: paths},
    )
    yield Function(
        "changes",
        lambda other, mask: _routing().changes(other, mask),
        lambda: {"other": _routing(), "mask": torch.ones(2, 3)},
        {
            "other": lambda good: instance(good) | {"None": None},
            "mask": lambda good: {n: v for n, v in mask(good).items() if n != "one axis more"},  # rows are flat
        },
    )
    of_scope = {"step": integer(0, (1 << 32) - 1), "row_ids": identifiers}
    yield Function("perturbed", _in_scope, lambda: {"step": 0, "row_ids": torch.arange(6).view(2, 3)}, of_scope)
    yield Function("param_group", lambda lr: _handle().param_group(lr), lambda: {"lr": 1e-3}, {"lr": rate})
    yield Function(
        "sum_gradient",
        lambda average: _handle().sum_gradient(average=average),
        lambda: {"average": True},
        {"average": flag},
    )
    yield Function(
        "logit_noise",
        _logit_noise,
        lambda: {"num_rows": 6, "row_ids": torch.arange(6)},
        {"num_rows": integer(1), "row_ids": identifiers},
    )
    yield Function(
        "load_state_dict",
        _state,
        lambda: {"log_sigma": torch.full((3,), -4.0), "seed": 0, "step": 3, "next_row": 0, "forwards": 0},
        {
            "log_sigma": lambda good: _states(good),
            "seed": integer(0, (1 << 64) - 1),
            "step": integer(-1, (1 << 32) - 1),
            "next_row": integer(0),
            "forwards": integer(0),
        },
    )
    fields: list[tuple[str, Kind, Values]] = [
        ("level", choice, {"level": "token"}),
        ("geometric", flag, {"geometric": False}),
        ("clip_low", rate, {"clip_low": 0.2}),
        ("clip_high", rate, {"clip_high": 0.2}),
        ("dual_clip", optional(size), {"dual_clip": 3.0}),
        ("denominator", choice, {"denominator": "old"}),
        ("weight", optional(choice), {"weight": "mask", "denominator": "old"}),
        ("weight_level", choice, {"weight_level": "token"}),
        ("weight_cap", size, {"weight_cap": 2.0}),
        ("aggregation", choice, {"aggregation": "token-mean"}),
        ("norm_length", optional(size), {"norm_length": 512, "aggregation": "seq-mean-token-sum-norm"}),
        ("kl", optional(choice), {"kl": "k3"}),
        ("kl_coef", rate, {"kl_coef": 0.1, "kl": "k3"}),
        ("kl_bias_correction", flag, {"kl_bias_correction": True, "kl": "k3"}),
        ("entropy_coef", number, {"entropy_coef": 0.1}),
        ("entropy_aggregation", optional(choice), {"entropy_aggregation": "token-mean"}),
    ]
    for field, kind, good in fields:
        yield Function("Objective", Objective, lambda good=good: good, {field: kind})
    yield Function(
        "Objective.preset",
        Objective.preset,
        lambda: {"name": "grpo"},
        {"name": lambda good: choice(good) | {"None": None}},
    )
    yield Function(
        "gather_weight",
        gather_weight,
        lambda: {"weight": torch.ones(2, 2), "group": None, "average": False},
        {"weight": lambda good: no_tensor(good) | {"None": None}, "group": instance, "average": flag},
    )
    yield Function(
        "gather_sequence",
        gather_sequence,
        lambda: {"values": torch.ones(2, 2), "group": None, "dim": 1},
        {"values": lambda good: no_tensor(good) | {"None": None}, "group": instance, "dim": integer(-2, 1)},
    )
    of_noise_alone = {"mask": mask, "objective": objective, "turn_ends": mask}
    yield Function(
        "NoiseShift.of",
        _shift,
        lambda: {
            **{name: batch()[name] for name in ("rollout_logp", "mask", "old_logp", "turn_ends")},
            "perturbed": batch()["logp"],
            "clean": batch()["ref_logp"],
            "objective": Objective("cum-turn"),
        },
        {
            "perturbed": _clean,
            "clean": _clean,
            "rollout_logp": _sampler,
            "old_logp": optional(log_probabilities),
            **of_noise_alone,
        },
    )
    yield Function(
        "NoiseShift.cat",
        NoiseShift.cat,
        lambda: {"parts": [_shift()]},
        {"parts": lambda good: {"None": None, "a number": 1, "strings": ["a"], "none": [], "a NoiseShift": good[0]}},
    )
    callers: dict[str, Kind] = {
        "handle": lambda good: instance(good) | {"None": None, "a model": Toy()},
        "score": lambda good: {"None": None, "a string": "x", "a tensor": torch.ones(2, 3)},
        "rollout_logp": _sampler,
    }
    ids = {"cu_seqlens": lambda good: identifiers(good) | {"falling": good.flip(0), "short": good[:-1]}}
    for measuring, name in ((measure_noise, "measure_noise"), (match_sigma, "match_sigma")):
        function, good_of = _measuring(measuring)
        yield Function(name, function, good_of, {**callers, **of_noise_alone})
    function, good_of = _measuring(measure_noise)
    more = {"by_layer": False, "old_logp": batch()["old_logp"]}
    yield Function(
        "measure_noise",
        function,
        lambda: good_of() | more,
        {"by_layer": flag, "old_logp": optional(log_probabilities)},
    )
    yield Function(
        "NoiseShift.of",
        lambda cu_seqlens: NoiseShift.of(
            *(packed()[name] for name in ("logp", "ref_logp", "rollout_logp", "mask")),
            objective=Objective("sequence"),
            cu_seqlens=cu_seqlens,
        ),
        lambda: {"cu_seqlens": torch.tensor([0, 3, 6])},
        ids,
    )
    yield Function(
        "probing",
        lambda only: _handle().probing(only).__enter__(),
        lambda: {"only": 0},
        {"only": optional(integer(0, 2))},
    )
    yield Function(
        "Stats.cat",
        Stats.cat,
        lambda: {"parts": [_stats()]},
        {
            "parts": lambda good: {
                "None": None,
                "a number": 1,
                "strings": ["a"],
                "none": [],
                "a Stats": good[0],
                "outputs": [(1, 2)],
            }
        },
    )
    yield Function(
        "Stats.envelope",
        lambda num_bins: _stats().envelope(num_bins),
        lambda: {"num_bins": 4},
        {"num_bins": integer(1)},
    )
    yield Function(
        "Stats.with_versions",
        lambda **given: _stats().with_versions(**given),
        lambda: {"versions": torch.zeros(BATCH, TIME, dtype=torch.int64), "current": 1},
        {
            "versions": lambda good: no_batch(good) | {"None": None, "floats": good.float(), "bools": good.bool()},
            "current": integer(0, (1 << 63) - 1),
        },
    )


def cases() -> Iterator[Case]:
    for function in functions():
        for argument, kind in function.kinds.items():
            for value_name, value in kind(function.good()[argument]).items():
                yield Case(function, argument, value_name, value)
