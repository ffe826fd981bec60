"""Row identities belong to positions: their shape is compared with the hidden states', whatever the order of axes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

from alp_kernels import (
    Head,
    LogitNoise,
    Objective,
    attach,
    fused_alp_loss,
    linear_logprob,
    normal,
    perturb,
    perturb_rms_norm,
)
from alp_kernels.stream import row_ids
from tests.support.decoders import VOCAB, Block, Toy, all_gradients, ids, in_float64


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


SHAPES = {  # of the hidden states, from (B, T, D)
    "batch first": lambda x: x,
    "time first": lambda x: x.transpose(0, 1),
    "packed": lambda x: x.flatten(0, 1),
    "packed in a batch of one": lambda x: x.flatten(0, 1)[None],
    "packed, time first": lambda x: x.flatten(0, 1)[:, None],
    "streams last": lambda x: torch.stack([x, -x, 2 * x], dim=2),
    "streams first": lambda x: torch.stack([x, -x, 2 * x], dim=0),
    "two axes of streams last": lambda x: torch.stack([x, -x, 2 * x, x, x, x], dim=2).unflatten(2, (2, 3)),
    "two axes of streams first": lambda x: torch.stack([x, -x, 2 * x, x, x, x], dim=0).unflatten(0, (2, 3)),
}
AXES_OF_STREAMS = {"streams last": 1, "streams first": 1, "two axes of streams last": 2, "two axes of streams first": 2}


def of_positions(name, hidden):
    """(B, T, streams * D) from hidden states of SHAPES[name] of a batch of 2."""
    count = AXES_OF_STREAMS.get(name, 0)
    if name == "time first":
        hidden = hidden.transpose(0, 1)
    if name.endswith("first") and count:
        hidden = hidden.movedim(tuple(range(count)), tuple(range(-1 - count, -1)))
    return hidden.flatten(-1 - count).reshape(2, -1, hidden.shape[-count - 1 :].numel())


class Reshaped(nn.Embedding):
    name: str

    def forward(self, tokens):
        return SHAPES[self.name](super().forward(tokens)).contiguous()


class Shaped(Toy):
    """A decoder whose layers read hidden states of one of SHAPES."""

    def __init__(self, name, reentrant=None):
        super().__init__(reentrant)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.embed = Reshaped(VOCAB, 16)
        self.embed.name = name


def ids_for(name, rows):
    """`rows` (B, T) as the layers of Shaped(name) need them."""
    rows = rows[..., None]
    return (rows if name in AXES_OF_STREAMS else SHAPES[name](rows)).squeeze(-1)


ROWS = torch.arange(10).view(2, 5) * 11 + 3


@pytest.mark.parametrize("scale", ["absolute", "rms"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_positions_noise_follows_its_identity(name, capturable, scale):
    """Bit for bit the noise of one row of S * D channels, in whatever place the layers hold it."""
    toy, seen, rows = Shaped(name), [], ids_for(name, ROWS)
    with attach(toy, sigma=0.3, layers=[0], seed=3, scale=scale, capturable=capturable) as handle:
        hook = toy.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with handle.perturbed(step=4, row_ids=rows), torch.no_grad():
            toy(ids())
        hook.remove()
    hidden = of_positions(name, toy.embed(ids())).flatten(0, 1)
    coordinates = {"seed": 3, "step": 4, "layer": 0, "row_ids": ROWS.flatten(), "scale": scale}
    expected = perturb(hidden, handle.log_sigma[0].detach(), **coordinates)
    assert seen[0].shape == toy.embed(ids()).shape
    assert seen[0].is_contiguous()
    assert torch.equal(of_positions(name, seen[0]).flatten(0, 1), expected)


@pytest.mark.parametrize("name", [name for name in SHAPES if "packed" not in name])
def test_a_split_batch_meets_the_noise_and_gradients_of_the_whole(name):
    toy = Shaped(name)
    handle = in_float64(toy, attach(toy, sigma=0.3, scale="rms"))
    results = []
    for parts in ([slice(0, 2)], [slice(1, 2), slice(0, 1)]):
        toy.zero_grad(), handle.zero_grad()
        for part in parts:
            with handle.perturbed(step=0, row_ids=ids_for(name, ROWS[part])):
                toy(ids()[part]).square().sum().backward()
        results.append(all_gradients(toy, handle))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["time first", *AXES_OF_STREAMS])
def test_a_recompute_meets_the_same_noise(name, reentrant):
    results = []
    for variant in (None, reentrant):
        toy = Shaped(name, variant)
        with attach(toy, sigma=0.3, scale="rms") as handle, handle.perturbed(0, ids_for(name, ROWS)):
            toy(ids()).square().sum().backward()
        results.append(all_gradients(toy, handle))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


def layers_compiled(toy):
    for block in toy.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return toy


def whole_compiled(toy):
    return torch.compile(toy, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("name", ["batch first", "time first", *AXES_OF_STREAMS])
@pytest.mark.parametrize("compile_it", [layers_compiled, whole_compiled])
def test_compiled_layers_meet_the_same_noise_at_every_length(name, compile_it):
    results = []
    for compiled in (False, True):
        toy = Shaped(name)
        with attach(toy, sigma=0.3, scale="rms") as handle:
            call = compile_it(toy) if compiled else toy
            for time in (5, 6, 7, 8):
                rows = torch.arange(2 * time).view(2, time) * 11 + 3
                with handle.perturbed(step=time, row_ids=ids_for(name, rows)):
                    call(ids(2, time)).square().mean().backward()
            measured = handle.realised()
        results.append((all_gradients(toy, handle), measured))
    assert results[0][1] == results[1][1]
    assert all(0.8 < r < 1.2 for r in results[0][1]["rms_over_nominal"])
    for a, e in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, e)
    assert counters["stats"]["unique_graphs"] <= 5  # one length, then any


WRONG = {
    "batch first": (
        ROWS.t(),
        r"\(5, 2\); the layers read hidden states \(2, 5, 16\), which need \(2, 5\): give row_ids.t\(\)",
    ),
    "time first": (
        ROWS,
        r"\(2, 5\); the layers read hidden states \(5, 2, 16\), which need \(5, 2\): give row_ids.t\(\)",
    ),
    "packed": (ROWS, r"\(2, 5\); the layers read hidden states \(10, 16\), which need \(10,\)"),
    "packed in a batch of one": (ROWS, r"\(2, 5\); the layers read hidden states \(1, 10, 16\), which need \(1, 10\)"),
    "streams last": (ROWS.t(), r"\(5, 2\); the layers read hidden states \(2, 5, 3, 16\), which need \(2, 5, 3\)"),
    "streams first": (ROWS.t(), r"\(5, 2\); the layers read hidden states \(3, 2, 5, 16\), which need \(3, 2, 5\)"),
}
FLAT = r"\(10,\); .* which need \([235, ]+\); flat ids are for packed rows"


@pytest.mark.parametrize("compile_it", [lambda toy: toy, lambda toy: torch.compile(toy, backend="aot_eager")])
@pytest.mark.parametrize("name", WRONG)
def test_identities_of_another_shape_are_named(name, compile_it):
    rows, message = WRONG[name]
    toy = Shaped(name)
    with attach(toy, sigma=0.3) as handle:
        call = compile_it(toy)
        with pytest.raises(ValueError, match=f"perturbed: row_ids has shape {message}"):
            with handle.perturbed(step=0, row_ids=rows):
                call(ids())
        if "packed" not in name:
            with pytest.raises(ValueError, match=FLAT), handle.perturbed(step=0, row_ids=ROWS.flatten()):
                call(ids())
            for part in (ROWS[:, 0], ROWS[0]):  # nor do the other axes count as streams
                with pytest.raises(ValueError, match="row_ids has shape"), handle.perturbed(step=0, row_ids=part):
                    call(ids())
        with handle.perturbed(step=0, row_ids=ids_for(name, ROWS)):
            call(ids())


def test_fake_tensors_are_checked_alike():
    toy = Shaped("time first").to("meta")
    with attach(toy, sigma=0.3) as handle:
        with pytest.raises(ValueError, match=r"give row_ids.t\(\)"), handle.perturbed(step=0, row_ids=ROWS):
            toy(ids().to("meta"))


def test_streams_that_could_be_either_axis_are_an_error():
    toy, rows = Shaped("streams last"), torch.arange(9).view(3, 3)
    with attach(toy, sigma=0.3) as handle:
        with pytest.raises(ValueError, match=r"\(3, 3, 3, 16\), which it fits at the front and at the back"):
            with handle.perturbed(step=0, row_ids=rows):
                toy(ids(3, 3))


# ------------------------------------------------------------------ perturb and perturb_rms_norm

HERE = {"seed": 11, "step": 3, "layer": 2}


@given(batch=st.integers(1, 3), time=st.integers(1, 4))
def test_functions_take_identities_in_hiddens_shape_or_flat_alone(batch, time):
    hidden, rows = torch.randn(time, batch, 8), torch.arange(time * batch).view(batch, time) * 7
    log_sigma, weight = torch.tensor(-1.0), torch.ones(8)
    for call in (
        lambda given: perturb(hidden, log_sigma, row_ids=given, **HERE),
        lambda given: perturb_rms_norm(hidden, weight, log_sigma, row_ids=given, **HERE)[0],
    ):
        u = call(rows.t())
        assert torch.equal(call(rows.t().flatten()), u)
        assert torch.equal(
            u, perturb(hidden.flatten(0, 1), log_sigma, row_ids=rows.t().flatten(), **HERE).view_as(hidden)
        )
        if batch == time or 1 in (batch, time):
            continue
        with pytest.raises(ValueError, match=rf"row_ids has shape \({batch}, {time}\); .*: give row_ids.t\(\)"):
            call(rows)


@pytest.mark.parametrize("compiled", [False, True])
def test_functions_compare_shapes_in_compiled_code_too(compiled):
    hidden, rows, log_sigma = torch.randn(5, 2, 8), torch.arange(10).view(2, 5), torch.tensor(-1.0)

    def plain(hidden, rows):
        return perturb(hidden, log_sigma, row_ids=rows, **HERE)

    def normed(hidden, rows):
        return perturb_rms_norm(hidden, torch.ones(8), log_sigma, row_ids=rows, **HERE)[0]

    for function in (plain, normed):
        call = torch.compile(function, backend="aot_eager") if compiled else function
        with pytest.raises(ValueError, match=r"hidden \(5, 2, 8\) needs \(5, 2\): give row_ids.t\(\)"):
            call(hidden, rows)
        assert torch.equal(call(hidden, rows.t()), plain(hidden, rows.t().flatten()))


# ------------------------------------------------------------------ noise on the logits


@pytest.mark.parametrize("compiled", [False, True])
def test_noise_on_logits_is_of_the_targets_rows(compiled):
    hidden, weight, targets = torch.randn(2, 5, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 5))

    def logp(noise):
        return linear_logprob(hidden, Head(weight, logit_noise=noise), targets)[0]

    def loss(noise):
        objective = Objective.preset("alp-token")
        given = torch.full((2, 5), -2.0), torch.ones(2), torch.ones(2, 5)
        return fused_alp_loss(hidden, Head(weight, logit_noise=noise), targets, *given, objective=objective).logp

    def noise(rows, num_rows=None):
        return LogitNoise(torch.tensor(-1.0), 1, 2, rows, num_rows=num_rows)

    for function, where in ((logp, "linear_logprob"), (loss, "fused_alp_loss")):
        call = torch.compile(function, backend="aot_eager") if compiled else function
        with pytest.raises(
            ValueError, match=rf"{where}: logit_noise: row_ids has shape \(5, 2\); .*give row_ids.t\(\)"
        ):
            call(noise(ROWS.t()))
        with pytest.raises(
            ValueError, match=rf"{where}: logit_noise: row_ids has shape \(10,\); targets need \(2, 5\)"
        ):
            call(noise(ROWS.flatten()))
        with pytest.raises(ValueError, match=rf"{where}: logit_noise is of 4 rows; targets \(2, 5\) have 10"):
            call(noise(None, 4))
        assert torch.equal(call(noise(ROWS)), call(noise(ROWS, 10)))


def test_numbered_logit_noise_is_of_as_many_rows_as_the_loss_has():
    """Fewer would number the next micro-batch's rows as this one's."""
    toy = Toy()
    with attach(toy, layers="logits", scale="absolute") as handle, handle.perturbed(step=0):
        noise = handle.logit_noise(5)
        with pytest.raises(ValueError, match=r"logit_noise is of 5 rows; targets \(2, 5\) have 10"):
            linear_logprob(
                torch.randn(2, 5, 8), torch.randn(20, 8), torch.zeros(2, 5, dtype=torch.int64), logit_noise=noise
            )


# ------------------------------------------------------------------ models of transformers


@pytest.mark.parametrize("name", ["deepseek_v4", "gemma3n_text"])
def test_models_with_several_streams_take_identities_of_positions(name):
    from tests.support.architectures import ARCHITECTURES
    from tests.support.examine import available, make

    if not available(name):
        pytest.skip(f"this transformers has no {name}")
    model, tokens = make(ARCHITECTURES[name]), torch.randint(3, 59, (3, 6), generator=torch.Generator().manual_seed(0))
    rows = row_ids(torch.arange(3)[:, None], torch.arange(6))
    handle, seen = attach(model, sigma=0.1, scale="absolute", layers=[0], seed=5), []
    layer = model.get_submodule("model.layers.0")
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))

    def noise(part):
        found = []
        for is_noisy in (True, False):
            seen.clear()
            if is_noisy:
                with handle.perturbed(step=7, row_ids=rows[part]):
                    model(input_ids=tokens[part]).logits.square().mean().backward()
            else:
                model(input_ids=tokens[part])
            found.append(seen[0])
        return found

    axis = 0 if name == "deepseek_v4" else 1  # the batch's
    whole, clean = noise(slice(0, 3))
    parts = [noise(part)[0] for part in (slice(0, 1), slice(1, 3))]
    assert torch.equal(torch.cat(parts, dim=axis), whole)
    eps = normal(18, whole[..., 0].numel() // 18 * 16, seed=5, step=7, layer=0, row_ids=rows.flatten())
    difference = whole - clean
    if axis == 1:
        difference = difference.movedim(0, 2)
    torch.testing.assert_close(difference.reshape(18, -1), 0.1 * eps, rtol=1e-3, atol=1e-5)
    assert handle.log_sigma.grad.isfinite().all()
    assert math.isfinite(handle.realised()["rms_over_nominal"][0])
