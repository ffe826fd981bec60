"""Which experts a mixture of experts chooses, and how many of its choices the noise changes.

Every perturbed layer moves the input of the routers above it, so tokens near a router's boundary change experts.

An MoE block is found by structure: a module inside a decoder layer, one child of which holds the experts: a ModuleList of
equal modules, parameters with the experts on the first of three axes, or flat ones beside an attribute with their number. The
router is the child beside them that returns, for each token, the indices of its experts. If none does, the indices are those
that the experts are called with, or those of the largest scores where one child returns a score for every expert.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_local, refuse_type, refuse_value
from .find import DecoderLayers, find_layers
from .forwards import in_backward

logger = logging.getLogger("alp_kernels")

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts."""

_TOP_K = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k")
"""What configurations and modules call a token's number of experts."""

_WHERE = "record_routing"


class LayerChanges(NamedTuple):
    """One MoE block's changes."""

    changed_frac: float
    overlap: float


class RoutingChanges(NamedTuple):
    """How the experts of the same tokens differ between two forwards."""

    num_tokens: int
    changed_frac: float
    """Share of (token, layer) pairs whose set of experts differs."""
    tokens_changed_frac: float
    """Share of tokens whose set of experts differs in any layer."""
    overlap: float
    """Share of a token's experts that are chosen in both forwards, mean over tokens and layers."""
    layers: dict[str, LayerChanges]
    """The same by MoE block, under its path in the model."""


class RouterNotRecognised(ValueError):
    """The model has experts, but which of them a token is sent to cannot be seen."""


class Routing:
    """What `record_routing` recorded. `experts` is empty inside the scope, and after it if the model has no router."""

    def __init__(self) -> None:
        self.experts: dict[str, Tensor] = {}
        """(N, k) int32 for each MoE block, under its path: the experts of each row, over all forwards of the scope."""
        self.not_recognised: RouterNotRecognised | None = None
        """Why nothing was recorded of a model that has experts."""

    def changes(self, other: Routing, mask: Tensor | None = None) -> RoutingChanges | None:
        """Compare with the routing of the same tokens in another scope; None if the model has no router.

        mask: bool or 0 and 1, in the shape and order of the positions that the layers read: which tokens count; by default
            all. Waits for the device.

        Raises:
            RouterNotRecognised: the model has experts, but nothing shows which of them its tokens are sent to.
            ValueError: the scopes recorded other layers or other numbers of rows, or the mask does not fit.
        """
        where = "changes"
        if not isinstance(other, Routing):
            refuse_type(where, "other", other, "what another record_routing(model) yielded")
        for routing in (self, other):
            if routing.not_recognised is not None:
                raise routing.not_recognised
        if self.experts.keys() != other.experts.keys():
            lone = ", ".join(sorted(self.experts.keys() ^ other.experts.keys()))
            raise ValueError(
                f"{where}: only one of the two scopes recorded {lone}; both need the same model and layers"
            )
        if not self.experts:
            return None
        keep = None if mask is None else _check_mask(where, mask)
        differs: list[Tensor] = []
        shared: list[Tensor] = []
        for path, own in self.experts.items():
            others = other.experts[path]
            if own.shape != others.shape:
                raise ValueError(
                    f"{where}: {path} recorded experts {tuple(own.shape)} and {tuple(others.shape)}; both scopes need the same "
                    "tokens"
                )
            if keep is not None and len(keep) != len(own):
                raise ValueError(
                    f"{where}: mask has {len(keep)} values; it needs {len(own)}, one for each row that {path} read in the scope"
                )
            if keep is not None:
                own, others = own[keep.to(own.device)], others[keep.to(own.device)]
            is_shared = (own[:, :, None] == others[:, None, :]).any(-1)
            differs.append(~is_shared.all(-1))
            shared.append(is_shared.double().mean(-1))
        if len({len(rows) for rows in differs}) > 1:
            raise ValueError(f"{where}: the layers read different numbers of rows, so tokens cannot be told apart")
        changed, overlap = torch.stack([rows.cpu() for rows in differs]), torch.stack([rows.cpu() for rows in shared])
        num_tokens = changed.shape[1]
        over = max(num_tokens, 1)
        by_layer = zip(self.experts, changed.sum(1).tolist(), overlap.sum(1).tolist(), strict=True)
        return RoutingChanges(
            num_tokens,
            float(changed.sum()) / (over * len(changed)),
            float(changed.any(0).sum()) / over,
            float(overlap.sum()) / (over * len(changed)),
            {path: LayerChanges(of_changed / over, of_overlap / over) for path, of_changed, of_overlap in by_layer},
        )


@contextlib.contextmanager
def record_routing(model: nn.Module, path: str | None = None) -> Iterator[Routing]:
    """Record the experts of each token in the forwards inside the scope, by hooks that the scope's end removes.

        with torch.no_grad():
            with record_routing(model) as clean:
                model(tokens)
            with handle.perturbed(step=0), record_routing(model) as noisy:
                model(tokens)
        print(clean.changes(noisy))

    Layers that backward recomputes are not recorded again. Compiled forwards run eagerly inside the scope. A model that
    routes at random in training (router jitter) needs `model.eval()`. A model without experts records nothing. So does one
    whose routers are not recognised: it logs why, once, and `Routing.changes` raises RouterNotRecognised.

    Args:
        model: as for `attach`; it may be perturbed, and its noise may be on.
        path: of the ModuleList of decoder layers, as for `attach`.

    Raises:
        RuntimeError: at the end: the model has experts, but none of its layers ran inside the scope.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHERE}: model is a {type(model).__name__}; it needs a torch.nn.Module")
    if path is not None and not isinstance(path, str):
        refuse_type(_WHERE, "path", path, 'the name of a ModuleList, such as "model.layers", or None')
    found = find_layers(model, path, _WHERE)
    configs = _configs(found.parent, model)
    counts = {n for config in configs for n in _declared(config)}
    blocks = _find_blocks(found, counts, configs)
    routing, removables = Routing(), [removable for block in blocks for removable in block.watch()]
    ran: list[bool] = []
    removables += [layer.register_forward_pre_hook(lambda *_: ran.append(True)) for layer in found.layers]
    try:
        with _eagerly():
            yield routing
    finally:
        for removable in removables:
            removable.remove()
    if blocks and not ran and not any(block.ran for block in blocks):
        raise RuntimeError(
            f"{_WHERE}: no layer of {found.path} ran inside the scope; the forward of this model must run inside it"
        )
    try:
        routing.experts = _experts_chosen(blocks, model, counts)
    except RouterNotRecognised as error:
        routing.not_recognised = error
        _say_once(str(error))


def _experts_chosen(blocks: list[_Block], model: nn.Module, counts: set[int]) -> dict[str, Tensor]:
    """Return the experts recorded by the blocks; raise where the config, which has `counts` experts, promises more."""
    if counts and not blocks:
        raise RouterNotRecognised(
            f"{_WHERE}: the config of {type(model).__name__} has {' or '.join(map(str, sorted(counts)))} experts, but none of "
            "its decoder layers holds as many beside a router; if all are dense, there is nothing to record"
        )
    found = {block.path: block.experts_chosen() for block in blocks if block.ran}
    missing = [block for block in blocks if block.ran and found[block.path] is None]
    if counts and missing:
        raise RouterNotRecognised(
            f"{_WHERE}: {missing[0].path} holds {missing[0].num_experts} experts, but nothing in it returns the experts of each "
            "token"
        )
    return {path: experts for path, experts in found.items() if experts is not None}


@functools.cache
def _say_once(text: str) -> None:
    logger.warning(text)


def _check_mask(where: str, mask: Any) -> Tensor:
    """Return the mask as flat bools."""
    mask, fits = check_local(where, "mask", mask), "bools, or zeros and ones"
    if mask.is_meta or not bool(((mask == 0) | (mask == 1)).all()):
        refuse_value(where, "mask", mask, fits)
    return mask.reshape(-1).bool()


class _Block:
    """An MoE block, and what its children returned in the scope."""

    def __init__(self, path: str, module: nn.Module, experts: list[nn.Module], num_experts: int, configs: list[Any]):
        self.path, self.module, self.experts = path, module, experts
        self.num_experts, self.configs = num_experts, configs
        self.ran = False
        # by the child's name, one tensor a forward: the children's indices, those given to the experts, and the largest scores'
        self.returned: dict[str, list[Tensor]] = {}
        self.given: dict[str, list[Tensor]] = {}
        self.largest: dict[str, list[Tensor]] = {}

    def watch(self) -> list[Any]:
        removables: list[Any] = []
        for name, child in self.module.named_children():
            if any(child is experts for experts in self.experts):
                removables.append(child.register_forward_pre_hook(self._watch_experts(name), with_kwargs=True))
            else:
                removables.append(child.register_forward_hook(self._watch_child(name, child), with_kwargs=True))
        return removables

    def experts_chosen(self) -> Tensor | None:
        """(N, k) int32; None if nothing was recognised."""
        for found in (self.returned, self.given, self.largest):
            if len(found) > 1:
                raise RouterNotRecognised(
                    f"{_WHERE}: {' and '.join(found)} of {self.path} all look like its router; they return "
                    f"{'scores of all experts' if found is self.largest else 'indices'} for each token"
                )
            if found:
                if found is self.largest:
                    self._check_scores(next(iter(found)))
                return torch.cat(next(iter(found.values())))
        return None

    def _check_scores(self, name: str) -> None:
        """Raise if the block adds something to the router's scores before it chooses."""
        router = self.module.get_submodule(name)
        ignored = {id(t) for m in (router, *self.experts) for t in (*m.parameters(), *m.buffers())}
        for of_block, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
            if id(tensor) not in ignored and tensor.numel() == self.num_experts:
                raise RouterNotRecognised(
                    f"{_WHERE}: {self.path}.{name} returns scores, but {of_block} may change which are chosen; it needs a router "
                    "that returns the indices it chose"
                )

    def _watch_child(self, name: str, child: nn.Module) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if in_backward():
                return
            self.ran = True
            num_rows = _num_rows((*args, *kwargs.values()))
            tensors = _tensors(output)
            for tensor in tensors:
                if _are_indices(tensor, num_rows, self.num_experts):
                    self.returned.setdefault(name, []).append(tensor.flatten(0, -2).to(torch.int32, copy=True))
                    return
            k = _top_k(child, self.module, *self.configs)
            scores = next((t for t in tensors if _are_scores(t, num_rows, self.num_experts)), None)
            if scores is not None and k is not None:
                self.largest.setdefault(name, []).append(scores.detach().flatten(0, -2).topk(k, dim=-1).indices.int())

        return record

    def _watch_experts(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if in_backward():
                return
            self.ran = True
            inputs = (*args, *kwargs.values())
            for tensor in _tensors(inputs):
                if _are_indices(tensor, _num_rows(inputs), self.num_experts):
                    self.given.setdefault(name, []).append(tensor.flatten(0, -2).to(torch.int32, copy=True))
                    return

        return record


def _configs(*modules: nn.Module) -> list[Any]:
    """Return the first config, and the configs that it holds; none of a model whose config says that it has no experts."""
    config = next((c for m in modules if (c := getattr(m, "config", None)) is not None), None)
    if config is None or not getattr(config, "is_moe", True):
        return []
    return [config, *(part for part in getattr(config, "__dict__", {}).values() if hasattr(part, "to_dict"))]


def _declared(holder: Any) -> set[int]:
    """Return the numbers of experts that a config or a module has as attributes."""
    found = (getattr(holder, name, None) for name in _NUM_EXPERTS)
    return {n for n in found if isinstance(n, int) and n > 1}


def _find_blocks(found: DecoderLayers, counts: set[int], configs: list[Any]) -> list[_Block]:
    """Return the MoE blocks inside the layers: modules that hold experts, of a number in `counts` if there are any."""
    blocks: list[_Block] = []
    seen: set[nn.Module] = set()  # blocks, and what lies inside their experts
    for i, layer in enumerate(found.layers):
        for path, module in layer.named_modules(prefix=f"{found.path}.{i}"):
            sizes = {child: _num_experts(child) for child in module.children()}
            experts = {child: max(n) for child, n in sizes.items() if n and (n & counts or not counts)}
            if experts and len(experts) < len(sizes) and module not in seen:
                seen.update([module], *(child.modules() for child in experts))
                blocks.append(_Block(path, module, list(experts), max(experts.values()), configs))
    return blocks


def _num_experts(module: nn.Module) -> set[int]:
    """Return how many experts' weights `module` holds, which may be several numbers; empty if it holds none."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):  # PEFT's wrappers
        module = inner
    if isinstance(module, nn.ModuleList):
        shapes = [[p.shape for p in expert.parameters()] for expert in module]
        weighty = [shape for shape in shapes if shape]  # experts of zero computation have no weights
        return {len(module), len(weighty)} if len(weighty) > 1 and all(s == weighty[0] for s in weighty) else set()
    if isinstance(module, nn.modules.conv._ConvNd):
        return set()
    stacked = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1}
    if stacked:
        return stacked
    lengths = {p.shape[0] for p in module.parameters() if p.ndim > 1}
    return {n for n in _declared(module) if lengths and all(m > n and m % n == 0 for m in lengths)}


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in (values if isinstance(values, tuple | list) else [values]) if isinstance(v, Tensor)]


def _num_rows(inputs: Any) -> int:
    hidden = next((t for t in _tensors(inputs) if t.is_floating_point() and t.ndim > 1), None)
    return 0 if hidden is None else hidden.numel() // max(hidden.shape[-1], 1)


def _are_indices(tensor: Tensor, num_rows: int, num_experts: int) -> bool:
    """Whether a tensor may hold the experts of each of `num_rows` tokens, (..., k)."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim < 2:
        return False
    k = tensor.shape[-1]
    return 0 < k <= num_experts and tensor.numel() == num_rows * k


def _are_scores(tensor: Tensor, num_rows: int, num_experts: int) -> bool:
    """Whether a tensor may hold a score of each of the experts for each of `num_rows` tokens."""
    is_wide = tensor.ndim > 1 and tensor.shape[-1] == num_experts
    return tensor.is_floating_point() and is_wide and tensor.numel() == num_rows * num_experts


def _top_k(*holders: Any) -> int | None:
    found = (getattr(holder, name, None) for holder in holders for name in _TOP_K)
    return next((k for k in found if isinstance(k, int)), None)


def _eagerly() -> Any:
    """Return a scope in which compiled forwards run eagerly: their graphs do not run hooks that they were not traced with."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
