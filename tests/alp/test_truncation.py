"""Truncated sampling: what top_p, top_k and min_p keep, and the same support in the update and in every measurement."""

import dataclasses
import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from alp import train as loop
from alp import update as loop_update
from alp.config import ModelConfig, RolloutConfig, TaskConfig, TrainConfig, UpdateConfig, WarmupConfig
from alp.errors import UserError
from alp.measures.mismatch import measure_mismatch
from alp.policy.models import Policy, hidden_states
from alp.rollout import Completions, Request, sample, truncate, uniforms
from alp.runs.files import read_metrics
from alp.sampling.in_process import InProcessSampler
from alp.setup import make_task
from alp.update import Experience, training_logp
from tests.support.runs import newest, without_times

train = functools.partial(loop.train, with_plots=False)
SETTINGS: list[dict[str, Any]] = [
    {"top_p": 0.7},
    {"top_k": 5},
    {"min_p": 0.3},
    {"top_p": 0.8, "top_k": 20, "min_p": 0.05},
]
IDS = ["top_p", "top_k", "min_p", "all three"]


# ------------------------------------------------------------------ which tokens are kept


def log_probs_of(seed: int, vocabulary: int, scale: float) -> Tensor:
    """In float64: in float32, a cumulative probability may round across top_p."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(4, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)


def warped(log_probs: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """The same by transformers' own classes, in vLLM's order."""
    ids, scores = torch.zeros(len(log_probs), 1, dtype=torch.int64), log_probs.double()
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.log_softmax(-1)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    vocabulary=st.sampled_from([1, 2, 37, 501]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    top_p=st.sampled_from([1e-6, 0.31, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 7, 1000]),
    min_p=st.sampled_from([0.0, 0.013, 0.4, 0.99]),
)
def test_the_tokens_kept_are_transformers_own(
    seed: int, vocabulary: int, scale: float, top_p: float, top_k: int, min_p: float
) -> None:
    log_probs = log_probs_of(seed, vocabulary, scale)
    kept, expected = truncate(log_probs, top_p, top_k, min_p), warped(log_probs, top_p, top_k, min_p)
    assert torch.equal(kept.isfinite(), expected.isfinite())
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    levels=st.integers(1, 6),
    top_p=st.floats(1e-3, 1.0),
    top_k=st.integers(0, 40),
    min_p=st.floats(0.0, 0.99),
)
def test_what_is_kept_is_the_top_of_the_row_and_a_distribution(
    seed: int, levels: int, top_p: float, top_k: int, min_p: float
) -> None:
    """With few levels, most tokens tie."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randint(1, levels + 1, (3, 33), generator=generator).float()
    log_probs = (p / p.sum(-1, keepdim=True)).log()
    out = truncate(log_probs, top_p, top_k, min_p)
    is_kept, p = out > -torch.inf, log_probs.double().exp()
    assert is_kept.gather(1, p.argmax(-1, keepdim=True)).all() or bool(
        (is_kept & (p == p.amax(-1, True))).any(-1).all()
    )
    least = p.masked_fill(~is_kept, torch.inf).amin(-1, keepdim=True)
    assert (p[~is_kept] <= least.expand_as(p)[~is_kept]).all(), "nothing more probable than a kept token is out"
    torch.testing.assert_close(out.double().exp().sum(-1), torch.ones(3).double(), rtol=0, atol=1e-6)
    mass = (p * is_kept).sum(-1, keepdim=True)
    torch.testing.assert_close(out.double().exp(), p * is_kept / mass, rtol=0, atol=1e-6)
    if min_p == 0 and top_k == 0:
        assert (mass > top_p - 1e-5).all() and ((mass - least)[is_kept.sum(-1) > 1] < top_p + 1e-5).all()


def test_nothing_is_left_out_without_the_options_and_ties_at_the_edge_of_top_k_stay() -> None:
    log_probs = log_probs_of(0, 50, 1.0)
    assert torch.equal(truncate(log_probs), log_probs.log_softmax(-1))
    assert torch.equal(truncate(log_probs, top_k=50), log_probs.log_softmax(-1))
    tied = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    assert (truncate(tied, top_k=2) > -torch.inf).tolist() == [[True] * 4]
    assert (truncate(tied, top_k=1) > -torch.inf).tolist() == [[True, False, False, False]]


# ------------------------------------------------------------------ what sampling records


@pytest.fixture
def policy(policy: Policy) -> Policy:
    """The small decoder, with so many end tokens that completions have many lengths."""
    policy.model.generation_config.eos_token_id = list(range(1, 98, 7))
    return policy


def roll_out(policy: Policy, chunk: int = 512, **changes: Any) -> Completions:
    prompts = [policy.encode_prompt(text) for text in ("1+2=", "12345*6=", "7=")]
    return sample(policy, Request(prompts, 4, 9, u=uniforms(12, 9, 1, 2), **changes), chunk=chunk)


def kept_rows(completions: Completions) -> list[set[int]]:
    """The support of each token, B * T."""
    assert completions.support is not None
    tokens, offsets = completions.support.tokens.tolist(), completions.support.offsets.tolist()
    rows = [tokens[start:end] for start, end in itertools.pairwise(offsets)]
    assert all(len(set(row)) == len(row) for row in rows)
    return [set(row) for row in rows]


@pytest.mark.parametrize("changes", SETTINGS, ids=IDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_support_of_each_token_is_what_it_was_sampled_from(
    policy: Policy, changes: dict[str, Any], temperature: float
) -> None:
    out = roll_out(policy, temperature=temperature, **changes)
    assert out.support is not None and out.support.tokens.dtype == torch.int32
    keep = out.mask.shape[1]
    with torch.no_grad():
        logits = policy.model.get_output_embeddings()(hidden_states(policy.model, out.tokens, out.attention_mask, keep))
    kept = warped((logits.float() / temperature).log_softmax(-1).flatten(0, 1), **changes)
    expected = [set(row.isfinite().nonzero().flatten().tolist()) for row in kept]
    is_live = out.mask.flatten().tolist()
    rows = kept_rows(out)
    assert len(rows) == out.mask.numel()
    assert all(row == (kept if live else set()) for row, kept, live in zip(rows, expected, is_live, strict=True))
    assert 0 < sum(is_live) < len(is_live)
    logp = kept.gather(1, out.targets.flatten()[:, None]).view_as(out.logp)
    torch.testing.assert_close(out.logp[out.mask].double(), logp[out.mask], rtol=0, atol=1e-5)


def test_the_support_follows_chunks_and_rows_and_is_there_only_if_sampling_truncates(policy: Policy) -> None:
    out, chunked = roll_out(policy, top_p=0.7), roll_out(policy, chunk=4, top_p=0.7)
    assert kept_rows(out) == kept_rows(chunked)
    length = out.mask.shape[1]
    for index in (slice(0, 5), slice(7, 12), slice(8, 99), slice(3, 3), slice(None)):
        part = out.rows(index)
        assert kept_rows(part) == [
            row for i in range(12)[index] for row in kept_rows(out)[i * length : (i + 1) * length]
        ]
    assert roll_out(policy).support is None


# ------------------------------------------------------------------ the ratio


def ratios(policy: Policy, completions: Completions, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Each sampled token's and each sequence's ratio of the training path to the sampler, in float64."""
    rows = len(completions.mask)
    experience = Experience(completions, torch.zeros(rows), torch.arange(rows), None)
    logp = training_logp(policy.model, experience, temperature, 5)
    r = ((logp - completions.logp) * completions.mask).double()
    return r[completions.mask].exp(), r.sum(dim=1).exp()


@pytest.mark.parametrize("changes", SETTINGS, ids=IDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_one_over_the_support_and_the_kept_mass_without_it(
    policy: Policy, changes: dict[str, Any], temperature: float
) -> None:
    sampler = InProcessSampler(policy.model, RolloutConfig(path="same", lag=0))
    prompts = [policy.encode_prompt(text) for text in ("1+2=", "12345*6=", "7=")]
    request = Request(prompts, 8, 9, u=uniforms(24, 9, 3, 2), temperature=temperature, **changes)
    out = sampler.sample(policy, request)
    token, sequence = ratios(policy, out, temperature)
    assert (token - 1).abs().max() < 1e-5 and (sequence - 1).abs().max() < 5e-5
    keep = out.mask.shape[1]
    with torch.no_grad():
        logits = policy.model.get_output_embeddings()(hidden_states(policy.model, out.tokens, out.attention_mask, keep))
    p = (logits.double() / temperature).softmax(-1)
    is_kept = warped(p.log().flatten(0, 1), **changes).isfinite().view_as(p)
    mass = (p * is_kept).sum(-1)
    token, sequence = ratios(policy, dataclasses.replace(out, support=None), temperature)
    torch.testing.assert_close(token, mass[out.mask], rtol=1e-4, atol=0)
    torch.testing.assert_close(sequence, mass.masked_fill(~out.mask, 1.0).prod(dim=1), rtol=1e-3, atol=0)
    assert 0.1 < token.mean() < 0.85, "the fault that the support repairs"


@pytest.mark.parametrize("changes", SETTINGS, ids=IDS)
def test_the_mismatch_before_training_is_over_the_support(policy: Policy, changes: dict[str, Any]) -> None:
    config = RolloutConfig(path="same", lag=0, **changes)
    task = make_task(TaskConfig(options=("num_steps=1",)), seed=0)
    sampler = InProcessSampler(policy.model, config)
    found = measure_mismatch(sampler, policy, task, config, max_new_tokens=8, seed=0, micro_batch=5)
    assert found["k3_kl"] < 1e-10 and abs(found["max_ratio"] - 1) < 1e-4


# ------------------------------------------------------------------ whole runs


def small(runs: Path, name: str, rollout: dict[str, Any], **changes: Any) -> TrainConfig:
    update = UpdateConfig(method="bypass-token", lr=1e-3, minibatches=1) if "update" not in changes else None
    config = TrainConfig(
        task=TaskConfig(options=("num_steps=1", "operators=+")),
        model=ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
        warmup=WarmupConfig(accuracy=0),
        rollout=RolloutConfig(prompts=8, samples=4, max_new_tokens=6, **{"path": "same", "lag": 0, **rollout}),
        steps=1,
        eval_prompts=2,
        diagnose_every=1,
        measure_clean=True,
        checkpoint_every=2,
        runs=runs,
        name=name,
        device="cpu",
    )
    return dataclasses.replace(config, **({"update": update} if update else {}), **changes)


@pytest.mark.parametrize("changes", SETTINGS, ids=IDS)
def test_a_runs_first_step_has_ratio_one_where_it_had_the_kept_mass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    (right,) = read_metrics(train(small(tmp_path, "right", changes)) / "metrics.jsonl")
    for prefix in ("", "clean/"):
        for level in ("token", "sequence"):
            for figure in ("mean", "min", "max"):
                assert right[f"{prefix}{level}_ratio/{figure}"] == pytest.approx(1, abs=1e-4), (prefix, level, figure)
    assert right["mismatch/k3_kl"] < 1e-9 and right["clip_low_frac"] == 0
    # the old way: over the whole vocabulary
    monkeypatch.setattr(loop_update, "_head", lambda model, completions: loop_update.output_head(model))
    (wrong,) = read_metrics(train(small(tmp_path, "wrong", changes)) / "metrics.jsonl")
    assert wrong["token_ratio/mean"] < 0.85 and wrong["sequence_ratio/mean"] < 0.6
    assert wrong["reward"] == right["reward"], "the same completions"


@pytest.mark.parametrize("method", ["alp-sequence", "grpo"])
def test_a_truncated_run_resumes_bit_for_bit(tmp_path: Path, method: str) -> None:
    update = UpdateConfig(method=method, lr=1e-3, minibatches=2, micro_batch=3)
    changes = {"path": "int8", "lag": 1, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    folder = train(small(tmp_path, "whole", changes, update=update, steps=4))
    earlier = shutil.copytree(folder, tmp_path / "earlier")
    (earlier / "checkpoints" / "00000004.pt").unlink()
    train(TrainConfig(), resume=earlier)
    assert without_times(earlier) == without_times(folder)
    one, other = newest(earlier)["model"], newest(folder)["model"]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    metrics = read_metrics(folder / "metrics.jsonl")
    assert all(m["mismatch/k3_kl"] < 0.05 for m in metrics), "over the support, what quantisation leaves"


@pytest.mark.parametrize(
    ("rollout", "update", "says"),
    [
        ({"top_p": 0.0}, {}, r"rollout\.top_p=0\.0; it needs a number in \(0, 1\]"),
        ({"top_p": 1.5}, {}, r"rollout\.top_p=1\.5"),
        ({"top_k": -1}, {}, r"rollout\.top_k=-1; it needs 0 or more"),
        ({"min_p": 1.0}, {}, r"rollout\.min_p=1\.0; it needs a number in \[0, 1\)"),
        ({"min_p": -0.1}, {}, r"rollout\.min_p=-0\.1"),
        ({"top_p": 0.9}, {"backward": "sampled"}, r"update\.backward='sampled'.*exact with rollout\.top_p=0\.9"),
        (
            {"top_k": 5, "min_p": 0.1},
            {"layers": "logits"},
            r"update\.layers='logits'.*rollout\.top_k=5, rollout\.min_p",
        ),
        ({"top_p": 0.9, "path": "vllm"}, {}, r"rollout\.top_k=0; it needs 1 or more.*vllm.*rollout\.top_p=0\.9"),
    ],
)
def test_options_that_do_not_fit_are_named_together(rollout: dict[str, Any], update: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TrainConfig(rollout=RolloutConfig(**rollout), update=UpdateConfig(**update))


def test_options_that_fit_are_taken() -> None:
    TrainConfig(rollout=RolloutConfig(path="vllm", top_k=5, top_p=0.9))
    TrainConfig(rollout=RolloutConfig(top_p=0.9), update=UpdateConfig(method="grpo", layers="logits"))
    TrainConfig(update=UpdateConfig(backward="sampled"))
