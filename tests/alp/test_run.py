"""Small whole runs: they learn, resume bit for bit after a kill, agree over ranks, and fail with messages, not tracebacks."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from alp.config import ModelConfig, RolloutConfig, TaskConfig, TrainConfig, UpdateConfig, WarmupConfig
from alp.errors import UserError
from alp.policy.tiny import make_tiny
from alp.runs import folder as run_folder
from alp.runs.files import read_metrics, write_whole
from alp.runs.folder import Run, create_run
from alp.train import train
from tests.support.runs import newest, run_cli, without_times
from tests.support.tiny_models import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all runs, so that the small model is warmed up once."""
    return tmp_path_factory.mktemp("runs")


def small(runs: Path, **changes: Any) -> TrainConfig:
    """One addition modulo 10, learned in seconds."""
    config = TrainConfig(
        task=TaskConfig(options=("num_steps=1", "operators=+")),
        model=ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
        warmup=WarmupConfig(batch=64, error=0.5),
        rollout=RolloutConfig(prompts=16, samples=8, lag=1),
        update=UpdateConfig(lr=1e-3, minibatches=2, sigma_lr=1e-2),
        steps=6,
        eval_prompts=32,
        diagnose_every=2,
        checkpoint_every=2,
        runs=runs,
    )
    return dataclasses.replace(config, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = newest(folder)
    return {**state["model"], **state["noise"], **state["optimiser"]["state"][0]}


@pytest.fixture(scope="session")
def reference(runs: Path) -> Path:
    """An uninterrupted run of six steps."""
    return train(small(runs, name="reference"))


def test_a_tiny_model_learns_in_twenty_steps(runs: Path) -> None:
    folder = train(small(runs, name="learns", steps=20, checkpoint_every=10))
    metrics = read_metrics(folder / "metrics.jsonl")
    rewards = [m["reward"] for m in metrics]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["after"]["train"] > outcome["before"]["train"] + 0.1


def test_a_run_folder_holds_what_a_reader_needs(reference: Path) -> None:
    assert TrainConfig.load(reference / "config.json").name == "reference"
    assert (reference / "commit.txt").read_text().strip()
    assert [path.name for path in Run(reference).checkpoints()] == ["00000004.pt", "00000006.pt"]
    assert {path.name for path in (reference / "plots").iterdir()} >= {
        "reward.svg",
        "kl.svg",
        "sigma.svg",
        "envelope.svg",
    }
    assert not (reference / "plots" / "tools.svg").exists()  # the run uses no tools
    assert list((reference / "tensorboard").iterdir()) and (reference / "model" / "config.json").is_file()
    metrics = read_metrics(reference / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    expected = {"reward", "accuracy", "unparsed", "loss", "grad_norm", "k1_kl", "k3_kl", "ess_frac", "entropy", "sigma"}
    expected |= {"token_ratio/q99.9", "sequence_ratio/max", "clip_low_frac", "realised_noise", "chi2_token", "update_s"}
    assert all(expected <= m.keys() for m in metrics)
    assert {"mismatch/k3_kl", "staleness/k3_kl", "perturbation/k3_kl", "envelope"} <= metrics[0].keys()
    assert {"perturbation/sequence_sd", "perturbation/outside_frac", "mismatch/sd"} <= metrics[0].keys()
    assert metrics[0]["staleness/k3_kl"] == 0 < metrics[4]["staleness/k3_kl"]
    assert all(0.9 < value < 1.1 for value in metrics[-1]["realised_noise"])


def test_a_killed_run_resumes_bit_for_bit(runs: Path, reference: Path) -> None:
    config = small(runs, name="killed")
    folder = runs / "killed"
    code = "import sys; from pathlib import Path; from alp.train import train; from alp.config import TrainConfig; "
    code += "train(TrainConfig.load(Path(sys.argv[1])))"
    (runs / "killed.json").write_text(config.to_json())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code, str(runs / "killed.json")], env=environment)
    deadline = time.monotonic() + 240
    while len(list((folder / "checkpoints").glob("0*.pt"))) < 1 or len(read_metrics(folder / "metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_metrics(folder / "metrics.jsonl")) < 6, "it was killed too late to show anything"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')  # what a kill in the middle of a line leaves
    train(config, resume=folder)
    assert without_times(folder) == without_times(reference)
    for name, value in weights(reference).items():
        same = weights(folder)[name]
        assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value, name


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sampled", {"backward": "sampled", "threshold": 2.0**-4}), ("matched", {"sigma": "matched"})],
)
def test_a_run_with_an_option_of_the_update_resumes_bit_for_bit(runs: Path, name: str, changes: dict[str, Any]) -> None:
    config = small(runs, name=name, steps=4)
    folder = train(dataclasses.replace(config, update=dataclasses.replace(config.update, **changes)))
    earlier = shutil.copytree(folder, runs / f"{name}-earlier")
    (earlier / "checkpoints" / "00000004.pt").unlink()
    train(TrainConfig(), resume=earlier)
    assert without_times(earlier) == without_times(folder)
    for name, value in weights(folder).items():
        same = weights(earlier)[name]
        assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value, name


def test_a_run_killed_before_its_first_checkpoint_starts_again(runs: Path, reference: Path) -> None:
    folder = create_run(small(runs, name="early"))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    train(TrainConfig(), resume=folder)
    assert without_times(folder) == without_times(reference)


def test_a_finished_run_resumes_into_nothing_new(reference: Path) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    train(TrainConfig(), resume=reference)
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save_checkpoint(1, {"x": torch.arange(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written.*00000001\.pt is intact.*--resume"):
            run.save_checkpoint(2, {"x": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001.pt"]
    assert torch.equal(newest(tmp_path)["x"], torch.arange(3))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda file: file.write(b"new") / 0)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_ranks_make_the_gradient_of_one_process(runs: Path, reference: Path) -> None:
    # one step, one minibatch: Adam's first moment is a tenth of the gradient
    update = UpdateConfig(lr=1e-6, minibatches=1, grad_clip=1e9, micro_batch=48)
    changes: dict[str, Any] = {
        "update": update,
        "steps": 1,
        "rollout": RolloutConfig(path="same", prompts=16, samples=8),
    }
    one = train(small(runs, name="one-rank", **changes))
    config = small(runs, name="two-ranks", device="cpu", **changes)
    arguments = (
        "train --task.options num_steps=1 operators=+ --model.hidden-size 32 --model.intermediate-size 64 "
        "--model.num-layers 2 --model.num-heads 2 --warmup.batch 64 --warmup.error 0.5 --rollout.path same "
        "--rollout.prompts 16 --rollout.samples 8 --update.lr 1e-6 --update.minibatches 1 --update.grad-clip 1e9 "
        "--update.micro-batch 48 --steps 1 --eval-prompts 32 --diagnose-every 2 --checkpoint-every 2 --device cpu "
        f"--name two-ranks --runs {runs}"
    ).split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [*launch, "--master-port", str(port), "-m", "alp", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = runs / "two-ranks"
    assert TrainConfig.load(two / "config.json") == config
    (first,), (second,) = without_times(one), without_times(two)
    assert first.keys() == second.keys()
    for key in ("num_tokens", "num_sequences", "reward", "unparsed"):
        assert first[key] == second[key]
    for key in ("loss", "grad_norm", "k3_kl", "token_ratio/max", "sequence_ratio/q99.9", "perturbation/k3_kl"):
        assert first[key] == pytest.approx(second[key], rel=1e-3, abs=1e-6), key
    states = [newest(folder)["optimiser"]["state"] for folder in (one, two)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 10
    for index in states[0]:
        a, b = (state[index]["exp_avg"] for state in states)
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-9


# ------------------------------------------------------------------ the command line


def test_gsm8k_lines_and_a_local_model_directory_run_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    make_tiny(SMALL).save(tmp_path / "model")
    lines = [
        {"question": f"Ann has {i} apples and buys 1.", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(12)
    ]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [
        "--model.path",
        tmp_path / "model",
        "--task.path",
        tmp_path / "gsm8k.jsonl",
        "--runs",
        tmp_path / "runs",
    ]
    arguments += [
        "--rollout.prompts",
        4,
        "--rollout.samples",
        4,
        "--rollout.max-new-tokens",
        8,
        "--update.minibatches",
        2,
    ]
    assert run_cli(monkeypatch, "train", *arguments, "--steps", 2, "--eval-prompts", 2, "--name", "gsm") == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r"sampled accuracy [\d.]+ -> [\d.]+ .*int8 path.*see .*gsm", last)
    metrics = read_metrics(tmp_path / "runs" / "gsm" / "metrics.jsonl")
    assert len(metrics) == 2 and metrics[0]["num_sequences"] == 16 and metrics[0]["unparsed"] > 0


def test_eval_and_report_read_a_run(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "eval", reference) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.strip().splitlines())
    outcome = json.loads((reference / "outcome.json").read_text())
    assert float(shown["train"]) == pytest.approx(outcome["after"]["train"], abs=1e-4)
    page = tmp_path / "report.html"
    assert run_cli(monkeypatch, "report", reference, reference, "--out", page) == 0
    text = page.read_text()
    assert text.count("<svg") == 6 and "k3 KL" in text and "alp-sequence" in text
    assert not re.search(r"<(img|link|script)\b", text), "the page must stand alone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--rollout.lags", "3"], "--rollout.lag"),
        (["train", "--update.sigma", "0"], "update.sigma=0.0; it needs a number > 0"),
        (["train", "--update.lr", "inf"], "update.lr=inf; it needs 0, or a number between 1.2e-38 and 3.4e38"),
        (["train", "--rollout.temperature", "1e-40"], "rollout.temperature=1e-40; it needs 0, or a number"),
        (["train", "--update.dual-clip", "1"], "update.dual_clip=1.0; it needs a number > 1"),
        (["train", "--update.method", "alp-sequense"], "did you mean 'alp-sequence'"),
        (["train", "--update.threshold", "0.3"], "update.threshold=0.3; it needs a power of two from 2^-20 to 2^-1"),
        (
            ["train", "--update.backward", "sampled", "--update.layers", "logits"],
            "update.backward='sampled'; it needs exact",
        ),
        (["train", "--update.minibatches", "5"], "a divisor of rollout.prompts"),
        (["train", "--task.name", "mod_chian"], "did you mean 'mod_chain'"),
        (["train", "--model.path", "./no/such/model"], "there is no such directory"),
        (["train", "--device", "warp"], "device='warp' cannot be used"),
        (["train", "--resume", "no/such/run"], "not a run folder"),
        (["train", "--resume", "no/such/run", "--seed", "1"], "drop the other options"),
        (["eval", "./no/such/model"], "there is no such directory"),
        (["report"], "name at least one run folder"),
        (["report", "no/such/run"], "not a run folder"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out and "Traceback" not in captured.err


def test_a_taken_name_is_refused(reference: Path) -> None:
    with pytest.raises(UserError, match="reference exists; continue it with --resume"):
        create_run(TrainConfig(runs=reference.parent, name="reference"))


def test_config_survives_its_file_and_unknown_keys_are_named(tmp_path: Path) -> None:
    config = small(tmp_path, task=TaskConfig(path=Path("a.jsonl"), options=("x=1",)), name="n")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig.load(path) == config
    path.write_text(config.to_json().replace('"lag"', '"leg"'))
    with pytest.raises(UserError, match=r"unknown key 'leg'; did you mean 'lag'"):
        TrainConfig.load(path)


def test_draws_of_an_older_run_are_read_and_more_than_one_is_not_resumed(tmp_path: Path) -> None:
    config = small(tmp_path, name="n")
    path = tmp_path / "config.json"
    for draws in (1, 2):
        path.write_text(config.to_json().replace('"scale"', f'"draws": {draws}, "scale"'))
        assert TrainConfig.load(path) == config
        if draws == 1:
            assert TrainConfig.load(path, to_resume=True) == config
    with pytest.raises(UserError, match=r"update\.draws=2 is from an older version; .* update\.draws=1"):
        train(config, tmp_path)
    path.write_text(config.to_json().replace('"prompts"', '"draws": 1, "prompts"', 1))  # only `update` had `draws`
    with pytest.raises(UserError, match="unknown key 'draws'"):
        TrainConfig.load(path)


def test_a_warm_up_that_does_not_get_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"greedy accuracy is .* after 25 steps, below warmup.accuracy"):
        train(small(tmp_path, warmup=WarmupConfig(batch=8, max_steps=25)))


def test_doctor_names_every_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, "doctor") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("triton", "native", "reference", "threads", "automatic choice"))
    monkeypatch.setenv("ALP_KERNELS_ENGINE", "bogus")
    assert run_cli(monkeypatch, "doctor") == 0
    assert "cpu (" in (text := capsys.readouterr().out)
    assert "none: ALP_KERNELS_ENGINE='bogus'; the engines are" in text


# ------------------------------------------------------------------ the commit


def test_a_run_notes_what_is_changed_in_either_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = run_folder.__file__
    assert own is not None
    for package in ("alp", "alp_kernels"):
        (tmp_path / package / "runs").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("before\n")
    (tmp_path / Path(own).relative_to(ROOT)).write_text("")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / Path(own).relative_to(ROOT)))
    head = run_folder.commit()
    assert len(head.strip()) == 40
    for package in ("alp", "alp_kernels"):
        (tmp_path / package / "__init__.py").write_text("after\n")
    said = run_folder.commit()
    assert said.startswith(head) and {"+++ b/alp/__init__.py", "+++ b/alp_kernels/__init__.py"} <= set(
        said.splitlines()
    )
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "alp" / "runs" / "new.py"))
    assert run_folder.commit() == "not under version control\n"
