"""Long runs: on a signal they checkpoint; they resume exactly on any ranks, keep the best model, bound disk use."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alp.config import ModelConfig, RolloutConfig, TrainConfig, UpdateConfig
from alp.errors import UserError
from alp.policy.load import load_policy
from alp.policy.tiny import make_tiny
from alp.runs.files import read_metrics
from alp.runs.folder import Run
from alp.runs.signals import StopRequest
from alp.train import Trainer, train
from tests.support.long_run import score
from tests.support.runs import newest, without_times
from tests.support.tiny_models import SMALL

ROOT = Path(__file__).parents[2]
STEPS = 4


def config(runs: Path, **changes: Any) -> TrainConfig:
    """Untrained, 16 completions of 4 tokens: what is learned does not matter here."""
    return TrainConfig(
        model=ModelConfig(path=str(runs / "start")),
        rollout=RolloutConfig(prompts=4, samples=4, lag=1, max_new_tokens=4),
        update=UpdateConfig(lr=1e-3, minibatches=2, micro_batch=3, sigma="matched"),
        **{"steps": STEPS, "eval_prompts": 8, "diagnose_every": 2, "device": "cpu", "runs": runs} | changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model to start from. During these tests, runs in this process score as long_run.py does."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    make_tiny(SMALL).save(folder / "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "score", score)
        yield folder


def launch(runs: Path, num_ranks: int, *arguments: str, signalled: str = "", draws: str = "draws") -> list[Any]:
    """Run `alp train ARGUMENTS` on some ranks, as torchrun would; return their exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SIGNALLED": signalled, "OMP_NUM_THREADS": "1"}
        environment |= {"DRAWS": str(runs / f"{draws}-{rank}")}
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.support.long_run", "train", *arguments]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def arguments(runs: Path, name: str, **more: str) -> list[str]:
    """Return the command-line arguments that make `config`."""
    options = {
        "model.path": str(runs / "start"),
        "rollout.prompts": "4",
        "rollout.samples": "4",
        "rollout.lag": "1",
        "rollout.max-new-tokens": "4",
        "update.lr": "1e-3",
        "update.sigma": "matched",
        "update.minibatches": "2",
        "update.micro-batch": "3",
        "steps": str(STEPS),
        "eval-prompts": "8",
        "diagnose-every": "2",
        "device": "cpu",
        "runs": str(runs),
        "name": name,
    }
    return [part for key, value in (options | more).items() for part in (f"--{key}", value)]


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)
    else:
        yield tree


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def one_rank(runs: Path) -> Path:
    """An uninterrupted run in this process."""
    folder = train(config(runs, name="one-rank", checkpoint_every=1))
    assert all(m["grad_norm"] > 0.01 for m in read_metrics(folder / "metrics.jsonl")), "a run that learns nothing"
    return folder


@pytest.fixture(scope="module")
def sharded(runs: Path) -> Path:
    """The same on two sharded ranks."""
    done = launch(runs, 2, *arguments(runs, "sharded", parallel="fsdp"), draws="whole")
    assert [code for code, _ in done] == [0, 0], done
    return runs / "sharded"


@pytest.fixture(scope="module")
def stopped(runs: Path) -> Path:
    """The same, but rank 1 alone gets SIGINT after the second step."""
    done = launch(runs, 2, *arguments(runs, "stopped", parallel="fsdp"), signalled="SIGINT 1", draws="parts")
    assert [code for code, _ in done] == [128 + signal.SIGINT] * 2, done
    assert "alp: stopped after step 2; continue with alp train --resume" in done[0][1]
    assert "Traceback" not in done[0][1] + done[1][1] and "stopped after" not in done[1][1]
    return runs / "stopped"


def test_a_sharded_run_is_that_of_one_process(sharded: Path, one_rank: Path) -> None:
    assert TrainConfig.load(sharded / "config.json").parallel == "fsdp"
    for two, one in zip(without_times(sharded), without_times(one_rank), strict=True):
        assert two.keys() == one.keys()
        for key in ("reward", "num_tokens", "loss", "grad_norm", "k3_kl", "sequence_ratio/max", "sigma"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
    two, one = newest(sharded), newest(one_rank)
    assert two.keys() == one.keys() and two["model"].keys() == one["model"].keys()
    assert [path.name for path in (sharded / "model").iterdir()] == [p.name for p in (one_rank / "model").iterdir()]
    saved = load_policy(ModelConfig(path=str(sharded / "model")), torch.device("cpu")).model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in two["model"].items())


def test_ranks_stop_after_the_same_step_when_one_is_signalled(stopped: Path) -> None:
    assert [m["step"] for m in read_metrics(stopped / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in Run(stopped).checkpoints()] == ["00000002.pt"]
    first, second = newest(stopped)["random"]
    assert not torch.equal(first[0], second[0]), "each rank's random state is its own"


def test_a_stopped_sharded_run_resumes_bit_for_bit_on_as_many_ranks(runs: Path, stopped: Path, sharded: Path) -> None:
    again = runs / "again"
    shutil.copytree(stopped, again)
    done = launch(runs, 2, "--resume", str(again), draws="parts")
    assert [code for code, _ in done] == [0, 0], done
    assert without_times(again) == without_times(sharded)
    assert_same_state(newest(again), newest(sharded))
    for rank in range(2):
        assert (runs / f"parts-{rank}").read_text() == (runs / f"whole-{rank}").read_text()


def test_a_stopped_sharded_run_resumes_on_one_rank(runs: Path, stopped: Path, one_rank: Path) -> None:
    again = runs / "on-one"
    shutil.copytree(stopped, again)
    train(TrainConfig(), resume=again)
    assert without_times(again)[:2] == without_times(stopped)
    for resumed, one in zip(without_times(again), without_times(one_rank), strict=True):
        for key in ("reward", "loss", "grad_norm", "k3_kl", "sigma"):
            assert resumed[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key


def test_a_process_sent_sigterm_resumes_exactly(runs: Path, one_rank: Path) -> None:
    ((code, said),) = launch(runs, 1, *arguments(runs, "alone"), signalled="SIGTERM 0")
    assert code == 128 + signal.SIGTERM, said
    assert "alp: SIGTERM: stopping after this step and a checkpoint" in said and "stopped after step 2" in said
    assert [path.name for path in Run(runs / "alone").checkpoints()] == ["00000002.pt"]
    train(TrainConfig(), resume=runs / "alone")
    assert without_times(runs / "alone") == without_times(one_rank)
    state, expected = newest(runs / "alone"), newest(one_rank)
    assert_same_state(*({k: v for k, v in s.items() if k != "random"} for s in (state, expected)))  # long_run.py draws


# ------------------------------------------------------------------ the request itself


def ask(*lines: str) -> subprocess.CompletedProcess[str]:
    """Run lines of Python in a process with an open StopRequest; return what it has recorded at the end."""
    program = ["import os, signal, time", "from alp.runs.signals import StopRequest"]
    program += ["signal.signal(signal.SIGINT, signal.default_int_handler)", "request = StopRequest()"]
    program += [*lines, "print(request.signum)"]
    command = [sys.executable, "-c", "\n".join(program)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


TERM = "os.kill(os.getpid(), signal.SIGTERM)"


def test_a_signal_that_comes_twice_at_once_is_one_request() -> None:
    done = ask("request.__enter__()", TERM, TERM, "os.kill(os.getpid(), signal.SIGINT)")
    assert done.returncode == 0 and done.stdout == f"{int(signal.SIGTERM)}\n"
    assert done.stderr.count("repeat to stop at once") == 1


def test_a_second_signal_stops_at_once() -> None:
    done = ask("request.__enter__()", TERM, "time.sleep(1.2)", TERM, "time.sleep(30)")
    assert done.returncode == -signal.SIGTERM and done.stdout == ""


def test_an_ignored_sigint_stays_ignored() -> None:
    ignore, interrupt = "signal.signal(signal.SIGINT, signal.SIG_IGN)", "os.kill(os.getpid(), signal.SIGINT)"
    done = ask(ignore, "request.__enter__()", interrupt, interrupt)
    assert done.returncode == 0 and done.stdout == "0\n"


def test_handlers_are_put_back_and_other_threads_need_none() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise ZeroDivisionError
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    noted: list[int] = []

    def elsewhere() -> None:
        with StopRequest() as request:
            noted.append(request.signum)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert noted == [0]


# ------------------------------------------------------------------ the best model, and the disk


def test_best_is_the_model_of_the_best_evaluation(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, *values = [0.9, 0.1, 0.2, 0.4, 0.4]  # the model before training does not count; a tie keeps the first
    made = iter([before, *values])
    monkeypatch.setattr("alp.train.evaluate", lambda *args, **kwargs: {"train": next(made), "rollout": 0.0})
    folder = train(config(runs, name="best", eval_every=1, checkpoint_every=1))
    assert [m["eval/train"] for m in read_metrics(folder / "metrics.jsonl")] == values
    assert json.loads((folder / "best" / "best.json").read_text()) == {"step": 3, "value": 0.4}
    checkpoint = torch.load(folder / "checkpoints" / "00000003.pt")["model"]
    best = load_policy(ModelConfig(path=str(folder / "best")), torch.device("cpu")).model.state_dict()
    last = load_policy(ModelConfig(path=str(folder / "model")), torch.device("cpu")).model.state_dict()
    assert all(torch.equal(best[name], value) for name, value in checkpoint.items())
    assert not torch.equal(best["lm_head.weight"], last["lm_head.weight"])
    kept = {path.name for path in folder.iterdir()}
    assert kept == {
        *(
            "before.json",
            "best",
            "checkpoints",
            "commit.txt",
            "config.json",
            "metrics.jsonl",
            "mismatch.json",
            "model",
            "outcome.json",
        ),
        *("plots", "tensorboard"),
    }
    assert [path.name for path in Run(folder).checkpoints()] == ["00000003.pt", "00000004.pt"]


def save_bytes(content: bytes) -> Any:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(content)

    return save


def test_only_a_better_evaluation_replaces_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, value in enumerate([0.5, 0.4, 0.5, 0.7, 0.6], start=1):
        run.keep_best(step, value, save_bytes(str(step).encode()))
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"step": 4, "value": 0.7}
    assert (tmp_path / "best" / "weights").read_bytes() == b"4" and run.best == 0.7
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_leaves_the_best_intact(tmp_path: Path) -> None:
    run = Run(tmp_path)
    policy = make_tiny(ModelConfig(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2))
    run.keep_best(1, 0.5, save_bytes(b"old"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(
            UserError, match=r"best cannot be written.*intact; free disk space, then run alp train --resume"
        ):
            run.keep_best(2, 0.6, policy.save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "best" / "weights").read_bytes() == b"old" and run.best == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_a_kill_left_half_done_is_put_right(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save_checkpoint(1, {})
    (tmp_path / "checkpoints" / ".00000002.pt-123").write_bytes(b"torn")
    run.keep_best(1, 0.5, save_bytes(b"old"))
    os.rename(tmp_path / "best", tmp_path / ".best-old")  # as if killed between the two renames
    save_bytes(b"new")(tmp_path / ".best")
    save_bytes(b"half")(tmp_path / ".model")
    run.tidy()
    assert {path.name for path in tmp_path.iterdir()} == {"best", "checkpoints"} and run.best == 0.5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001.pt"]
