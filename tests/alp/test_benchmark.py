"""Benchmarks: the estimators equal brute force, and no number of chunks or ranks drops a problem."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alp.config import RolloutConfig, TaskConfig, TrainConfig
from alp.errors import UserError
from alp.measures.accuracy import evaluate
from alp.measures.benchmark import benchmark, evaluate_on, pass_at_k
from alp.measures.settings import EvalConfig
from alp.policy.models import Policy
from alp.ranks.world import World
from alp.rollout import Request, sample, uniforms
from alp.setup import make_sampler, make_task
from alp.tasks.task import Problem, Score
from tests.support.runs import run_cli
from tests.support.tiny_models import write_llama, write_sums


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < correct for i in range(n)], k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact() -> None:
    for correct, k in ((1, 1), (3, 512), (700, 2), (1, 1023)):
        exact = 1 - math.comb(1024 - correct, k) / math.comb(1024, k)
        assert pass_at_k(1024, correct, k) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(10_000, 0, 5000) == 0.0 and pass_at_k(10_000, 10_000, 1) == 1.0


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, 0, 5), (4, 0, 0), (4, -1, 2)])
def test_pass_at_k_refuses_what_cannot_be(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="it needs 1 <= k <= n"):
        pass_at_k(n, correct, k)


# ------------------------------------------------------------------ all problems, however they are shared out


def even_length(text: str) -> Score:
    return Score(float(len(text) % 2 == 0), parsed=len(text) > 3)


TASK = make_task(TaskConfig(), seed=0)
PROBLEMS = [Problem(f"{i}+{i * i}=", "", even_length) for i in range(11)]


class Rank(World):
    """One of several ranks; the test adds up their sums."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.values: list[float] = []

    def sum(self, values: list[float]) -> list[float]:
        self.values = values
        return values


def run(policy: Policy, world: World, chunk: int = 512, **changes: Any) -> dict[str, float]:
    settings = EvalConfig(**{"samples": 4, **changes})
    return benchmark(policy, sample, TASK, PROBLEMS, settings, max_new_tokens=8, seed=3, world=world, chunk=chunk)


def test_chunks_and_ranks_change_nothing_and_drop_no_problem(policy: Policy) -> None:
    whole = run(policy, World("cpu"))
    assert whole["problems"] == 11 and 0 < whole["avg@4"] < 1 and 0 < whole["unparsed"] < 1
    assert run(policy, World("cpu"), chunk=3) == whole
    ranks = [Rank(rank, 3) for rank in range(3)]
    for rank in ranks:
        run(policy, rank, chunk=8)
    total = [sum(values) for values in zip(*(rank.values for rank in ranks), strict=True)]
    *correct, unparsed, truncated = total
    assert sum(correct) / 44 == whole["avg@4"]
    assert (unparsed / 44, truncated / 44) == (whole["unparsed"], whole["truncated"])


def test_the_table_follows_from_the_completions(policy: Policy) -> None:
    u = torch.cat([uniforms(4, 8, 3, 1 << 31 | i) for i in range(11)])
    completions = sample(policy, Request([policy.encode_prompt(p.question) for p in PROBLEMS], 4, 8, u=u))
    right = [sum(even_length(t).correct for t in completions.texts[i : i + 4]) for i in range(0, 44, 4)]
    report = run(policy, World("cpu"))
    assert list(report) == ["problems", "avg@4", "pass@1", "pass@2", "pass@4", "unparsed", "truncated"]
    assert report["avg@4"] == pytest.approx(sum(right) / 44) == pytest.approx(report["pass@1"])
    assert report["pass@4"] == pytest.approx(sum(c > 0 for c in right) / 11)
    pairs = [any(pair) for c in right for pair in itertools.combinations([i < c for i in range(4)], 2)]
    assert report["pass@2"] == pytest.approx(sum(pairs) / len(pairs))
    assert list(run(policy, World("cpu"), samples=6))[2:-2] == ["pass@1", "pass@2", "pass@4", "pass@6"]


def test_nucleus_sampling_keeps_the_fewest_tokens_that_hold_the_mass(policy: Policy) -> None:
    prompt = [policy.encode_prompt("1+2=")]
    with torch.no_grad():
        p = policy.model(torch.tensor(prompt)).logits[0, -1].softmax(-1)
    ordered = p.sort(descending=True).values
    kept = int((ordered.cumsum(0) < 0.6).sum()) + 1
    out = sample(policy, Request(prompt, 4000, 1, u=uniforms(4000, 1, 0, 0), top_p=0.6))
    drawn = out.targets[:, 0]
    assert p[drawn.unique()].min() >= ordered[kept - 1]
    expected = (p[drawn] / ordered[:kept].sum()).log()
    torch.testing.assert_close(out.logp[:, 0], expected, rtol=0, atol=1e-5)
    only = sample(policy, Request(prompt, 5, 1, u=uniforms(5, 1, 0, 0), top_p=1e-6))
    assert (only.targets == p.argmax()).all() and (only.logp == 0).all()


def test_the_loops_evaluation_keeps_its_keys(policy: Policy) -> None:
    task = make_task(TaskConfig(options=("num_steps=1",)), seed=0)
    report = evaluate(policy, task, make_sampler, RolloutConfig(), num_problems=5, max_new_tokens=4, seed=0)
    assert list(report) == ["train", "pass@4", "reward", "unparsed", "truncated", "rollout", "greedy"]


# ------------------------------------------------------------------ the command


def test_several_tasks_make_one_table_their_mean_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_llama(tmp_path / "model")
    one, other = write_sums(tmp_path / "one.jsonl", 5), write_sums(tmp_path / "other.jsonl", 3)
    out = tmp_path / "table.json"
    arguments = ["eval", model, "--on", one, other, "mod_chain", "--samples", 2, "--max-new-tokens", 4]
    assert run_cli(monkeypatch, *arguments, "--json", out, "--eval-prompts", 4, "--device", "cpu") == 0
    shown = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in shown] == ["task", "one", "other", "mod_chain", "mean"]
    assert shown[0].split()[1:] == ["problems", "avg@2", "pass@1", "pass@2", "unparsed", "truncated"]
    tasks = json.loads(out.read_text())["tasks"]
    assert [tasks[name]["problems"] for name in ("one", "other", "mod_chain", "mean")] == [5, 3, 4, 12]
    for key in ("avg@2", "unparsed"):
        assert tasks["mean"][key] == pytest.approx(sum(tasks[n][key] for n in ("one", "other", "mod_chain")) / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "2"], "belong to --on"),
        (["--on", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--on", "sums.jsonl", "--samples", "0"], "samples=0; it needs 1 or more"),
        (["--on", "sums.jsonl", "--top-p", "0"], "top_p=0.0; it needs a number in (0, 1]"),
        (["--on", "sums.jsonl", "sums.jsonl"], "names must differ"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "sums.jsonl", 3)
    assert run_cli(monkeypatch, "eval", "./model", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_runs_own_options_are_not_changed_when_it_is_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(TrainConfig().to_json())
    (tmp_path / "metrics.jsonl").write_text("")
    changed = dataclasses.replace(TrainConfig(), seed=1)
    with pytest.raises(UserError, match=r"evaluated with its own config.json"):
        evaluate_on(str(tmp_path), changed, EvalConfig(on=("mod_chain",)))
