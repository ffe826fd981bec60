"""torch.compile: operators match their fakes, and a compiled model is perturbed like the eager one at every call."""

import copy
import functools
import math
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from alp_kernels import (
    Head,
    LogitNoise,
    Objective,
    Stats,
    attach,
    fused_alp_loss,
    linear_logprob,
    normal,
    perturb,
    perturb_rms_norm,
    policy_loss,
)
from alp_kernels.engine import why_not
from alp_kernels.loss.arguments import HeadInputs
from alp_kernels.loss.inputs import LossInputs
from alp_kernels.loss.operators import Wire
from alp_kernels.noise.operators import NO_LISTENER
from alp_kernels.operators import integers
from alp_kernels.stream import FINAL_LAYER
from tests.support.batches import make_batch
from tests.support.compare import assert_same_sums
from tests.support.decoders import (
    LENGTH,
    Block,
    Toy,
    all_gradients,
    assert_equal_gradients,
    ids,
    in_float64,
    make_model,
)

EAGER = {"backend": "aot_eager", "fullgraph": True}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a C++ compiler on the CPU"
)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


class Decoder(Toy):
    """A Toy whose layers Dynamo traces; it skips those of nn.Sequential."""

    def __init__(self, reentrant=None):
        super().__init__(reentrant)
        self.blocks = nn.ModuleList(Block() for _ in range(3))


# ------------------------------------------------------------------ the operators

AT, PLACE = integers(NO_LISTENER, 2**63 + 5, 3, 10, 0), integers(1, 4)


@pytest.mark.parametrize("scale", ["absolute", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_perturb_is_a_sound_operator(scale, dtype):
    hidden = torch.randn(3, 2, 8, dtype=dtype).transpose(0, 1).requires_grad_()
    log_sigma = torch.full((3,), -1.0, requires_grad=True)
    for row_ids in (None, torch.arange(6) * 3):
        arguments = (hidden, log_sigma, AT, PLACE, row_ids, scale, "nearest", None)
        torch.library.opcheck(torch.ops.alp_kernels.perturb.default, arguments)


def test_the_small_operators_are_sound():
    du, sigma, rms = torch.randn(6, 8), torch.tensor(0.3), torch.rand(6)
    operators = torch.ops.alp_kernels
    for size in (rms, rms[:0]):
        torch.library.opcheck(operators.perturb_backward.default, (du, sigma, size, AT, PLACE, None, 3, None))
    torch.library.opcheck(operators.coordinates.default, (torch.tensor(3), torch.tensor(4), 2**60, 1))
    toy = Toy()
    handle = attach(toy)
    with handle.perturbed(step=0):
        torch.library.opcheck(operators.begin.default, (handle.forwards._order,))
        torch.library.opcheck(operators.finish.default, (handle.forwards._order, torch.randn(3)))
        toy(ids())


def test_fake_and_meta_tensors_have_the_shape_dtype_and_strides_of_real_ones():
    hidden = torch.randn(3, 2, 8, dtype=torch.bfloat16).transpose(0, 1)
    options = {"seed": 1, "step": 2, "layer": 3, "scale": "rms"}
    real = perturb(hidden, torch.tensor(-1.0), **options)
    meta = perturb(hidden.to("meta"), torch.tensor(-1.0, device="meta"), **options)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = perturb(mode.from_tensor(hidden), mode.from_tensor(torch.tensor(-1.0)), **options)
    for made in (meta, fake):
        assert (made.shape, made.dtype, made.stride()) == (real.shape, real.dtype, real.stride())


def test_a_compiled_function_draws_the_noise_of_its_arguments_and_compiles_once():
    """The step and the first row are tensors, so their values are not part of a graph."""

    def loss(hidden, log_sigma, step, row_start):
        u = perturb(hidden * 2, log_sigma, seed=2**64 - 3, step=step, layer=5, row_start=row_start)
        return u, u.square().mean()

    compiled = torch.compile(loss, **EAGER)
    for step, rows in ((0, 6), (1, 6), (5, 9), (2**32 - 1, 4), (7, 12)):
        results = []
        for function in (loss, compiled):
            hidden = torch.randn(rows, 8, generator=torch.Generator().manual_seed(step)).requires_grad_()
            log_sigma = torch.tensor(-1.0, requires_grad=True)
            u, value = function(hidden, log_sigma, torch.tensor(step), torch.tensor(step * 10))
            value.backward()
            results.append((u.detach(), hidden.grad, log_sigma.grad))
        for a, e in zip(*results, strict=True):
            assert torch.equal(a, e)
    assert num_graphs() == 2  # one size, then any size


def test_exported_programs_hold_the_operator():
    class Noisy(nn.Module):
        def forward(self, hidden, log_sigma, step):
            return perturb(hidden, log_sigma, seed=1, step=step, layer=0)

    inputs = torch.randn(4, 8), torch.tensor(-1.0), torch.tensor(3)
    program = torch.export.export(Noisy(), inputs)
    assert any(node.target == torch.ops.alp_kernels.perturb.default for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs), Noisy()(*inputs))


def test_row_ids_are_checked_inside_the_graph():
    compiled = torch.compile(functools.partial(perturb, seed=1, step=2, layer=3), **EAGER)
    hidden, log_sigma = torch.randn(4, 8), torch.tensor(-1.0)
    rows = torch.arange(4) * 7
    assert torch.equal(
        compiled(hidden, log_sigma, row_ids=rows), perturb(hidden, log_sigma, seed=1, step=2, layer=3, row_ids=rows)
    )
    with pytest.raises(ValueError, match=r"row_ids spans \[-1, 20\]"):
        compiled(hidden, log_sigma, row_ids=rows - 1)


@needs_compiler
def test_inductor_makes_the_same_noise():
    """Bit for bit: the operator is called, not compiled."""
    hidden, log_sigma = torch.randn(5, 33).requires_grad_(), torch.tensor(-1.0, requires_grad=True)

    def noise(h, s):
        return perturb(h, s, seed=1, step=2, layer=3, row_start=4)

    compiled = torch.compile(lambda h, s: noise(h, s) * 1.0, fullgraph=True)
    gradients = [torch.autograd.grad(f(hidden, log_sigma).sum(), (hidden, log_sigma)) for f in (noise, compiled)]
    assert torch.equal(compiled(hidden, log_sigma), noise(hidden, log_sigma))
    for a, e in zip(*gradients, strict=True):
        assert torch.equal(a, e)


# ------------------------------------------------------------------ losses


def head(seed=0, time=5, dtype=torch.float32, vocab=19):
    """Leaves (hidden, weight, bias, log_sigma), targets, and the other inputs of a policy loss."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*size, generator=g).to(dtype) for size in ((3, time, 8), (vocab, 8), (vocab,)))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    batch = {k: v.to(real) if v.is_floating_point() else v for k, v in make_batch(seed, 3, time).items()}
    del batch["logp"], batch["entropy"]
    batch["rollout_logp"] = batch["rollout_logp"] - 2
    targets = torch.randint(0, vocab, (3, time), generator=g)
    return [hidden, weight, bias, torch.tensor(-1.0, dtype=real)], targets, batch


def graded(leaves):
    return [leaf.detach().clone().requires_grad_() for leaf in leaves]


OBJECTIVE = Objective("sequence", kl="k3", kl_coef=0.1, entropy_coef=0.05)


def flat(*inputs):
    """Return the inputs in the operator's order."""
    values = (value for part in inputs for value in part)
    return tuple(value.spec if isinstance(value, Objective) else value for value in values)


def test_policy_loss_is_a_sound_operator():
    b = make_batch(0)
    logp, entropy = graded([b.pop("logp"), b.pop("entropy")])
    inputs = LossInputs(**b, objective=OBJECTIVE, num_tokens=7.0)
    for value, given in ((entropy, inputs), (None, inputs._replace(objective=Objective("cum-turn"), nonfinite="mask"))):
        arguments = flat((logp, value), given.for_graph(logp.device))
        torch.library.opcheck(torch.ops.alp_kernels.policy_loss.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [False, True])
def test_the_heads_operators_are_sound(dtype, noise):
    leaves, targets, batch = head(dtype=dtype)
    hidden, weight, bias, log_sigma = graded(leaves)
    whole = Head(weight, bias, 0.7, 3.0, 1.0, LogitNoise(log_sigma, 5, 3) if noise else None)
    frozen = whole._replace(weight=weight.detach(), bias=None)
    loss = LossInputs(**batch, objective=OBJECTIVE).for_graph(hidden.device)
    operators = torch.ops.alp_kernels
    for some in (whole, frozen):
        wire = Wire.of(HeadInputs.of("", hidden, some, targets, batch["mask"], None, None))
        torch.library.opcheck(operators.linear_logprob.default, flat(wire))
    wire = Wire.of(HeadInputs.of("", hidden, whole, targets, batch["mask"], None, None))
    torch.library.opcheck(operators.fused_alp_loss.default, flat(wire, loss))


def test_perturb_rms_norm_is_a_sound_operator():
    hidden, weight, log_sigma = graded([torch.randn(2, 3, 8), torch.rand(8), torch.tensor(-1.0)])
    for scale in ("absolute", "rms"):
        arguments = (hidden, weight, log_sigma, AT, PLACE, None, 1e-6, 1.0, scale, "nearest", None)
        torch.library.opcheck(torch.ops.alp_kernels.perturb_rms_norm.default, arguments)


def losses(kind, leaves, targets, batch, step, objective):
    hidden, weight, bias, log_sigma = leaves
    if kind == "fused_alp_loss":
        noise = LogitNoise(log_sigma, seed=5, step=step)
        counted = {**batch, "num_tokens": batch["mask"].sum()}
        return fused_alp_loss(
            hidden * 1, weight, targets, **counted, bias=bias, objective=objective, logit_noise=noise, temperature=0.9
        )
    if kind == "policy_loss":
        logp = (hidden @ weight.t() + bias).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        return policy_loss(logp, **batch, objective=objective, num_tokens=int(step) + 3, entropy=logp.square())
    u, y = perturb_rms_norm(hidden, weight[0], log_sigma, seed=1, step=step, layer=3, row_start=step * 2)
    logp, entropy = linear_logprob(u + y, weight, targets, bias=bias, mask=batch["mask"], softcap=3.0)
    return policy_loss(logp, **batch, objective=objective, entropy=entropy)


@pytest.mark.parametrize("kind", ["fused_alp_loss", "linear_logprob"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_training_step_has_the_eager_ones_loss_gradients_and_statistics(kind, dtype):
    """Mask, counts and step do not change the graph; a new objective makes another."""
    compiled = torch.compile(losses, **EAGER)
    for step, time, objective in ((0, 5, OBJECTIVE), (1, 6, OBJECTIVE), (2, 9, OBJECTIVE), (3, 7, OBJECTIVE)):
        leaves, targets, batch = head(step, time, dtype)
        results = []
        for function in (losses, compiled):
            inputs = graded(leaves)
            out = function(kind, inputs, targets, batch, torch.tensor(step), objective)
            out.loss.backward()
            results.append(([out.loss, out.logp, out.entropy, *[x.grad for x in inputs]], out.stats))
        # roundings: a product of 8 and a softmax over 19 tokens, back, and sigma's sum over the logits of 27 tokens
        for a, e in zip(results[1][0], results[0][0], strict=True):
            assert_same_sums(a.detach(), e.detach(), length=2 * (8 + 19) + 27 * 19)
        assert results[1][1].summary() == results[0][1].summary()
        assert results[1][1].envelope() == results[0][1].envelope()
    assert num_graphs() == 2
    compiled(kind, graded(leaves), targets, batch, torch.tensor(step), Objective("token")).loss.backward()
    assert num_graphs() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_gradients_of_16_bit_heads_are_rounded_at_most_twice(dtype):
    leaves, targets, batch = head(dtype=dtype)
    compiled = torch.compile(fused_alp_loss, **EAGER)
    results = []
    for function in (fused_alp_loss, compiled):
        inputs = graded(leaves)
        out = function(*inputs[:2], targets, **batch, objective=OBJECTIVE, num_tokens=1e6)
        (out.loss * 3.0 * 2.0**10).backward()
        results.append([x.grad for x in inputs[:2]])
    for a, e in zip(*results, strict=True):
        assert a.dtype == dtype
        # a factor of 3 is not exact: half a step for the first rounding, half for each gradient's second
        torch.testing.assert_close(a, e, rtol=1.5 * torch.finfo(dtype).eps, atol=1e-7)


@torch._functorch.config.patch(donated_buffer=False)  # torch.compile needs this for a second backward
def test_two_backwards_through_a_compiled_loss_are_equal():
    leaves, targets, batch = head()
    inputs = graded(leaves)[:2]
    out = torch.compile(fused_alp_loss, **EAGER)(*inputs, targets, **batch, objective=OBJECTIVE)
    first = torch.autograd.grad(out.loss, inputs, retain_graph=True)
    second = torch.autograd.grad(out.loss, inputs)
    for a, e in zip(first, second, strict=True):
        assert torch.equal(a, e)


def test_a_compiled_loss_refuses_bad_values_when_it_runs():
    leaves, targets, batch = head()
    compiled = torch.compile(fused_alp_loss, **EAGER)
    compiled(*leaves[:2], targets, **batch, objective=OBJECTIVE)
    with pytest.raises(ValueError, match=r"targets has 15 values outside the vocabulary"):
        compiled(*leaves[:2], targets + 100, **{**batch, "mask": torch.ones(3, 5)}, objective=OBJECTIVE)
    with pytest.raises(ValueError, match=r"rollout_logp is NaN, inf or vLLM's placeholder -9999 at"):
        compiled(*leaves[:2], targets, **{**batch, "rollout_logp": batch["mask"] / 0.0}, objective=OBJECTIVE)


def test_statistics_of_compiled_and_eager_micro_batches_merge():
    parts = []
    for seed, function in ((0, fused_alp_loss), (1, torch.compile(fused_alp_loss, **EAGER))):
        leaves, targets, batch = head(seed)
        parts.append(function(*leaves[:2], targets, **batch, objective=OBJECTIVE).stats)
    merged = Stats.cat(parts)
    assert len(merged.log_ratio) == sum(part.summary()["num_tokens"] for part in parts)
    assert merged.is_live is None


def test_autocast_is_that_of_the_call_in_compiled_code_too():
    leaves, targets, batch = head()

    def step(hidden, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused_alp_loss(hidden, weight, targets, **batch, objective=OBJECTIVE).loss

    results = []
    for function in (step, torch.compile(step, **EAGER)):
        inputs = graded(leaves)[:2]
        loss = function(*inputs)
        loss.backward()
        results.append([loss.detach(), *[x.grad for x in inputs]])
    for a, e in zip(*results, strict=True):
        assert a.dtype == e.dtype == torch.float32
        assert torch.equal(a, e)


@pytest.mark.gpu
def test_the_triton_engine_runs_inside_the_operator():
    """On a GPU, or in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert why_not("triton", device) is None
    hidden, log_sigma = torch.randn(4, 24, device=device), torch.tensor(-1.0, device=device)

    def noise(h, s):
        return perturb(h, s, seed=1, step=2, layer=3, engine="triton")

    assert torch.equal(torch.compile(noise, **EAGER)(hidden, log_sigma), noise(hidden, log_sigma))


# ------------------------------------------------------------------ attached models


def layers_compiled(model):
    for layer in model.blocks if isinstance(model, Toy) else model.model.layers:
        layer.compile(**EAGER)
    return model


def whole_compiled(model):
    return torch.compile(model, **EAGER)


def record(model, call, handle, steps=3, in_scope=False):
    """Each step: two forwards, one of a length that changes, one backward, and a clean forward."""
    out = []
    for step in range(steps):
        model.zero_grad(), handle.zero_grad()
        with handle.perturbed(step=step):
            loss = call(ids(2, 5 + step, 1)).square().mean() + call(ids(3, 4, 2)).pow(3).mean()
            if in_scope:
                loss.backward()
        clean = call(ids())
        if not in_scope:
            loss.backward()
        position = torch.tensor([handle._rows.next, handle._rows.num_forwards, handle.forwards.scope.num_perturbed])
        measured = torch.stack([found.sums for found in handle._realised._measured.values()])
        out += [loss.detach(), clean.detach(), position, measured, *all_gradients(model, handle)]
    return out


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("compile_it", [layers_compiled, whole_compiled])
def test_a_compiled_decoder_is_perturbed_bit_for_bit_as_the_eager_one(compile_it, reentrant):
    """With checkpoints inside or around the hooks; backward after the scope, with a clean forward in between."""
    if compile_it is whole_compiled and reentrant:
        pytest.skip("Dynamo does not trace reentrant checkpoints")
    results = []
    for compiled in (False, True):
        toy = Decoder(reentrant)
        handle = attach(toy, sigma=0.3, scale="rms")
        results.append(record(toy, compile_it(toy) if compiled else toy, handle))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)
    # whole: perturbed and clean, for one size and for any; Dynamo puts the decoder's own hooks into separate graphs
    assert num_graphs() <= 8


def test_no_step_compiles_again():
    toy = Decoder()
    handle = attach(toy, sigma=0.3)
    compiled = whole_compiled(toy)
    record(toy, compiled, handle)
    before = num_graphs()
    record(toy, compiled, handle, steps=8)
    assert num_graphs() == before


@pytest.mark.parametrize("layers", ["final", "logits"])
def test_noise_on_outputs_is_in_the_graph(layers):
    results = []
    for compiled in (False, True):
        toy = Decoder()
        handle = attach(toy, sigma=0.3, layers=layers)
        results.append(record(toy, whole_compiled(toy) if compiled else toy, handle, steps=2))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)
    assert handle.layers[0] >= FINAL_LAYER


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformers_model_compiles_as_one_graph(checkpointing):
    results = []
    for compiled in (False, True):
        model = make_model().train()
        model.config.use_cache = False
        model.model.layers = model.model.layers[:2]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        handle = in_float64(model, attach(model, sigma=0.1))
        call = whole_compiled(model) if compiled else model
        with handle.perturbed(step=4):
            loss = call(ids()).logits.square().mean()
        loss.backward()
        results.append([loss.detach(), *all_gradients(model, handle)])
    assert_equal_gradients(*results)
    assert num_graphs() == 1


def test_compiled_layers_of_a_transformers_model_share_their_graphs():
    """Layer numbers are not part of a graph: a deep model compiles as often as a shallow one."""
    results = []
    for compiled in (False, True):
        model = make_model("Llama").train()
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = in_float64(model, attach(model, sigma=0.1, scale="rms"))
        call = layers_compiled(model) if compiled else model
        results.append(record(model, lambda x, call=call: call(x).logits, handle, steps=2))
    for a, e in zip(*results, strict=True):
        if e.is_floating_point():
            assert_same_sums(a, e, LENGTH)
        else:  # numbers of rows and forwards
            assert torch.equal(a, e)
    assert num_graphs() <= 6  # perturbed hooks, clean hooks, layers: each for one size and any


@pytest.mark.parametrize("kind", ["whole", "layers", "function"])
def test_noise_comes_and_goes_with_hooks_and_scopes_on_what_was_compiled_before(kind):
    toy, x = Decoder(), ids()
    clean = toy(x).detach()
    if kind == "function":
        call = torch.compile(lambda x: toy(x) * 1, **EAGER)
    else:
        call = whole_compiled(toy) if kind == "whole" else layers_compiled(toy)
    for _ in range(2):
        assert torch.equal(call(x), clean)
    handle = attach(toy if kind == "function" else call, sigma=0.3, scale="absolute", layers=[0])
    toy_input = toy.embed(x).detach()
    noisy = []
    for step in range(3):
        with handle.perturbed(step=step):
            noisy.append(call(x).detach())
        assert torch.equal(call(x), clean)
        eps = normal(10, 16, seed=0, step=step, layer=0).view(2, 5, 16)
        expected = toy.blocks[2](toy.blocks[1](toy.blocks[0].forward(toy_input + 0.3 * eps)))
        torch.testing.assert_close(noisy[-1], expected)
    twin = copy.deepcopy(toy)
    with handle.perturbed(step=0):
        assert torch.equal(call(x), noisy[0])
        assert torch.equal(twin(x), clean)
    handle.detach()
    assert torch.equal(call(x), clean)
    assert "forward" not in {**toy.__dict__, **toy.blocks[0].__dict__}


def test_the_graphs_of_a_clean_model_of_the_same_class_are_not_taken():
    """A reference model of the policy's class shares Dynamo's cache with it, which belongs to the class."""
    toy, other, x = Decoder(), Decoder(), ids()
    handle = attach(toy, sigma=0.3)
    call, call_other = whole_compiled(toy), whole_compiled(other)
    clean = call_other(x).detach()
    for step in range(3):
        with handle.perturbed(step=step):
            assert not torch.equal(call(x), clean)
        assert torch.equal(call_other(x), clean)
        assert torch.equal(call(x), clean)


def test_a_compiled_scope_without_a_perturbed_layer_is_an_error_at_any_call():
    toy, other, x = Decoder(), Decoder(), ids()
    handle = attach(toy, sigma=0.3)
    call, call_other = whole_compiled(toy), whole_compiled(other)
    for step in range(4):
        with handle.perturbed(step=step):
            call(x)
        with pytest.raises(RuntimeError, match=r"no layer of .* was perturbed"), handle.perturbed(step=step):
            call_other(x)


def test_row_ids_reach_compiled_layers():
    results = []
    for compile_it in (None, layers_compiled, whole_compiled):
        toy = Decoder()
        handle = attach(toy, sigma=0.3)
        call = toy if compile_it is None else compile_it(toy)
        for step in range(3):
            with handle.perturbed(step=step, row_ids=torch.arange(10).view(2, 5) * 11 + step):
                call(ids()).square().mean().backward()
        results.append(all_gradients(toy, handle))
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert torch.equal(a, e)


def test_two_forwards_in_one_graph_have_rows_of_their_own():
    toy, x = Decoder(), ids()
    handle = attach(toy, sigma=0.3)
    both = torch.compile(lambda x: (toy(x), toy(x)), **EAGER)
    with handle.perturbed(step=0):
        first, second = both(x)
    with handle.perturbed(step=1):
        pass_ = [toy(x), toy(x)]
    assert not torch.equal(first, second)
    handle._rows.step = -1
    with handle.perturbed(step=0):
        assert torch.equal(toy(x), first)
        assert torch.equal(toy(x), second)
    assert len(pass_) == 2


def test_a_compiled_decoder_inside_a_checkpoint_is_an_error():
    toy = Decoder()
    handle = attach(toy, sigma=0.3)
    call = torch.compile(toy, backend="aot_eager")
    with handle.perturbed(step=0):
        loss = torch.utils.checkpoint.checkpoint(call, ids(), use_reentrant=False).sum()
        with pytest.raises(RuntimeError, match="recomputed in backward as a whole"):
            loss.backward()


# ------------------------------------------------------------------ copies


def test_a_handle_says_why_it_is_not_copied():
    handle = attach(Toy())
    for way in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled: save its state_dict"):
            way(handle)
    assert math.isfinite(handle.log_sigma[0])
