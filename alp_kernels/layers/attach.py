"""attach: adds noise to the inputs of any model's decoder layers.

handle = attach(model, sigma=1e-2)
with handle.perturbed(step=step):
    loss = ...            # forward
    loss.backward()
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_integer, check_size, is_number, refuse_type, refuse_value
from ..engine import check_name
from ..noise.perturb import ROUNDINGS, SCALES
from ..stream import FINAL_LAYER, LOGITS_LAYER, MAX_LAYER, MAX_SEED
from .find import find_layers
from .perturbation import Perturbation, attached
from .rows import MAX_RANK


def attach(
    model: nn.Module,
    sigma: float | Iterable[float] | str = 1e-2,
    *,
    layers: str | Iterable[int] = "all",
    learnable: bool = True,
    seed: int = 0,
    scale: str = "rms",
    rounding: str = "nearest",
    sigma_bounds: tuple[float, float] | None = None,
    data_rank: int | None = None,
    path: str | None = None,
    engine: str | None = None,
    capturable: bool = False,
) -> Perturbation:
    """Prepare `model` for Adaptive Layerwise Perturbation (arXiv 2603.19470); nothing changes until the scope is open.

    Args:
        model: any decoder with its layers in a ModuleList: Hugging Face models, PEFT- and FSDP2-wrapped ones, your own.
        sigma: initial standard deviation of the noise, one value for all layers or one for each; > 0. "matched": the size of
            the sampler's mismatch, which `match_sigma` measures on the first batch; the scope does not open before.
        layers: "all", indices of decoder layers (negative ones count from the end), "final" (the decoder's output) or
            "logits" (the model's output; with a fused head see `Perturbation.logit_noise`).
        learnable: whether log_sigma is a parameter. It belongs in its own group: `param_group(lr)`.
        seed: 64-bit seed of the noise. Use the same one on all ranks.
        scale: "rms": sigma is in units of each row's root mean square; or "absolute", as in the paper.
        rounding: "nearest" or "stochastic": how perturbed hidden states are rounded to a 16-bit dtype.
        sigma_bounds: (low, high); sigma is clamped to this range each time the scope opens.
        data_rank: data-parallel rank, which keeps row numbers distinct between ranks; by default torch.distributed's rank
            when the noise is drawn. Ranks that hold the same rows (tensor parallel) must give the same value.
        path: path of the ModuleList, e.g. "model.layers", for models whose structure does not determine it.
        engine: "triton", "native", "reference" or None for the automatic choice.
        capturable: whether kernels read step and row number from the device, so that CUDA graphs can capture perturbed
            forwards: see `Perturbation.perturbed`. Not with torch.compile, `logit_noise` or hidden states in float64.

    Returns:
        The handle: `perturbed(step=...)` opens the scope; `detach()`, or leaving `with attach(...)`, restores the model.

    Raises:
        ValueError: sigma <= 0, a layer index out of range, several lists of layers, a model that is perturbed already.
    """
    where = "attach"
    check_choice(where, "scale", scale, SCALES)
    check_choice(where, "rounding", rounding, ROUNDINGS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model is a {type(model).__name__}; it needs a torch.nn.Module")
    seed = check_integer(where, "seed", seed, 0, MAX_SEED)
    for name, flag in (("learnable", learnable), ("capturable", capturable)):
        check_flag(where, name, flag)
    if path is not None and not isinstance(path, str):
        refuse_type(where, "path", path, 'the name of a ModuleList, such as "model.layers", or None')
    if data_rank is not None:
        data_rank = check_integer(where, "data_rank", data_rank, 0, MAX_RANK)
    if sigma_bounds is not None:
        _check_bounds(sigma_bounds)
    check_name(engine, f"{where}: engine")
    found = find_layers(model, path)
    if found.parent in attached and (other := attached[found.parent]()) is not None and other.is_attached:
        raise ValueError(
            f"attach: {type(model).__name__} is perturbed already; call detach() on its handle or "
            "alp_kernels.detach(model) first"
        )
    if len(set(map(id, found.layers))) < len(found.layers):
        raise ValueError(
            f"attach: {found.path} of {type(model).__name__} holds a layer twice; the two runs cannot be told apart"
        )
    chosen = _choose(model, found.layers, found.parent, layers)
    is_matched = isinstance(sigma, str) and sigma == MATCHED
    values = [_PROBED] * len(chosen) if is_matched else _sigmas(sigma, len(chosen))
    if is_matched and sigma_bounds is not None:
        refuse_value(where, "sigma_bounds", sigma_bounds, "None with sigma='matched'")
    if sigma_bounds is not None and not all(sigma_bounds[0] <= value <= sigma_bounds[1] for value in values):
        refuse_value(where, "sigma", sigma, f"numbers within sigma_bounds={sigma_bounds}")
    device = next(found.layers[0].parameters()).device
    handle = Perturbation(
        chosen,
        found.parent,
        torch.tensor(values, dtype=torch.float64, device=device if device.type != "meta" else "cpu").log().float(),
        learnable=learnable,
        seed=seed,
        scale=scale,
        rounding=rounding,
        sigma_bounds=sigma_bounds,
        data_rank=data_rank,
        engine=engine,
        capturable=capturable,
        needs_match=is_matched,
    )
    attached[found.parent] = weakref.ref(handle)
    return handle


MATCHED = "matched"
_PROBED = 1e-2  # where `match_sigma` begins


def detach(model: nn.Module, path: str | None = None) -> None:
    """Restore `model` without its handle; does nothing if the model is not perturbed. `path` is as in `attach`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"detach: model is a {type(model).__name__}; it needs the torch.nn.Module given to attach")
    parent = find_layers(model, path).parent
    if parent in attached and (handle := attached[parent]()) is not None:
        handle.detach()


_NO_LIST = (str, bytes, bytearray, Mapping, Set)
"""What Python iterates over, but does not hold one value for each layer in order."""


def _check_bounds(bounds: Any) -> None:
    fits = "(low, high) with 0 < low < high"
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        refuse_value("attach", "sigma_bounds", bounds, fits)
    for bound in bounds:
        check_size("attach", "sigma_bounds", bound, f"{fits}: numbers > 0")
    if not bounds[0] < bounds[1]:
        refuse_value("attach", "sigma_bounds", bounds, fits)


def _sigmas(sigma: Any, count: int) -> list[float]:
    """Return sigma as one float for each of `count` layers."""
    fits = "a number > 0, one for each layer, or 'matched' (for no noise, do not open the scope)"
    if isinstance(sigma, Tensor) and sigma.is_meta:
        refuse_value("attach", "sigma", sigma, f"{fits}; this one is on the meta device and holds no values")
    if isinstance(sigma, Tensor | np.ndarray):
        sigma = sigma.reshape(-1).tolist()
    if isinstance(sigma, _NO_LIST) or not (is_number(sigma) or isinstance(sigma, Iterable)):
        refuse_type("attach", "sigma", sigma, fits)
    values = [sigma] if is_number(sigma) else list(sigma)
    for value in values:
        check_size("attach", "sigma", value, fits)
    if len(values) not in (1, count):
        raise ValueError(f"attach: sigma has {len(values)} values; it needs 1 or {count}, one for each perturbed layer")
    return [float(value) for value in values] * (count if len(values) == 1 else 1)


def _choose(
    model: nn.Module, found: list[nn.Module], parent: nn.Module, layers: str | Iterable[int]
) -> dict[int, nn.Module]:
    """Map each layer coordinate to the module whose hook adds the noise."""
    if layers == "all":
        return dict(enumerate(found))
    if layers == "final":
        return {FINAL_LAYER: parent}
    if layers == "logits":
        return {LOGITS_LAYER: model}
    if isinstance(layers, str):
        raise ValueError(f"attach: layers={layers!r}; it needs 'all', 'final', 'logits' or indices")
    if not isinstance(layers, Iterable) or isinstance(layers, _NO_LIST):
        raise TypeError(
            f"attach: layers={layers!r}; it needs 'all', 'final', 'logits' or a list of indices, such as [0]"
        )
    count, indices = len(found), list(layers)
    assert count <= MAX_LAYER
    fits = f"indices in [{-count}, {count}), at least one"
    if not indices:
        refuse_value("attach", "layers", indices, fits)
    indices = [check_integer("attach", "layers", i, -count, count - 1, fits) for i in indices]
    resolved = sorted({i % count for i in indices})
    if len(resolved) != len(indices):
        raise ValueError(f"attach: layers={indices} names a layer twice")
    return {i: found[i] for i in resolved}
