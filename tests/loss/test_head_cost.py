"""The cost of the fused head: the number of matrix products, and one chunk of logits in memory at a time."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alp_kernels import Objective, fused_alp_loss, linear_logprob, reference
from alp_kernels.engine import why_not
from alp_kernels.loss import plan as plans
from alp_kernels.loss.plan import Needs, even_sizes
from tests.conftest import DEVICE
from tests.support.heads import LEVELS, make_head
from tests.support.multiplications import Multiplications


def products(level, chunk_rows, mask=None, advantages=None):
    """Count the N x V x D products of a loss with its gradients."""
    num_rows, channels, vocab = 64, 8, 512
    hidden, weight, targets, rest = make_head(0, 4, 16, channels, vocab, torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    rest["mask"] = torch.ones(4, 16) if mask is None else mask
    rest["advantages"] = torch.ones(4) if advantages is None else advantages
    objective = Objective(level, clip_high=1e9)  # nothing clipped
    with Multiplications() as counter:
        loss = fused_alp_loss(
            hidden.requires_grad_(), weight.requires_grad_(), targets, **rest, objective=objective,
            chunk_bytes=chunk_rows * vocab * 4,
        ).loss  # fmt: skip
        loss.backward()
    return counter.count / (num_rows * vocab * channels)


@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_gradients_take_three_products(level):
    assert products(level, 64) == 3
    assert products(level, 16) == 3  # one sequence a chunk
    assert products(level, 5) == (3 if level == "token" else 3 + 15 / 16)  # a sequence's last row takes one pass


@pytest.mark.parametrize("level", LEVELS)
def test_rows_without_a_gradient_save_their_products(level):
    half = torch.ones(4, 16)
    half[:, ::2] = 0
    assert products(level, 16, mask=half) == 1.5
    assert products(level, 16, advantages=torch.tensor([1.0, 0.0, 0.0, 1.0])) == 1 + 2 * 0.5
    assert products(level, 16, mask=torch.zeros(4, 16)) == 0


def test_clipped_rows_save_their_backward_products():
    hidden, weight, targets, rest = make_head(0, 4, 16, 8, 512, torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    rest |= {"mask": torch.ones(4, 16), "advantages": torch.ones(4)}
    logp, _ = linear_logprob(hidden, weight, targets)
    rest["rollout_logp"] = logp.clone()
    rest["rollout_logp"][:, :4] -= 3.0  # ratio e^3 beyond 1 + clip_high
    with Multiplications() as counter:
        fused_alp_loss(
            hidden.requires_grad_(), weight.requires_grad_(), targets, **rest, objective=Objective(), engine="reference"
        ).loss.backward()
    assert counter.count == 64 * 512 * 8 * (1 + 2 * 0.75)


@pytest.mark.parametrize("level", LEVELS)
def test_one_chunk_of_logits_is_alive_at_a_time(level):
    hidden, weight, targets, rest = make_head(0, 4, 64, channels=8, vocab=512, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    rooms, num_chunks = {}, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal num_chunks
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 512:
                assert out.shape[0] <= 16
                if func is torch.ops.aten.mm.out:
                    num_chunks += 1
                    room = out.untyped_storage()
                    rooms.setdefault(room.data_ptr(), weakref.ref(room))
                    assert room.nbytes() <= 16 * 512 * 4
                    assert sum(ref() is not None for ref in rooms.values()) == 1, "the chunk before is still in memory"
            return out

    with Watch():
        fused_alp_loss(
            hidden.requires_grad_(), weight, targets, **rest, objective=Objective(level), chunk_bytes=16 * 512 * 4,
            engine="reference",
        ).loss.backward()  # fmt: skip
    assert num_chunks >= 4
    assert level != "token" or len(rooms) == 1, "chunks that are filled alike take the first one's memory again"


@pytest.mark.parametrize("num_rows", [1, 8192, 8193, 8704, 8705, 20000, 65536])
def test_chunks_on_a_device_are_multiples_of_256_rows(num_rows):
    sizes = even_sizes(num_rows, 8704, 8704)
    assert sum(sizes) == num_rows and len(sizes) == -(-num_rows // 8704)
    assert all(size % 256 == 0 for size in sizes[:-1]) and max(sizes) <= 8704
    assert max(sizes) - sizes[-1] < 256 * len(sizes)


@pytest.mark.parametrize(
    ("vocab", "channels", "dtype", "num_rows"),
    [
        (151936, 1536, torch.bfloat16, 8704),
        (151936, 8192, torch.bfloat16, 16384),  # as much memory as a float32 dW
        (151936, 8192, torch.float16, 8704),  # which float16 needs in any case
        (151936, 1536, torch.float32, 4352),
        (32000, 1536, torch.bfloat16, 41728),
    ],
)
def test_the_default_chunk_of_a_device(vocab, channels, dtype, num_rows):
    hidden, weight = (torch.empty(size, channels, dtype=dtype, device="meta") for size in (1, vocab))
    for chunk_bytes, expected in (
        (None, num_rows),
        (100 * vocab * dtype.itemsize, 100),
        (700 * vocab * dtype.itemsize, 512),
    ):
        transform, needs = reference.LogitTransform(), Needs(weight=True)
        plan = plans.make_plan(reference, transform, torch.zeros(1), hidden, weight, chunk_bytes, needs, None)
        assert plan.chunk_rows == plan.first_rows == expected


@pytest.mark.skipif(why_not("native", DEVICE) is not None, reason="needs the native engine")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("num_rows", "room"), [(24, 0), (48, 24 * 20000)])
def test_the_first_chunk_of_logits_lies_in_the_memory_of_dweight(level, num_rows, room, monkeypatch):
    """With D = 24 channels, 24 rows need only two tiles' memory for logits, and 48 rows the memory of 24 more."""
    channels, vocab = 24, 20000
    hidden, weight, targets, rest = make_head(0, num_rows // 4, 4, channels, vocab, torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    rest |= {"mask": torch.ones_like(rest["mask"]), "advantages": torch.ones_like(rest["advantages"])}
    monkeypatch.setattr(plans, "CPU_CHUNK_BYTES", room * 4 or 1)
    sizes = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != weight.data_ptr():
                storage = out.untyped_storage()
                sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), storage.nbytes() // 4)
            return out

    with Watch():
        fused_alp_loss(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            **rest,
            objective=Objective(level),
            engine="native",
        ).loss.backward()
    large = sorted(size for size in sizes.values() if size > 24 * 4096)
    assert large == sorted(size for size in (room, vocab * channels) if size)
