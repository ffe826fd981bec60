"""Rollouts of several turns: what ends a turn, what is read back, and the place of every token's log-probability."""

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alp.advantage import centre
from alp.config import ModelConfig, RolloutConfig, TaskConfig, ToolsConfig, TrainConfig, UpdateConfig, WarmupConfig
from alp.errors import UserError
from alp.policy.models import Policy, hidden_states
from alp.policy.tiny import character_tokenizer, make_tiny
from alp.ranks.world import World
from alp.rollout import Completions, Request, Sample, sample, uniforms
from alp.runs.files import read_metrics
from alp.runs.folder import Run
from alp.sampling.vllm import cut_off
from alp.setup import make_task, with_tools
from alp.tasks.gym import ToolChainTask
from alp.tasks.tool_chain import BOXED, CLOSE, OPEN, PRINT, write_transcript
from alp.tools.monty import MontyTool
from alp.tools.tool import STATUSES, Status, ToolResult
from alp.tools.tool_task import INSTRUCTION, ToolTask
from alp.tools.turns import LABEL, FenceStop, encode_observation, find_code, observe, sample_turns
from alp.train import train
from alp.update import Experience, Updater, last_token, row_ids, training_logp
from tests.support.tiny_models import SMALL
from tests.support.updates import step_gradients

PIECES = (OPEN, PRINT, CLOSE, BOXED, LABEL)
LIMIT, MAX_TURNS, OBSERVATION = 48, 4, 12


class Echo:
    """A tool whose results have all kinds and lengths and depend on the code alone; records its calls."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def run(self, codes: list[str]) -> list[ToolResult]:
        self.codes += codes
        return [result_of(code) for code in codes]


def result_of(code: str) -> ToolResult:
    number = hashlib.sha256(code.encode()).digest()[0]
    status: Status = STATUSES[number % 8] if number % 8 < len(STATUSES) else "ok"
    return ToolResult(status, "7" * (number % 9), "" if status == "ok" else f"E{number}", 0.0)


def babbler(seed: int = 0) -> Policy:
    """A random model with an output bias that makes code, answers and end tokens frequent."""
    torch.manual_seed(seed)
    policy = make_tiny(SMALL, PIECES)
    head = policy.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    liked = {OPEN: 7.5, CLOSE: 7.5, BOXED: 5.5, "}": 6.5, "<eos>": 4.5, "\n": 4.0, "`": 5.0}
    with torch.no_grad():
        for token, bias in liked.items():
            head.bias[policy.tokenizer.convert_tokens_to_ids(token)] = bias
    return policy


QUESTIONS = ("1+2=", "12345*6=", "7=", "99-1=")


def roll_out(
    policy: Policy, questions: tuple[str, ...] = QUESTIONS, samples: int = 16, by: Sample = sample, **changes: Any
) -> Completions:
    prompts = [policy.encode_prompt(question) for question in questions]
    u = uniforms(len(questions) * samples, LIMIT, seed=1, batch=2)
    options: dict[str, Any] = {"tool": Echo(), "max_turns": MAX_TURNS, "observation_tokens": OBSERVATION}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    request = dataclasses.replace(Request(prompts, samples, LIMIT, u=u), **changes)
    return sample_turns(by, policy, request, **options)


def segments(completions: Completions, row: int) -> list[tuple[bool, list[int]]]:
    """Split a response into runs of sampled tokens, one per turn, and of tokens that were read."""
    width = completions.tokens.shape[1] - completions.mask.shape[1]
    count = int(completions.attention_mask[row, width:].sum())
    assert completions.turns is not None
    parts: list[tuple[bool, list[int]]] = []
    is_new = True
    for t in range(count):
        is_sampled = bool(completions.mask[row, t])
        if is_new or parts[-1][0] != is_sampled:
            parts.append((is_sampled, []))
        parts[-1][1].append(int(completions.targets[row, t]))
        is_new = bool(completions.turns.ends[row, t])
    return parts


# ------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nprint(1)\n```", (0, "print(1)\n")),
        ("so\n```py\na\n```", (3, "a\n")),
        ("```\na\n``` more ```python\nb\n```", (0, "a\n")),
        ("``` Python \na```", (0, "a")),
        ("```python\n```", (0, "")),
        ("```json\n{}\n```\n```python\nb\n```", (15, "b\n")),
        ("use ```x``` and ```python\nb\n```", (16, "b\n")),
        ("```python\nprint(1)\n``", None),
        ("```python print(1)```", None),
        ("```", None),
        ("``````", None),
        ("", None),
    ],
)
def test_the_first_complete_python_block_is_found(text: str, expected: tuple[int, str] | None) -> None:
    assert find_code(text) == expected


def test_what_is_read_is_what_was_printed_or_the_last_line_of_the_error() -> None:
    assert observe(ToolResult("ok", "\n1\n2\n", "", 0)) == "1\n2"
    assert observe(ToolResult("ok", " \n", "", 0)) == "nothing was printed"
    assert observe(ToolResult("error", "1\n", "ValueError: no", 0)) == "ValueError: no"
    assert observe(ToolResult("crashed", "", "", 0)) == "crashed"


def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as large models have: its tokens split code fences and join them with other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["``", "``", "`\n", "`\n", "`\n", ")\n", "print(", "Code execution result: "] * 9, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("tokenizer", [character_tokenizer(), character_tokenizer(PIECES), byte_pairs()])
def test_a_turn_stops_at_the_token_that_closes_the_fence(tokenizer: PreTrainedTokenizerBase) -> None:
    stop = FenceStop(tokenizer)
    for text in ("so ```python\nprint(1)\n```\nand", "a ``b`` ```json\n1\n``` ``` \nprint('é')\n``` x"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        other = tokenizer.encode(
            "```python\nprint(1) `` and so it goes on and on and on, forever", add_special_tokens=False
        )
        length = min(len(ids), len(other))
        closed = []
        for t in range(1, length + 1):
            tokens = torch.tensor([ids[:t], other[:t], ids[:t]])
            stopped = stop(tokens, torch.tensor([True, True, False])).tolist()
            assert stopped[1:] == [False, False], "text that is still open, and a row that has ended"
            expected = find_code(tokenizer.decode(ids[:t])) is not None and "`" in tokenizer.decode(ids[t - 1 : t])
            assert stopped[0] == expected
            closed.append(stopped[0])
        assert sum(closed) == 1 and tokenizer.decode(ids[: closed.index(True) + 1]).rstrip("\n").endswith("```")


@pytest.mark.parametrize("tokenizer", [character_tokenizer(PIECES), byte_pairs()])
def test_observations_are_cut_by_tokens_and_cannot_write_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, is_cut = encode_observation(tokenizer, "340", 40)
    assert tokenizer.decode(ids) == f"{LABEL}340\n" and not is_cut
    for text in ("7" * 300, "1\n" * 10**6):
        ids, is_cut = encode_observation(tokenizer, text, 40)
        assert len(ids) == 40 and is_cut and tokenizer.decode(ids).endswith("\n")
    ids, _ = encode_observation(tokenizer, "a<eos><pad>b", 40)
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


# ------------------------------------------------------------------ token ids end to end


def test_every_kind_of_end_occurs_in_these_rollouts() -> None:
    out = roll_out(babbler())
    assert out.turns is not None
    figures = {name: x.sum().item() for name, x in out.turns.figures.items()}
    assert len(set(out.turns.figures["turns"].tolist())) == MAX_TURNS
    assert all(figures[name] > 0 for name in ("void", "calls", "cut", *STATUSES)), figures
    assert 0 < out.truncated.sum() < len(out.truncated)
    lengths = out.attention_mask.sum(dim=1).tolist()
    assert len(set(lengths)) > 10


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_scoring_a_sequence_again_gives_the_recorded_logp_at_each_sampled_token(seed: int, temperature: float) -> None:
    policy = babbler(seed)
    out = roll_out(policy, temperature=temperature)
    keep = out.mask.shape[1]
    with torch.no_grad():
        hidden = hidden_states(policy.model, out.tokens, out.attention_mask, keep)
        logits = policy.model.get_output_embeddings()(hidden).float() / temperature
    expected = logits.log_softmax(-1).gather(-1, out.targets[..., None]).squeeze(-1)
    assert (out.logp - expected)[out.mask].abs().max() < 2e-5
    assert (out.logp[~out.mask] == 0).all()
    experience = Experience(out, torch.zeros(len(out.logp)), torch.arange(len(out.logp)), None)
    scored = training_logp(policy.model, experience, temperature, 17)
    assert (out.logp - scored)[out.mask].abs().max() < 2e-5


@pytest.mark.parametrize("changes", [{"top_p": 0.8}, {"top_k": 6, "min_p": 0.01}], ids=["top_p", "top_k and min_p"])
def test_the_support_of_a_turn_stays_with_its_tokens(changes: dict[str, Any]) -> None:
    policy = babbler()
    out = roll_out(policy, **changes)
    assert out.support is not None and out.turns is not None and out.turns.figures["turns"].max() > 1
    assert torch.equal(out.support.counts > 0, out.mask.flatten()), "what was read has no support"
    experience = Experience(out, torch.zeros(len(out.logp)), torch.arange(len(out.logp)), None)
    scored = training_logp(policy.model, experience, 1.0, 17)
    assert (out.logp - scored)[out.mask].abs().max() < 2e-5
    whole = dataclasses.replace(experience, completions=dataclasses.replace(out, support=None))
    assert (training_logp(policy.model, whole, 1.0, 17) - out.logp)[out.mask].exp().mean() < 0.98
    chunked = roll_out(policy, by=functools.partial(sample, chunk=16), **changes)
    assert chunked.support is not None and all(map(torch.equal, chunked.support, out.support))


def test_a_response_is_turns_and_what_the_tool_said_of_their_code() -> None:
    policy, tool = babbler(), Echo()
    out = roll_out(policy, tool=tool)
    assert out.turns is not None
    asked: list[str] = []
    for row in range(len(out.texts)):
        parts = segments(out, row)
        turns = [ids for is_sampled, ids in parts if is_sampled]
        assert [is_sampled for is_sampled, _ in parts] == [i % 2 == 0 for i in range(len(parts))]
        assert len(turns) == out.turns.figures["turns"][row]
        for before, observed in zip(parts[::2], parts[1::2], strict=False):
            found = find_code(policy.decode(before[1]))
            assert found is not None and find_code(policy.decode(before[1][:-1])) is None
            assert observed[1] == encode_observation(policy.tokenizer, observe(result_of(found[1])), OBSERVATION)[0]
            asked.append(found[1])
        last = policy.decode(turns[-1])
        found = find_code(last)
        assert out.texts[row] == (last if found is None else last[: found[0]])
        has_answer = "\\boxed{" in out.texts[row] and "}" in out.texts[row].rpartition("\\boxed{")[2]
        assert out.turns.figures["void"][row] == (found is None and not has_answer)
        has_ended = turns[-1][-1] in policy.eos_ids
        assert bool(out.truncated[row]) == (not has_ended and not (found is not None and has_answer))
        assert parts[-1][0], "nothing is read that nothing follows"
        # sampled and observed tokens together stay within the limit
        assert sum(len(ids) for _, ids in parts) <= LIMIT
    calls = int(out.turns.figures["calls"].sum())
    assert calls == len(tool.codes) and set(asked) <= set(tool.codes)
    assert sum(out.turns.figures[status].sum() for status in STATUSES) == calls


def test_cutting_off_afterwards_is_stopping_in_time() -> None:
    policy = babbler()
    asked = [policy.encode_prompt(text) for text in ("1+2=", "34*5=")]
    u = uniforms(32, 40, 5, 6)

    def stop(tokens: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        return alive & (tokens[:, -1] % 7 == 3)

    whole = sample(policy, Request(asked, 16, 40, u=u, top_p=0.9))
    in_time = sample(policy, Request(asked, 16, 40, u=u, top_p=0.9, stop=stop))
    afterwards = cut_off(policy, whole, stop)
    assert in_time.support is not None and afterwards.support is not None
    rows = in_time.mask.flatten()
    assert all(map(torch.equal, afterwards.support.select(rows), in_time.support.select(rows)))
    assert 0 < int(in_time.mask.sum()) < int(whole.mask.sum())
    for name in ("tokens", "attention_mask", "mask", "truncated"):
        assert torch.equal(getattr(afterwards, name), getattr(in_time, name)), name
    assert torch.equal(afterwards.logp, in_time.logp)
    assert afterwards.texts == in_time.texts


def test_trajectories_do_not_depend_on_chunks_padding_or_company() -> None:
    policy = babbler()
    together = roll_out(policy)
    chunked = roll_out(policy, by=functools.partial(sample, chunk=16))
    alone = roll_out(policy, QUESTIONS[:1])
    assert torch.equal(together.targets, chunked.targets) and torch.equal(together.mask, chunked.mask)
    for row in range(16):
        assert segments(together, row) == segments(alone, row)


def test_random_numbers_belong_to_places_in_the_response() -> None:
    # a row sampled in one go from the same random numbers agrees up to the end of its first turn
    policy = babbler()
    out = roll_out(policy)
    prompts = [policy.encode_prompt(question) for question in QUESTIONS]
    single = sample(policy, Request(prompts, 16, LIMIT, u=uniforms(64, LIMIT, seed=1, batch=2)))
    assert out.turns is not None
    for row in range(64):
        first = int(out.turns.ends[row].nonzero()[0]) + 1
        assert out.targets[row, :first].tolist() == single.targets[row, :first].tolist()


def test_rows_of_the_forward_keep_their_identity_across_observations() -> None:
    out = roll_out(babbler())
    ids = row_ids(Experience(out, torch.zeros(64), torch.arange(64), None))
    width = out.tokens.shape[1] - out.mask.shape[1]
    for row in range(64):
        places = (ids[row] & ((1 << 20) - 1))[out.attention_mask[row, :-1] == 1]
        assert places.tolist() == list(range(len(places)))
    assert (ids[:, 0] >> 20).tolist() == list(range(64)) and width == 8


def test_one_turn_is_the_single_turn_rollout() -> None:
    policy = babbler()
    out = roll_out(policy, max_turns=1)
    assert out.turns is not None and out.turns.figures["calls"].sum() == 0
    assert torch.equal(out.turns.ends, last_token(out.mask))


def test_the_greedy_path_and_a_real_tool_go_together() -> None:
    policy = babbler()
    out = roll_out(policy, u=None, tool=MontyTool(1))
    again = roll_out(policy, u=None, tool=MontyTool(1))
    assert torch.equal(out.tokens, again.tokens)


# ------------------------------------------------------------------ the loss


def experience_of(policy: Policy, **changes: Any) -> Experience:
    out = roll_out(policy, QUESTIONS[:2], 8)
    generator = torch.Generator().manual_seed(4)
    shift = 0.1 * torch.randn(out.logp.shape, generator=generator)
    out = dataclasses.replace(out, logp=(out.logp + shift) * out.mask)
    advantages = centre(torch.randint(0, 2, (2, 8), generator=generator).float()).flatten()
    return Experience(out, advantages, torch.arange(16), None)


def updater_of(policy: Policy, method: str) -> Updater:
    config = UpdateConfig(method=method, grad_clip=1e9, sigma=1e-12, sigma_lr=0.0, dual_clip=None)
    return Updater(policy.model, config, temperature=1.0, seed=11, world=World("cpu"))


def test_cum_turn_takes_the_ratio_at_each_turns_last_token() -> None:
    policy = babbler()
    experience = experience_of(policy)
    out = experience.completions
    updater = updater_of(policy, "alp-cum-turn")
    with updater.perturbed(0, experience):
        loss = updater.loss(0, experience, float(out.mask.sum()), 16.0).loss
    logp = training_logp(policy.model, experience, 1.0, None).double()
    method, total = updater.method.objective, 0.0
    for row in range(16):
        cumulative, pending, r = 0.0, 0, (logp - out.logp)[row].tolist()
        a = float(experience.advantages[row])
        for t in range(out.mask.shape[1]):
            if out.mask[row, t]:
                cumulative, pending = cumulative + r[t], pending + 1
            assert out.turns is not None
            if out.turns.ends[row, t]:
                rho = float(torch.tensor(cumulative).exp())
                clipped = min(max(rho, 1 - method.clip_low), 1 + method.clip_high)
                value = max(-a * rho, -a * clipped)
                if a < 0 and method.dual_clip is not None:
                    value = min(value, -a * method.dual_clip)
                total, pending = total + pending * value, 0
        assert pending == 0
    assert float(loss) == pytest.approx(total / float(out.mask.sum()), rel=1e-4)
    several = dataclasses.replace(out, turns=None)
    with updater.perturbed(0, experience):
        other = updater.loss(0, dataclasses.replace(experience, completions=several), float(out.mask.sum()), 16.0).loss
    assert abs(float(other) - float(loss)) > 1e-4, "turn ends change nothing here: the test shows nothing"


def gradients(policy: Policy, experience: Experience, method: str) -> list[torch.Tensor]:
    return list(step_gradients(updater_of(policy, method), experience).values())


@pytest.mark.parametrize("method", ["bypass-token", "alp-sequence"])
def test_observations_move_the_gradient_only_as_context(method: str) -> None:
    policy = babbler()
    experience = experience_of(policy)
    whole = gradients(policy, experience, method)
    noisy = experience.completions.logp + 3.0 * ~experience.completions.mask
    other = dataclasses.replace(experience, completions=dataclasses.replace(experience.completions, logp=noisy))
    assert all(torch.equal(a, b) for a, b in zip(whole, gradients(policy, other, method), strict=True))


@pytest.mark.parametrize("method", ["bypass-token", "alp-sequence", "alp-cum-turn"])
def test_excluded_void_trajectories_have_no_gradient_but_count_in_their_group(method: str) -> None:
    policy = babbler()
    experience = experience_of(policy)
    assert experience.completions.turns is not None
    is_void = experience.completions.turns.figures["void"] > 0
    assert 0 < is_void.sum() < 16
    excluded = dataclasses.replace(experience, completions=experience.completions.without_void())
    assert torch.equal(excluded.advantages, experience.advantages)
    assert excluded.completions.mask.any(dim=1).tolist() == (~is_void).tolist()
    assert torch.equal(excluded.completions.attention_mask, experience.completions.attention_mask)
    wild = torch.where(is_void, 100.0, experience.advantages)
    first = gradients(policy, excluded, method)
    second = gradients(policy, dataclasses.replace(excluded, advantages=wild), method)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    only_void = [i for i in range(16) if is_void[i]][:1]
    nothing = gradients(policy, excluded.rows(slice(only_void[0], only_void[0] + 1)), method)
    assert all((g == 0).all() for g in nothing)


# ------------------------------------------------------------------ the task


def tool_task(**changes: Any) -> ToolTask:
    config = TrainConfig(task=TaskConfig(name="tool_chain"), **changes)
    task = with_tools(make_task(config.task, config.seed), config)
    assert isinstance(task, ToolTask)
    return task


def test_only_the_models_own_last_box_is_an_answer() -> None:
    problem = tool_task().problem("train", 5)
    assert problem.score(f"\\boxed{{{problem.answer}}}") == (1.0, True)
    assert problem.score(f"\\boxed{{1}} or \\boxed{{{problem.answer}}}").correct
    assert problem.score("\\boxed{x}") == (0.0, True)
    for text in (problem.answer, f"\\boxed{{{problem.answer}", ""):
        assert problem.score(text) == (0.0, False)


def test_demonstrations_are_right_without_faults_and_consistent_with_them() -> None:
    inner, tool = tool_task().inner, MontyTool(1)
    assert isinstance(inner, ToolChainTask)
    answers = []
    for i in range(40):
        for error in (0.0, 0.2):
            question, parts = inner.transcript(i, error)
            results = tool.run([find_code(part)[1] for part in parts[:-1:2]])  # type: ignore[index]
            assert [r.stdout for r in results] == parts[1::2], "the tool says what the demonstration says it says"
            assert question == inner.entry("warmup", i)["question"]
            answers.append((error, parts[-1] == f"\\boxed{{{inner.entry('warmup', i)['answer']}}}"))
    assert all(is_right for error, is_right in answers if error == 0)
    assert 0 < sum(is_right for error, is_right in answers if error) < 35


def test_a_demonstration_is_made_of_the_tokens_a_rollout_would_hold() -> None:
    task = tool_task()
    inner = task.inner
    assert isinstance(inner, ToolChainTask)
    tokenizer = character_tokenizer(task.pieces)
    _, tokens, is_written = task.encode_demonstration(tokenizer, 3, 0.0)
    _, parts = inner.transcript(3, 0.0)
    assert tokenizer.decode(tokens) == "".join(p if i % 2 == 0 else LABEL + p for i, p in enumerate(parts))
    read = [t for t, written in zip(tokens, is_written, strict=True) if not written]
    expected = [encode_observation(tokenizer, observe(ToolResult("ok", p, "", 0)), 256)[0] for p in parts[1::2]]
    assert read == [t for ids in expected for t in ids]
    assert tokens[:2] == [tokenizer.convert_tokens_to_ids(OPEN), tokenizer.convert_tokens_to_ids(PRINT)]


def test_the_single_turn_tokenizer_is_what_it_was() -> None:
    plain, pieces = character_tokenizer(), character_tokenizer(PIECES)
    assert len(plain) == 99 and len(pieces) == 104
    text = "7+3*4-9=\n ~{x}"
    assert plain.encode(text) == pieces.encode(text)
    assert len(plain.encode(OPEN)) == len(OPEN) and len(pieces.encode("".join(PIECES))) == 5


def test_any_task_can_be_asked_with_a_tool_of_a_model_that_writes_code(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"What is {i}/2?", "answer": f"\\frac{{{i}}}{{2}}"}) for i in range(1, 20))
    )
    model, tools = ModelConfig(path="some/model"), ToolsConfig(max_turns=3)
    for given in (TaskConfig(path=path), TaskConfig(name="basic_arithmetic")):
        config = TrainConfig(task=given, model=model, tools=tools)
        task = with_tools(make_task(given, 0), config)
        assert isinstance(task, ToolTask) and task.max_turns == 3
        problem = task.problem("train", 0)
        assert problem.question.endswith(INSTRUCTION)
        assert problem.score(f"It is \\boxed{{{problem.answer}}}.").correct
        assert not problem.score(f"It is {problem.answer}.").parsed
        config = dataclasses.replace(config, model=ModelConfig())
        with pytest.raises(UserError, match=r"tools.max_turns=3 with task .*; give a model.path"):
            with_tools(make_task(given, 0), config)
    plain = make_task(TaskConfig(), 0)
    assert with_tools(plain, TrainConfig()) is plain
    with pytest.raises(UserError, match=r"tools.max_turns=0; task.name='tool_chain' needs 1 or more"):
        tool_task(tools=ToolsConfig(max_turns=0))


def test_faults_are_miscopied_characters() -> None:
    import random

    right = write_transcript(47, [("+", 85), ("-", 92)], random.Random(0), 0.0)
    assert right == [f"{OPEN}print(47+85{CLOSE}", "132\n", f"{OPEN}print(132-92{CLOSE}", "40\n", "\\boxed{40}"]
    lengths = {len(write_transcript(47, [("+", 85)], random.Random(i), 1.0)[0]) for i in range(50)}
    assert lengths == {len(right[0])}


# ------------------------------------------------------------------ whole runs


def small(runs: Path, **changes: Any) -> TrainConfig:
    """One addition of digits with the tool, learned in seconds."""
    config = TrainConfig(
        task=TaskConfig(name="tool_chain", options=("num_steps=1", "num_digits=1", "operators=+")),
        model=ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
        warmup=WarmupConfig(accuracy=0.3, batch=32, error=0.2),
        rollout=RolloutConfig(prompts=8, samples=4, lag=1),
        update=UpdateConfig(method="alp-cum-turn", minibatches=2),
        tools=ToolsConfig(void="exclude", workers=2),
        steps=4,
        eval_prompts=16,
        diagnose_every=2,
        checkpoint_every=2,
        runs=runs,
    )
    return dataclasses.replace(config, **changes)


def test_a_run_with_a_tool_records_it_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    folder = train(small(tmp_path, name="whole"))
    metrics = read_metrics(folder / "metrics.jsonl")
    assert len(metrics) == 4
    for m in metrics:
        assert {"turns", "void", "tool/calls", "tool/cut", "tool_s", *(f"tool/{s}" for s in STATUSES)} <= m.keys()
        assert 1 <= m["turns"] <= 3 and 0 <= m["void"] <= 1 and m["tool/calls"] <= m["turns"]
        assert sum(m[f"tool/{s}"] for s in STATUSES) == pytest.approx(1) and m["tool_s"] > 0
    assert metrics[0]["accuracy"] > 0 and metrics[0]["turns"] > 1.2
    assert (folder / "plots" / "tools.svg").is_file()
    copy = tmp_path / "stopped"
    shutil.copytree(folder, copy)
    Run(copy).checkpoints()[-1].unlink()
    train(TrainConfig(), resume=copy)
    again = read_metrics(copy / "metrics.jsonl")
    for one, other in zip(metrics, again, strict=True):
        assert {k: v for k, v in one.items() if not k.endswith(("_s", "peak_mib"))} == {
            k: v for k, v in other.items() if not k.endswith(("_s", "peak_mib"))
        }
    loaded = [Run(f).load_checkpoint(torch.device("cpu")) for f in (folder, copy)]
    assert all(torch.equal(loaded[0]["model"][k], loaded[1]["model"][k]) for k in loaded[0]["model"])  # type: ignore[index]


def test_a_run_goes_on_when_every_call_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: MontyTool, codes: list[str]) -> list[ToolResult]:
        return [ToolResult("crashed", "", "no answer", 0.0) for _ in codes]

    config = small(tmp_path, name="broken", warmup=WarmupConfig(accuracy=0), steps=2)
    monkeypatch.setattr(MontyTool, "run", broken)
    monkeypatch.setattr("alp.tools.turns.find_code", lambda text: (0, text) if len(text) > 3 else None)
    metrics = read_metrics(train(config) / "metrics.jsonl")
    assert len(metrics) == 2 and metrics[-1]["reward"] == 0
