"""Problems and their verifiers: right, wrong and unparsed answers, and errors that name the line."""

import random
from pathlib import Path

import pytest
import reasoning_gym

from alp.config import TaskConfig
from alp.errors import UserError
from alp.setup import make_task
from alp.tasks import mod_chain
from alp.tasks.files import last_boxed, read_jsonl
from alp.tasks.math import verify
from tests.support.tiny_models import write_lines


def test_chain_reads_left_to_right_and_writes_every_result() -> None:
    assert mod_chain.write_chain(7, [("+", 3), ("*", 4), ("-", 9)]) == "001"


def test_a_spelled_chain_writes_every_operation() -> None:
    steps = [("+", 3), ("*", 4), ("-", 9)]
    assert mod_chain.write_chain(7, steps, spelled=True) == "7+3=00*4=00-9=1"
    faulty = mod_chain.write_chain(7, steps, random.Random(0), 1.0, spelled=True)
    assert [faulty[5 * i] for i in (1, 2)] == [faulty[5 * i - 1] for i in (1, 2)], "reads on from what was written"
    task = make_task(TaskConfig(options=("num_steps=24", "spelled=True")), seed=0)
    question, answer = task.demonstration(0, error=0.0)
    problem = task.problem("train", 0)
    assert len(question) == 50 and len(answer) == len(problem.answer) == 120
    assert problem.score(problem.answer).correct and not problem.score(problem.answer[:-1]).parsed
    assert not problem.score(problem.answer.replace("=", "+", 1)).parsed


def test_chain_is_registered_beside_reasoning_gyms_own() -> None:
    dataset = reasoning_gym.create_dataset("mod_chain", num_steps=12, seed=3, size=5)
    entry = dataset[2]
    assert len(entry["question"]) == 26 and len(entry["answer"]) == 12
    assert dataset.score_answer(entry["answer"], entry) == 1.0
    assert dataset.score_answer("0" * 12, entry) == float(entry["answer"] == "0" * 12)
    assert reasoning_gym.create_dataset("mod_chain", num_steps=12, seed=3, size=5)[2] == entry


def test_demonstration_goes_wrong_as_often_as_asked_and_reads_on_from_what_was_written() -> None:
    task = make_task(TaskConfig(), seed=0)
    wrong = total = 0
    for i in range(300):
        question, answer = task.demonstration(i, error=0.12)
        value = int(question[0])
        for step, digit in enumerate(answer):
            expected = mod_chain.apply(question[1 + 2 * step], value, int(question[2 + 2 * step]))
            wrong, total, value = wrong + (expected != int(digit)), total + 1, int(digit)
    # 3600 independent steps: four standard deviations of the error rate are 0.022
    assert abs(wrong / total - 0.12) < 0.022


def test_a_problem_is_a_pure_function_of_seed_split_and_index() -> None:
    one, again, other = (make_task(TaskConfig(), seed) for seed in (5, 5, 6))
    assert [one.problem("train", i).question for i in (9, 3)] == [again.problem("train", i).question for i in (9, 3)]
    assert one.problem("train", 3).question != other.problem("train", 3).question
    questions = {split: {one.problem(split, i).question for i in range(500)} for split in ("warmup", "train", "eval")}
    assert not questions["train"] & questions["eval"] and not questions["train"] & questions["warmup"]


def test_unreadable_completions_are_counted_apart_from_wrong_ones() -> None:
    problem = make_task(TaskConfig(), seed=0).problem("train", 0)
    right = problem.answer
    wrong = str((int(right[0]) + 1) % 10) + right[1:]
    assert problem.score(right).correct and problem.score(f"I say <answer>{right}</answer>").correct
    assert problem.score(wrong) == (0.0, True)
    for unreadable in ("", right[:-1], right + "7", "+" * 12):
        assert problem.score(unreadable) == (0.0, False)


def test_any_reasoning_gym_dataset_serves_by_name_with_options() -> None:
    task = make_task(TaskConfig(name="spell_backward", options=("min_word_len=3", "max_word_len=4")), seed=0)
    problem = task.problem("train", 0)
    assert 3 <= len(problem.answer) <= 4 and problem.score(problem.answer).correct
    assert not problem.score(problem.answer[0]).correct


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(name="mod_chains"), "did you mean 'mod_chain'"),
        (TaskConfig(options=("num_step=3",)), "did you mean 'num_steps'"),
        (TaskConfig(options=("num_steps",)), "key=value"),
        (TaskConfig(options=("num_steps=0",)), "num_steps must be positive"),
        (TaskConfig(path=Path("nowhere.jsonl")), "nowhere.jsonl does not exist"),
    ],
)
def test_a_task_that_does_not_fit_is_named(config: TaskConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(config, seed=0)


def test_jsonl_reads_three_shapes(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"prompt": "What is 6 * 7?", "answer": 42},
        "",
        {"question": "Natalia sold clips.", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,072"},
        {"problem": "Halve one.", "level": "1", "solution": r"It is $\boxed{\frac{1}{2}}$."},
    )
    assert [line.answer for line in read_jsonl(path)] == ["42", "1,072", r"\frac{1}{2}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ({"prompt": "a", "label": "b"}, "it needs prompt or question or problem, and answer"),
        ({"prompt": "a", "answer": {"b": 1}}, "must be text"),
        ({"prompt": "a", "answer": " "}, "answer is empty"),
        ({"problem": "a", "solution": "no box"}, "no .boxed"),
        ({"problem": "a", "solution": "\\boxed{1"}, "do not close"),
    ],
)
def test_an_unreadable_line_is_named_by_file_and_number(tmp_path: Path, line: object, message: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"prompt": "a", "answer": "1"}, "", line)
    with pytest.raises(UserError, match=rf"data\.jsonl:3: .*{message}"):
        read_jsonl(path)


def test_math_verify_compares_values_not_texts() -> None:
    assert verify("1,072", "so we get\n#### 1072").correct
    assert verify("5", "so \\boxed{5}\n#### Check\n2+3 is 7 - 2").correct  # here #### is a heading, not the answer
    assert verify(r"\frac{1}{2}", r"Therefore \boxed{0.5}").correct
    assert verify("42", "The answer is 41.") == (0.0, True)
    assert verify("42", "no idea") == (0.0, False)
    assert last_boxed(r"\boxed{1} and \boxed{\sqrt{2}}") == r"\sqrt{2}"
    assert last_boxed(r"first \boxed{3} then \boxed {4}") == "4"
    assert last_boxed(r"so $\boxed 5$ and \fbox{7}") == "7"
    assert last_boxed(r"so $\boxed 5$") == "5"


def test_held_out_lines_are_never_trained_on(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", *({"prompt": f"say {i}", "answer": i} for i in range(40)))
    task = make_task(TaskConfig(path=path), seed=1)
    train = [task.problem("train", i).question for i in range(72)]
    assert len(set(train)) == 36 and set(train[:36]) == set(train[36:]) and train[:36] != train[36:]
    assert not set(train) & {task.problem("eval", i).question for i in range(8)}
