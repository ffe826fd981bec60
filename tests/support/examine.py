"""What `attach` does to a tiny model of each architecture: five examinations that share their work.

python -m tests.support.examine [name ...]      prints what was found
python -m tests.support.examine --write         writes it into docs/architectures.md
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alp_kernels import Perturbation, attach
from alp_kernels.integrations.hugging_face import check_head, output_head
from alp_kernels.layers.find import find_layers
from tests.support.architectures import ARCHITECTURES, Architecture

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
MARK = "<!-- python -m tests.support.examine --write -->"
SIGMA, STEP = 0.05, 1e-4  # the noise's sigma; the central difference's step in log_sigma
VARIANTS = {"reentrant": True, "non-reentrant": False}


class Checkpointed(NamedTuple):
    recomputed: bool  # a layer's forward ran again in backward
    difference: float  # from gradients without checkpointing, relative to each tensor's largest


class Findings(NamedTuple):
    path: str
    num_layers: int
    runs: list[int]  # of each layer, in one forward
    changed: bool  # the noise changes the logits, and they are finite
    clean: bool  # attached and switched off, before and after a scope: the untouched model's bits
    restored: bool  # after detach: the untouched model's bits and hooks
    head: str  # what the fused loss needs of the model's head, or "no"
    gradient: list[float]  # of log_sigma, by layer
    differences: list[float]  # the same by central differences
    checkpointing: dict[str, Checkpointed | str]  # by variant; a reason where the model has none


class Double(TorchFunctionMode):
    """Compute in float64 what models force into float32: norms, softmaxes, rotary angles, states."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def available(name: str) -> bool:
    """Whether the installed transformers has the architecture and can train it."""
    architecture = ARCHITECTURES[name]
    return architecture.model_type in CONFIG_MAPPING and Version(transformers.__version__) >= Version(
        architecture.since
    )


def make(architecture: Architecture) -> nn.Module:
    """The model with random weights, in training mode, with a deterministic forward."""
    config = copy.deepcopy(architecture.config)  # transformers writes into nested ones
    config = CONFIG_MAPPING[config.pop("model_type")](**config)
    parts = [config, *(part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig))]
    for part in parts:
        if hasattr(part, "use_cache"):
            part.use_cache = False
        for key, value in list(vars(part).items()):
            if ("dropout" in key or "pdrop" in key or "jitter" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
    torch.manual_seed(0)
    kind = AutoModelForCausalLM
    if architecture.is_vision:
        kind = transformers.AutoModelForImageTextToText
    model = kind.from_config(config, attn_implementation="eager").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


@cache
def examine(name: str) -> Findings:
    architecture = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = make(architecture), architecture.inputs()

        def logits() -> Tensor:
            return model(**inputs).logits

        with torch.no_grad():
            untouched, before = logits(), hooks(model)
            found = find_layers(model, architecture.path)
            handle = attach(model, sigma=SIGMA, scale="absolute", path=architecture.path)
            clean = torch.equal(logits(), untouched)
            with handle.perturbed(step=0), _counted(found.layers) as runs:
                noisy = logits()
            clean &= torch.equal(logits(), untouched)
        head = _head(model, inputs)
        checkpointing = _checkpointing(model, handle, inputs)
        handle.detach()
        with torch.no_grad():
            restored = torch.equal(logits(), untouched) and hooks(model) == before
        gradient, differences = _differences(model, inputs, architecture.path)
    return Findings(
        found.path,
        len(found.layers),
        [runs[layer] for layer in found.layers],
        not torch.equal(noisy, untouched) and bool(noisy.isfinite().all()),
        clean,
        restored,
        head,
        gradient,
        differences,
        checkpointing,
    )


def _head(model: nn.Module, inputs: dict[str, Any]) -> str:
    """What `output_head` finds, compared with the model's own logits."""
    try:
        check_head(model, **inputs)
    except (ValueError, TypeError):
        return "no"
    head = output_head(model)
    parts = ("bias", head.bias is not None), ("scale", head.logit_scale != 1), ("softcap", head.softcap is not None)
    return ", ".join(["weight", *(name for name, has in parts if has)])


def _gradients(model: nn.Module, handle: Perturbation, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    handle.zero_grad()
    handle._rows.next = 0
    with handle.perturbed(step=0):
        model(**inputs).logits.float().log_softmax(-1)[..., 3].mean().backward()
    named = {**dict(model.named_parameters()), "log_sigma": handle.log_sigma}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def _checkpointing(model: Any, handle: Perturbation, inputs: dict[str, Any]) -> dict[str, Checkpointed | str]:
    plain = _gradients(model, handle, inputs)
    if not model.supports_gradient_checkpointing:
        return dict.fromkeys(VARIANTS, "none in transformers")
    results: dict[str, Checkpointed | str] = {}
    for variant, reentrant in VARIANTS.items():
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            with _counted(model.modules(), in_backward=True) as runs:
                gradients = _gradients(model, handle, inputs)
            results[variant] = Checkpointed(runs.total() > 0, _distance(gradients, plain))
        finally:
            model.gradient_checkpointing_disable()
            if hasattr(model, "_require_grads_hook"):  # newer versions set it for reentrant checkpoints
                model.disable_input_require_grads()
    return results


@contextmanager
def _counted(modules: Iterable[nn.Module], in_backward: bool = False) -> Iterator[Counter[nn.Module]]:
    """Count how often each module runs in forward or, with `in_backward`, is recomputed in backward."""
    runs: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: Any) -> None:
        runs[module] += (torch._C._current_graph_task_id() != -1) == in_backward

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield runs
    finally:
        for hook in handles:
            hook.remove()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if actual.keys() != expected.keys():
        return float("inf")
    floor = 1e-3 * max(float(e.abs().max()) for e in expected.values())
    return max(float((actual[k] - e).abs().max()) / max(float(e.abs().max()), floor) for k, e in expected.items())


def _differences(model: nn.Module, inputs: dict[str, Any], path: str | None) -> tuple[list[float], list[float]]:
    """The gradient of log_sigma and its central differences, with the whole model in float64."""
    model.double().requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others do not support float64
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    handle = attach(model, sigma=SIGMA, scale="absolute", path=path)
    handle.log_sigma.data = handle.log_sigma.data.double()

    def loss() -> Tensor:
        handle._rows.next = 0
        with handle.perturbed(step=0):
            return model(**inputs).logits.log_softmax(-1)[..., 3].mean()

    with Double(), _default_dtype(torch.float64):
        loss().backward()
        differences = []
        with torch.no_grad():
            for i in range(len(handle.log_sigma)):
                values = []
                for shift in (STEP, -STEP):
                    handle.log_sigma.data[i] += shift
                    values.append(float(loss()))
                    handle.log_sigma.data[i] -= shift
                differences.append((values[0] - values[1]) / (2 * STEP))
    handle.detach()
    return handle.log_sigma.grad.tolist(), differences


# ------------------------------------------------------------------ the table

COLUMNS = ("architecture", "what it is", "inputs", "list of layers", "layers", "recompute", "fused head", "remarks")


def row(names: list[str]) -> str:
    """A line of the table: one model, with its inputs."""
    first, findings = ARCHITECTURES[names[0]], [examine(name) for name in names]
    kinds = [variant for variant, found in findings[0].checkpointing.items() if not isinstance(found, str)]
    remarks = [remark for name in names if (remark := ARCHITECTURES[name].remark)]
    cells = (
        f"`{first.model_type}`",
        first.kind,
        "; ".join("text and image" if "image" in name else "text" for name in names),
        f"`{findings[0].path}`" + (" (`path=`)" if first.path else ""),
        str(findings[0].num_layers),
        ", ".join(kinds) or "none in transformers",
        findings[0].head,
        "; ".join(remarks),
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    models: dict[str, list[str]] = {}
    for name, architecture in sorted(ARCHITECTURES.items()):
        models.setdefault(architecture.model_type, []).append(name)
    header = [f"transformers {transformers.__version__}, {len(models)} architectures", ""]
    header += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(header + [row(names) for names in models.values()]) + "\n"


def committed_table() -> str:
    return DOCUMENT.read_text().split(MARK + "\n", 1)[1]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(DOCUMENT.read_text().split(MARK, 1)[0] + MARK + "\n" + table())
    else:
        print(*(f"{name}: {examine(name)}" for name in sys.argv[1:] or ARCHITECTURES), sep="\n")
