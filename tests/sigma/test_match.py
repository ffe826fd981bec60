"""match_sigma: what it reaches, that it leaves the updates' noise alone, its state and its errors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math

import pytest
import torch

from alp_kernels import Objective, attach, linear_logprob, match_sigma, measure_noise
from tests.support import processes
from tests.support.decoders import Toy, ids, make_model
from tests.support.scored import Batch, chosen

TOKEN, SEQUENCE = Objective.preset("alp-token"), Objective.preset("alp-sequence")


def match(batch, handle, objective=TOKEN, **given):
    return match_sigma(handle, batch.score, batch.rollout_logp, batch.mask, objective=objective, **given)


# ------------------------------------------------------------------ what it reaches


@pytest.mark.parametrize("scale", ["rms", "absolute"])
def test_layers_move_the_tokens_equally_and_together_as_far_as_the_mismatch(scale):
    batch = Batch(num_sequences=16)
    handle = attach(batch.model, "matched", scale=scale)
    shift = match(batch, handle).summary()
    assert shift["perturbation/sd"] == pytest.approx(shift["clean/sd"], rel=0.02)
    again = measure_noise(handle, batch.score, batch.rollout_logp, batch.mask, objective=TOKEN, by_layer=True).summary()
    layers = [again[f"perturbation/layer_{layer}/sd"] for layer in range(3)]
    assert max(layers) == pytest.approx(min(layers), rel=0.02)
    assert again["perturbation/matched_factor"] == pytest.approx(1, rel=0.02)
    assert len(set(handle.sigma.tolist())) == 3


@pytest.mark.parametrize("level", ["sequence", "cum-token", "cum-turn"])
def test_where_sums_are_not_normalised_a_sequence_moves_as_far_as_the_mismatch_of_a_token(level):
    batch = Batch(num_sequences=24, length=16)
    handle = attach(batch.model, "matched")
    shift = match(batch, handle, Objective(level), turn_ends=batch.turn_ends).summary()
    assert shift["perturbation/sequence_sd"] == pytest.approx(shift["clean/sd"], rel=0.02)
    num_tokens = float(batch.mask.sum()) / 24
    assert shift["perturbation/sd"] == pytest.approx(shift["clean/sd"] / math.sqrt(num_tokens), rel=0.5)


def test_geometric_sequences_are_matched_as_tokens():
    batch, sigmas = Batch(), []
    for objective in (TOKEN, Objective("sequence", True)):
        with attach(batch.model, "matched") as handle:
            match(batch, handle, objective)
            sigmas.append(handle.sigma)
    assert torch.equal(*sigmas)


def test_the_result_does_not_depend_on_the_sigma_it_begins_from():
    batch, sigmas = Batch(num_sequences=16), []
    for begin in ("matched", 1e-6, 30.0):
        with attach(batch.model, begin) as handle:
            match(batch, handle)
            sigmas.append(handle.sigma)
    torch.testing.assert_close(sigmas[1], sigmas[0], rtol=0.05, atol=0)
    torch.testing.assert_close(sigmas[2], sigmas[0], rtol=0.05, atol=0)


def test_tokens_whose_rollout_logp_is_unknown_do_not_count():
    batch, sigmas = Batch(), []
    off = batch.mask & (torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    for rollout_logp, mask in (
        (torch.where(off, torch.nan, batch.rollout_logp), batch.mask),
        (torch.where(off, -9999.0, batch.rollout_logp), batch.mask),
        (batch.rollout_logp, batch.mask & ~off),
    ):
        with attach(batch.model, "matched") as handle:
            match_sigma(handle, batch.score, rollout_logp, mask, objective=TOKEN)
            sigmas.append(handle.sigma)
    assert torch.equal(sigmas[0], sigmas[1]) and torch.equal(sigmas[0], sigmas[2])


def test_a_matched_handle_is_not_warned_of(caplog):
    for objective in (TOKEN, SEQUENCE):
        batch = Batch(num_sequences=16, length=40)
        with attach(batch.model, "matched") as handle, caplog.at_level(logging.WARNING, "alp_kernels"):
            match(batch, handle, objective).report(handle)
    assert not caplog.records


# ------------------------------------------------------------------ ranks


def _on_rank(rows):
    batch, rank = Batch(num_sequences=12), torch.distributed.get_rank()
    mask = batch.mask.clone()
    mine = rows[rank]
    if mine.start == mine.stop:  # a rank without a sampled token still takes part
        mine, mask = slice(0, 1), torch.zeros_like(mask)
    handle = attach(batch.model, "matched")
    match_sigma(
        handle, lambda noise: batch.score(noise)[mine], batch.rollout_logp[mine], mask[mine], objective=SEQUENCE
    )
    return handle.log_sigma.detach()


@pytest.mark.parametrize("split", [5, 12], ids=["five and seven sequences", "all and none"])
def test_ranks_with_different_data_get_the_sigma_of_all_data(split):
    batch = Batch(num_sequences=12)
    handle = attach(batch.model, "matched")
    match(batch, handle, SEQUENCE)
    for log_sigma in processes.run(_on_rank, 2, (slice(0, split), slice(split, 12))):
        assert torch.equal(log_sigma, handle.log_sigma.detach())


# ------------------------------------------------------------------ later noise


class Trained:
    """Two scopes of step 3 and one of step 4 with gradients; `between` runs in the gaps."""

    def __init__(self, model, **attached):
        self.model = model
        self.handle = attach(model, **{"sigma": 0.05, "seed": 5, **attached})
        self.tokens = ids(2, 6)
        self.targets = ids(2, 6, seed=1)
        self.rollout_logp = self.score(lambda row_ids=None: torch.no_grad()) - 0.02 * torch.randn(
            2, 6, generator=torch.Generator().manual_seed(0)
        )

    def logits(self):
        out = self.model(self.tokens)
        return (out.logits if hasattr(out, "logits") else out).float()

    def score(self, noise):
        with noise(), torch.no_grad():
            return chosen(self.logits(), self.targets.clamp(max=15)).clamp(max=0)

    def measured(self):
        """Match, and measure each layer; then take sigma back."""
        own = self.handle.log_sigma.detach().clone()
        given = (self.handle, self.score, self.rollout_logp.clamp(max=0), torch.ones(2, 6))
        measure_noise(*given, objective=TOKEN, by_layer=True)
        match_sigma(*given, objective=TOKEN)
        with torch.no_grad():
            self.handle.log_sigma.copy_(own)

    def run(self, between):
        found = []
        between()
        for step in (3, 3, 4):
            with self.handle.perturbed(step=step):
                out = self.logits()
            between()
            out.square().mean().backward()
            found += [out.detach(), *(torch.tensor(v) for v in self.handle.realised().values())]
        found += [self.handle.log_sigma.grad, *(p.grad for p in self.model.parameters() if p.grad is not None)]
        state = self.handle.state_dict()
        found += [state["log_sigma"].clone()]
        numbers = {name: state["_extra_state"][name] for name in ("step", "next_row", "forwards")}
        return found, numbers


UNTOUCHED = {
    "plain": (Toy, {}),
    "checkpointed": (lambda: Toy(False), {}),
    "reentrant": (lambda: Toy(True), {}),
    "capturable": (Toy, {"capturable": True}),
    "bounds": (Toy, {"sigma_bounds": (1e-8, 1e4)}),
    "a subset": (Toy, {"layers": [0, -1]}),
    "stochastic": (lambda: Toy().bfloat16(), {"rounding": "stochastic"}),
    "bfloat16": (lambda: Toy().bfloat16(), {}),
    "float16": (lambda: Toy().half(), {}),
    "final": (make_model, {"layers": "final"}),
    "logits": (make_model, {"layers": "logits", "scale": "absolute"}),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_updates_have_the_noise_that_they_have_without_measuring(case):
    make, attached = UNTOUCHED[case]
    plain, measured = Trained(make(), **attached), Trained(make(), **attached)
    expected, numbers = plain.run(lambda: None)
    actual, same_numbers = measured.run(measured.measured)
    assert numbers == same_numbers
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_a_compiled_model_is_matched_as_the_model_itself():
    torch._dynamo.reset()
    sigmas, outputs = [], []
    for compile_it in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        batch = Batch()
        handle = attach(batch.model, "matched")
        own, batch.model = batch.model, compile_it(batch.model)
        match(batch, handle)
        sigmas.append(handle.sigma)
        with torch.no_grad():
            handle.log_sigma.fill_(-3.0)
        with handle.perturbed(step=1):
            outputs.append(batch.model(ids()).detach())
        assert torch.equal(own(ids()), batch.model(ids()))
    torch.testing.assert_close(sigmas[1], sigmas[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_a_fused_head_is_matched_as_the_models_own():
    sigmas = []
    tokens, targets = ids(4, 8), ids(4, 8, seed=1)
    row_ids = torch.arange(4)[:, None] << 20 | torch.arange(8)
    for is_fused in (False, True):
        model = make_model()
        handle = attach(model, "matched", layers="logits", scale="absolute")

        @torch.no_grad()
        def score(noise, model=model, handle=handle, is_fused=is_fused):
            with noise(row_ids):
                if not is_fused:
                    return chosen(model(tokens).logits, targets)
                given = {"logit_noise": handle.logit_noise(targets.numel())} if handle.is_open else {}
                return linear_logprob(model.model(tokens).last_hidden_state, model.lm_head.weight, targets, **given)[0]

        clean = score(lambda row_ids: torch.no_grad())
        q = clean - 0.02 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        match_sigma(handle, score, q, torch.ones(4, 8), objective=TOKEN)
        sigmas.append(handle.sigma)
    torch.testing.assert_close(*sigmas, rtol=1e-3, atol=0)


# ------------------------------------------------------------------ 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mismatch", [0.1, 0.02, 1e-4])
@pytest.mark.parametrize("scale", ["rms", "absolute"])
def test_in_16_bits_sigma_is_matched_or_the_closest_is_kept_with_a_warning(dtype, mismatch, scale, caplog):
    batch = Batch(num_sequences=16, length=16, mismatch=mismatch)
    batch.model.to(dtype)
    batch.rollout_logp = batch.score(lambda row_ids: torch.no_grad()) - mismatch * torch.randn(
        16, 16, generator=torch.Generator().manual_seed(0)
    )
    batch.rollout_logp.clamp_(max=0)
    handle = attach(batch.model, "matched", scale=scale)
    with caplog.at_level(logging.WARNING, "alp_kernels"):
        summary = match(batch, handle).summary()
    again = measure_noise(handle, batch.score, batch.rollout_logp, batch.mask, objective=TOKEN).summary()
    assert again["perturbation/sd"] == summary["perturbation/sd"]  # what is kept is what was measured
    is_close = abs(math.log(summary["perturbation/matched_factor"])) < 0.02
    assert is_close != bool(caplog.records)
    assert ((handle.sigma > 1e-9) & (handle.sigma < 10)).all()
    if not is_close:
        (record,) = caplog.records
        assert f"the noise moves log-probabilities by {summary['perturbation/sd']:.2g} nats" in record.getMessage()
        assert "Hidden states of 16 bits round small noise away or up" in record.getMessage()
    if mismatch == 0.1:
        assert 0.8 < summary["perturbation/matched_factor"] < 1.25


def test_bounds_that_are_in_the_way_are_named(caplog):
    batch = Batch()
    handle = attach(batch.model, 1e-4, sigma_bounds=(1e-5, 1e-3))
    with caplog.at_level(logging.WARNING, "alp_kernels"):
        match(batch, handle)
    assert "sigma_bounds=(1e-05, 0.001) may be in the way" in caplog.text
    torch.testing.assert_close(handle.sigma, torch.full((3,), 1e-3))


# ------------------------------------------------------------------ state


def test_the_scope_opens_after_matching_and_a_state_tells_whether_it_was():
    batch = Batch()
    handle = attach(batch.model, "matched")
    before = copy.deepcopy(handle.state_dict())
    assert handle.needs_match and before["_extra_state"]["needs_match"]
    with pytest.raises(RuntimeError, match="sigma='matched' is not known yet; call match_sigma"):
        with handle.perturbed(step=0):
            batch.model(batch.tokens)
    match(batch, handle)
    after, sigma = copy.deepcopy(handle.state_dict()), handle.sigma
    assert not handle.needs_match and not after["_extra_state"]["needs_match"]
    with handle.perturbed(step=0):
        expected = batch.model(batch.tokens).detach()
    handle.detach()

    resumed = attach(batch.model, "matched")
    resumed.load_state_dict(after)
    assert not resumed.needs_match and torch.equal(resumed.sigma, sigma)
    with resumed.perturbed(step=0):
        assert torch.equal(batch.model(batch.tokens), expected)
    resumed.load_state_dict(before)
    assert resumed.needs_match
    match(batch, resumed)
    assert torch.equal(resumed.sigma, sigma)  # a run resumed before matching matches as the first would have


def test_a_state_of_a_version_without_matching_needs_none():
    batch = Batch()
    handle = attach(batch.model, 0.25)
    state = copy.deepcopy(handle.state_dict())
    del state["_extra_state"]["needs_match"]
    handle.detach()
    resumed = attach(batch.model, "matched")
    resumed.load_state_dict(state)
    assert not resumed.needs_match
    torch.testing.assert_close(resumed.sigma, torch.full((3,), 0.25))


# ------------------------------------------------------------------ errors


ERRORS = {
    "no mismatch": (ValueError, "so there is no mismatch to match"),
    "empty mask": (ValueError, "0 tokens have mask 1 and a known rollout_logp"),
    "one token": (ValueError, "1 tokens have mask 1"),
    "one sequence": (ValueError, "at level 'sequence' it compares sequences; it needs two"),
    "ignores noise": (RuntimeError, r"score\(\) never opened the noise"),
    "another model": (RuntimeError, "no layer of .* was perturbed inside the scope"),
    "other head": (RuntimeError, "noise in layer_0 does not change the log-probabilities"),
    "NaN": (RuntimeError, "not finite, without noise"),
    "16 bits": (TypeError, r"match_sigma: what score\(\) returns is torch\.bfloat16; it needs torch\.float32"),
    "a shape": (ValueError, r"match_sigma: score\(\) returns log-probabilities of shape \(5, 9\)"),
    "nothing": (TypeError, r"match_sigma: what score\(\) returns is a NoneType"),
    "far away": (ValueError, r"the mismatch is .* nats, and noise in .* moves the log-probabilities by .* at most"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_matched_is_an_error_and_leaves_sigma_alone(case):
    batch, objective = Batch(), TOKEN
    handle = attach(batch.model, "matched")
    clean = batch.score(lambda row_ids: torch.no_grad())
    score, q, mask = batch.score, batch.rollout_logp, batch.mask.clone()
    if case == "no mismatch":
        q = clean
    elif case == "empty mask":
        mask[:] = False
    elif case == "one token":
        mask[:] = False
        mask[2, 3] = True
    elif case == "one sequence":
        objective = SEQUENCE
        mask[1:] = False
    elif case == "far away":
        q = (clean - 40 * torch.rand_like(clean)).clamp(max=0)
    elif case == "nothing":
        score = lambda noise: None  # noqa: E731
    elif case == "ignores noise":
        score = lambda noise: clean  # noqa: E731
    elif case == "another model":
        score = Batch().score
    elif case == "other head":

        def score(noise):
            batch.score(noise)
            return clean

    elif case == "NaN":
        batch.model.blocks[0][0].weight.data[0, 0] = math.nan
    elif case == "16 bits":
        score = lambda noise: batch.score(noise).bfloat16()  # noqa: E731
    elif case == "a shape":
        score = lambda noise: batch.score(noise)[1:]  # noqa: E731
    error, message = ERRORS[case]
    before = handle.sigma
    with pytest.raises(error, match=message):
        match_sigma(handle, score, q, mask, objective=objective)
    assert torch.equal(handle.sigma, before) and handle.needs_match and not handle.is_open


def test_noise_that_makes_the_log_probabilities_nan_is_an_error():
    batch = Batch()
    handle = attach(batch.model, "matched")
    inside = []

    def score(noise):
        logp = batch.score(noise)
        inside.append(1)
        return logp if len(inside) == 1 else logp * math.nan

    with pytest.raises(RuntimeError, match="with noise in layer_0 the log-probabilities are not finite"):
        match_sigma(handle, score, batch.rollout_logp, batch.mask, objective=TOKEN)


def test_matching_inside_a_scope_is_an_error():
    batch = Batch()
    handle = attach(batch.model, 0.1)
    with handle.perturbed(step=0), pytest.raises(RuntimeError, match="scope is open"):
        batch.model(batch.tokens)
        match(batch, handle)
    torch.testing.assert_close(handle.sigma, torch.full((3,), 0.1))


def test_no_number_goes_with_matched():
    with pytest.raises(ValueError, match=r"sigma_bounds=\(0\.1, 1\); it needs None with sigma='matched'"):
        attach(Toy(), "matched", sigma_bounds=(0.1, 1))
    with pytest.raises(TypeError, match="sigma='match'"):
        attach(Toy(), "match")


def test_a_call_inside_an_open_scope_or_after_detach_is_refused_before_score_runs():
    batch = Batch()
    handle = attach(batch.model, 0.05)
    calls = []
    for is_open in (True, False):
        with handle.perturbed(step=0) if is_open else contextlib.nullcontext():
            if not is_open:
                handle.detach()
            for call in (measure_noise, match_sigma):
                with pytest.raises(RuntimeError, match=f"{call.__name__}: .*(scope is open|was detached)"):
                    call(handle, calls.append, batch.rollout_logp, batch.mask, objective=TOKEN)
            if is_open:
                batch.score(lambda *ids: contextlib.nullcontext())
    assert not calls


def test_a_mismatch_that_leaves_the_clip_range_by_itself_is_said(caplog):
    batch = Batch()
    narrow = dataclasses.replace(TOKEN, clip_low=0.01, clip_high=0.01)
    with attach(batch.model, "matched") as handle:
        match_sigma(handle, batch.score, batch.rollout_logp, batch.mask, objective=narrow)
    assert "of the ratios outside the clip range; find why" in caplog.text
