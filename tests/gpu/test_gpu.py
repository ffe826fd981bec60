"""On a GPU: real shapes against float64, repeatable bits, streams, graphs, strides, and the decoder's noise.

Tests that need no CUDA also run in Triton's interpreter (TRITON_INTERPRET=1), at small shapes.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from alp_kernels import LogitNoise, Objective, attach, fused_alp_loss, linear_logprob, perturb, perturb_rms_norm
from alp_kernels.stream import Stream
from bench import counts
from tests.conftest import DEVICE
from tests.support.gpu_kernels_once import OPS, all_kernels, launched

HAS_CUDA = DEVICE.type == "cuda"
HERE = {"seed": 7, "step": 3, "layer": 2}
HALF = (torch.bfloat16, torch.float16)
N, D, V = (4096, 1536, 50257) if HAS_CUDA else (6, 48, 203)

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs CUDA")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def log_sigma(value: float = -2.0) -> Tensor:
    return torch.tensor(value, device=DEVICE)


# ------------------------------------------------------------------ against float64


@pytest.mark.parametrize("op", OPS)
def test_kernels_agree_with_float64_at_odd_shapes(op):
    OPS[op]()


@needs_cuda
@pytest.mark.parametrize("op", [op for op in OPS if op != "philox"])
def test_kernels_agree_with_float64_at_real_shapes(op):
    OPS[op]([(6, 151936)] if op.startswith("head") else [(64, 4096), (48, 1536), (16, 8192)])


def test_every_kernel_has_an_op_that_launches_it():
    with launched() as names:
        for function in OPS.values():
            function([(2, 130)])
    assert names == all_kernels()


# ------------------------------------------------------------------ waits


@needs_cuda
def test_the_host_waits_no_more_often_than_test_syncs_counts():
    for what, call in counts.calls(counts.make_sample(DEVICE, smoke=True)):
        found = counts.waits(call)
        assert found.total() <= (2 if "sequence_ids" in what else 1), f"{what}: {found}"


# ------------------------------------------------------------------ bits repeat


def noisy(dtype: torch.dtype) -> list[Tensor]:
    leaves = [draw(N, D, dtype=dtype).requires_grad_(), log_sigma().requires_grad_()]
    u = perturb(*leaves, **HERE, scale="rms", rounding="stochastic", engine="triton")
    return [u.detach(), *torch.autograd.grad(u, leaves, draw(N, D, dtype=dtype, seed=1))]


def noisy_and_normed(dtype: torch.dtype) -> list[Tensor]:
    leaves = [draw(N, D, dtype=dtype), draw(D, dtype=dtype, seed=2), log_sigma()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    u, y = perturb_rms_norm(*leaves, **HERE, engine="triton")
    grads = torch.autograd.grad((u, y), leaves, (draw(N, D, dtype=dtype, seed=3), draw(N, D, dtype=dtype, seed=4)))
    return [u.detach(), y.detach(), *grads]


def batch(dtype: torch.dtype, sequences: int = 2) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """hidden (B, T, D) and weight (V, D) as leaves; targets, rollout_logp, advantages and a mask with gaps."""
    length = N // sequences
    leaves = [draw(sequences, length, D, dtype=dtype), (draw(V, D, seed=1) * D**-0.5).to(dtype)]
    generator = torch.Generator(DEVICE).manual_seed(2)
    targets = torch.randint(V, (sequences, length), generator=generator, device=DEVICE)
    with torch.no_grad():
        logp, _ = linear_logprob(*leaves, targets, engine="triton")
    advantages = torch.linspace(1.0, -0.5, sequences, device=DEVICE)
    mask = (torch.arange(length, device=DEVICE) % 5 != 0).float().expand(sequences, length)
    rollout_logp = logp + 0.2 * length**-0.5 * draw(sequences, length, seed=3)
    return [leaf.requires_grad_() for leaf in leaves], (targets, rollout_logp, advantages, mask)


def policy_gradients(level: str, dtype: torch.dtype, **options: object) -> list[Tensor]:
    leaves, rest = batch(dtype)
    sigma = log_sigma().requires_grad_()
    logit_noise = LogitNoise(sigma, **{k: HERE[k] for k in ("seed", "step")})
    out = fused_alp_loss(
        *leaves, *rest, objective=Objective(level), logit_noise=logit_noise, **options, engine="triton"
    )
    return [out.loss.detach(), out.logp, out.entropy, *torch.autograd.grad(out.loss, (*leaves, sigma))]


CALLS = {
    "perturb": noisy,
    "perturb_rms_norm": noisy_and_normed,
    "token": functools.partial(policy_gradients, "token"),
    "sequence": functools.partial(policy_gradients, "sequence"),
    # chunks of a fifth of the rows: sums over chunks, and a sequence with logits computed twice
    "token, chunks": functools.partial(policy_gradients, "token", chunk_bytes=N * V * 2 // 5),
    "sequence, chunks": functools.partial(policy_gradients, "sequence", chunk_bytes=N * V * 2 // 5),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_second_run_repeats_every_bit(call, dtype):
    first = CALLS[call](dtype)
    elsewhere = torch.full((3 * N, D), torch.nan, device=DEVICE)  # other addresses, and freed memory that is not zero
    second = CALLS[call](dtype)
    del elsewhere
    for one, two in zip(first, second, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, two)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_chunks_change_results_by_rounding_alone(dtype, level):
    """On CUDA, 16-bit chunks are multiplied and added into a float32 sum."""
    whole = policy_gradients(level, dtype)
    parts = policy_gradients(level, dtype, chunk_bytes=N * V * dtype.itemsize // 7)
    rounding = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for one, two in zip(whole, parts, strict=True):
        error = float((one.double() - two.double()).norm() / one.double().norm())
        assert error < rounding * (1 if one.dim() else 10)  # scalars are sums over the batch, whose terms cancel


# ------------------------------------------------------------------ strides


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_strided_tensors_give_the_bits_of_contiguous_ones(dtype):
    wide = draw(D, 2 * N, dtype=dtype)
    views = wide.t()[::2], draw(3, D, dtype=dtype, seed=1)[1], draw(N, 2 * D, dtype=dtype, seed=2)[:, ::2]

    def results(h: Tensor, weight: Tensor, du: Tensor) -> list[Tensor]:
        found = []
        for function, leaves in ((perturb, [h, log_sigma()]), (perturb_rms_norm, [h, weight, log_sigma()])):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            outputs = function(*leaves, **HERE, engine="triton")
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            found += [*outputs, *torch.autograd.grad(outputs, leaves, [du] * len(outputs))]
        return found

    assert not views[0].is_contiguous() and not views[2].is_contiguous()
    for one, two in zip(results(*views), results(*(view.contiguous() for view in views)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_strided_batch_gives_the_loss_of_a_contiguous_one(level):
    leaves, rest = batch(torch.bfloat16)
    spread = [x.detach().repeat_interleave(2, dim=-1)[..., ::2] for x in (*leaves, *rest)]
    out, strided = (
        fused_alp_loss(*inputs, objective=Objective(level), engine="triton") for inputs in ((*leaves, *rest), spread)
    )
    torch.testing.assert_close(strided.loss, out.loss.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(strided.logp, out.logp, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ streams, graphs, devices


@needs_cuda
@pytest.mark.parametrize("call", CALLS)
def test_kernels_run_on_the_current_stream(call):
    expected = CALLS[call](torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # noise drawn after it is not there yet for any other stream
        found = CALLS[call](torch.bfloat16)
    side.synchronize()
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@needs_cuda
@pytest.mark.parametrize("scale", ["absolute", "rms"])
def test_perturb_is_captured_in_a_graph_and_replayed(scale):
    from alp_kernels.triton import engine

    stream, sigma = Stream(**HERE), torch.tensor(0.3, device=DEVICE)
    h = draw(N, D, dtype=torch.bfloat16)
    engine.perturb_fwd(h, sigma, stream, scale, "nearest")  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, _ = engine.perturb_fwd(h, sigma, stream, scale, "nearest")
        second, _ = engine.perturb_fwd(first, sigma, stream._replace(layer=5), scale, "nearest")
    for seed in (1, 2):
        h.copy_(draw(N, D, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        u, _ = engine.perturb_fwd(h, sigma, stream, scale, "nearest")
        assert torch.equal(first, u)
        assert torch.equal(second, engine.perturb_fwd(u, sigma, stream._replace(layer=5), scale, "nearest")[0])


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_are_served_there():
    h = draw(64, 130, dtype=torch.bfloat16)
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    u = perturb(h.to(other), log_sigma().to(other), **HERE, engine="triton")
    assert u.device == other
    assert torch.equal(u.cpu(), perturb(h, log_sigma(), **HERE, engine="triton").cpu())


# ------------------------------------------------------------------ a decoder


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpointed_decoder_on_the_device_meets_the_same_noise(dtype, reentrant):
    from tests.support.decoders import VOCAB, Toy

    found = []
    for kind in (None, reentrant):
        model = Toy(kind).to(DEVICE, dtype)
        handle = attach(model, sigma=0.1, scale="absolute", engine="triton")
        tokens = torch.arange(40, device=DEVICE).view(2, 20) % VOCAB
        with handle.perturbed(step=3):
            out = model(tokens)
            out.float().square().mean().backward()
        found.append([out.detach(), handle.log_sigma.grad, *(p.grad for p in model.blocks.parameters())])
    for one, two in zip(*found, strict=True):
        assert float(one.abs().max()) > 0
        assert torch.equal(one, two)
