"""Count on a CPU how often a device would make the host wait, and how many small operations a call starts.

The host waits if a value reaches Python and if a shape depends on values. test_gpu.py asks CUDA itself.
"""

import contextlib
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import alp_kernels.engine
import alp_kernels.loss.plan
import alp_kernels.loss.products
import alp_kernels.loss.ragged
from alp_kernels import (
    Head,
    Objective,
    Support,
    attach,
    fused_alp_loss,
    importance_weight,
    linear_logprob,
    policy_loss,
    reference,
)
from alp_kernels.objective import Level
from tests.conftest import DEVICE
from tests.support.batches import make_batch, pack
from tests.support.decoders import VOCAB, Toy
from tests.support.heads import make_head

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="patches what CPU tensors do")

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount")
PRODUCTS = ("mm", "addmm", "addmm_")
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
ENGINE = [name for name, value in vars(reference).items() if callable(value) and "_" in name.strip("_")]


class Counter(TorchDispatchMode):
    """Counts waits, and operations that start work on a device: views and allocations do not, an engine's function is one."""

    def __init__(self):
        super().__init__()
        self.waits, self.operations, self.is_in_engine = [], [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if self.is_in_engine:
            return func(*args, **kwargs)
        if not is_view and name not in FREE:
            self.operations.append(name)
        by_flags = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS or by_flags or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits.append(name)
        return func(*args, **kwargs)

    def before_the_first_product(self):
        return next(i for i, name in enumerate(self.operations) if name in PRODUCTS)

    def small(self):
        return sum(name not in PRODUCTS for name in self.operations)


@contextlib.contextmanager
def counted(monkeypatch):
    """Count as on a device: with an engine like Triton's, and without the code that only CPU tensors take."""
    counter = Counter()

    def launched(function):
        def run(*args, **kwargs):
            counter.operations.append(function.__name__)
            counter.is_in_engine = True
            try:
                return function(*args, **kwargs)
            finally:
                counter.is_in_engine = False

        return run

    def waiting(method):
        def run(tensor):
            counter.waits.append(method.__name__)
            return method(tensor)

        return run

    engine = SimpleNamespace(**vars(reference) | {name: launched(getattr(reference, name)) for name in ENGINE})
    engine.FUSES_TOKEN_LOSS = True
    with monkeypatch.context() as patch:
        patch.setattr(alp_kernels.engine, "_choose", lambda device_type: engine)
        for module in (alp_kernels.loss.plan, alp_kernels.loss.products, alp_kernels.loss.ragged):
            patch.setattr(module, "is_on_host", lambda tensor: False)
        for name in ("tolist", "cpu"):
            patch.setattr(torch.Tensor, name, waiting(getattr(torch.Tensor, name)))
        with counter:
            yield counter


def make_inputs(dtype=torch.float32):
    """hidden and weight of `dtype`, targets, and the rest of a padded batch in float32."""
    hidden, weight, targets, rest = make_head(0, 4, 16, channels=8, vocab=64, dtype=dtype)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    return hidden.requires_grad_(), weight.requires_grad_(), targets, rest


def make_packed():
    hidden, weight, targets, rest = make_inputs()
    packed, keep = pack({**rest, "logp": rest["rollout_logp"]})
    del packed["logp"]
    return hidden.detach().flatten(0, 1)[keep].requires_grad_(), weight, targets.flatten()[keep], packed


EXTRAS = {
    "plain": ({}, {}),
    "counts": ({}, {"num_tokens": 40, "num_sequences": 4}),
    "temperature": ({}, {"temperature": torch.tensor(0.7)}),
    "masked": ({}, {"nonfinite": "mask"}),
    "penalties": ({"kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.1}, {}),
    "weights": ({"denominator": "old", "weight": "mask", "weight_level": "sequence"}, {}),
    "means": ({"aggregation": "seq-mean-token-mean"}, {}),
}


@pytest.mark.parametrize("level", get_args(Level))
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_fused_loss_waits_once(level, extra, monkeypatch):
    of_objective, options = EXTRAS[extra]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, weight, targets, rest = make_inputs(dtype)
        with counted(monkeypatch) as counter:
            out = fused_alp_loss(hidden, weight, targets, **rest, objective=Objective(level, **of_objective), **options)
            out.loss.backward()
        assert counter.waits == ["tolist"]


@pytest.mark.parametrize("level", get_args(Level))
def test_a_packed_batch_waits_once_and_twice_where_sequences_have_to_be_counted(level, monkeypatch):
    hidden, weight, targets, packed = make_packed()
    with counted(monkeypatch) as counter:
        fused_alp_loss(hidden, weight, targets, **packed, objective=Objective(level)).loss.backward()
    assert counter.waits == ["tolist"]
    lengths = packed.pop("cu_seqlens").diff()
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    with counted(monkeypatch) as counter:
        fused_alp_loss(hidden, weight, targets, **packed, sequence_ids=ids, objective=Objective(level)).loss.backward()
    assert counter.waits == ["tolist", "tolist"]


@pytest.mark.parametrize("level", get_args(Level))
def test_a_loss_of_log_probabilities_waits_once(level, monkeypatch):
    b = make_batch(0)
    logp = b.pop("logp").requires_grad_()
    with counted(monkeypatch) as counter:
        policy_loss(logp, **b, objective=Objective(level, kl="k1", kl_coef=0.1)).loss.backward()
    assert counter.waits == ["tolist"]
    with counted(monkeypatch) as counter:
        importance_weight(b["old_logp"], b["rollout_logp"], b["mask"], objective=Objective.preset("mis"))
    assert counter.waits == ["tolist"]


@pytest.mark.parametrize("is_packed", [False, True])
def test_versions_wait_for_nothing(is_packed, monkeypatch):
    b = make_batch(0)
    b = pack(b)[0] if is_packed else b
    stats = policy_loss(**b, objective=Objective("sequence")).stats
    of_token = torch.zeros(b["mask"].shape, dtype=torch.int64)
    with counted(monkeypatch) as counter:
        aged = [stats.with_versions(versions, 3) for versions in (of_token, torch.zeros(4, dtype=torch.int64))]
    assert counter.waits == [] and len(counter.operations) > 0
    assert all(list(each.by_age()) == [3] for each in aged)


@pytest.mark.parametrize("is_masked", [True, False])
def test_log_probabilities_wait_once(is_masked, monkeypatch):
    hidden, weight, targets, rest = make_inputs()
    with counted(monkeypatch) as counter:
        logp, entropy = linear_logprob(hidden, weight, targets, mask=rest["mask"] if is_masked else None)
        (logp.sum() + entropy.sum()).backward()
    assert counter.waits == ["tolist"]


@pytest.mark.parametrize("level", get_args(Level))
def test_a_head_over_a_support_waits_once(level, monkeypatch):
    hidden, weight, targets, rest = make_inputs()
    support = Support.from_padded(torch.stack([targets, (targets + 1) % len(weight)], dim=-1))
    with counted(monkeypatch) as counter:
        head = Head(weight, support=support)
        fused_alp_loss(hidden, head, targets, **rest, objective=Objective(level)).loss.backward()
    assert counter.waits == ["tolist"]
    with counted(monkeypatch) as counter:
        linear_logprob(hidden, head, targets, mask=rest["mask"])[0].sum().backward()
    assert counter.waits == ["tolist"]


@pytest.mark.parametrize("scale", ["absolute", "rms"])
def test_the_noise_never_waits(scale, monkeypatch):
    model, tokens = Toy(), torch.arange(8).view(2, 4) % VOCAB
    with attach(model, scale=scale) as handle, counted(monkeypatch) as counter:
        for step in range(2):
            with handle.perturbed(step=step):
                model(tokens).square().sum().backward()
    assert counter.waits == []
    assert handle.log_sigma.grad.abs().min() > 0


def test_small_operations_of_a_token_level_loss(monkeypatch):
    hidden, weight, targets, rest = make_inputs()
    given = {name: rest[name] for name in ("rollout_logp", "advantages", "mask")}
    with counted(monkeypatch) as counter:
        fused_alp_loss(hidden, weight, targets, **given, objective=Objective.preset("alp-token")).loss.backward()
    assert counter.operations.count("head_token_loss") == 1
    assert counter.before_the_first_product() <= 20
    assert counter.small() <= 60
