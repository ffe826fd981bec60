"""scripts/gpu.py without a GPU: its table tells met from missed from not measured, and it ends when it must."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu  # noqa: E402
import gpu_table  # noqa: E402


@pytest.fixture
def session(tmp_path):
    session = gpu.Session(tmp_path, 1)
    yield session
    shutil.rmtree(session.work)


CASE = "qwen3-8b N 16384 D 4096 bfloat16"


def record(op, variant, ms, case=CASE, device_type="cuda", mib=0.0):
    return {
        "op": op,
        "case": case,
        "variant": variant,
        "ms": {"p20": ms, "p50": ms, "p80": ms},
        "peak_mib": mib,
        "limit_frac": None,
        "device_type": device_type,
    }


def verdicts(records):
    """What each target's line says, by what it is about."""
    lines = gpu_table.targets(records)
    return {line[32:].strip(): line[:12].strip() for line in lines}


def heads(token, sequence, masked, mib):
    op, case = gpu_table.LOSS, f"qwen3-8b {gpu_table.HEAD}"
    yield record(op, "three bare GEMMs (limit)", 40.0, case)
    yield record(op, "alp_kernels triton, token level", token, case, mib=mib)
    yield record(op, "alp_kernels triton, sequence level", sequence, case)
    yield record(op, "alp_kernels triton, token level", masked, f"{case}, 60% masked")


def test_targets_are_met_missed_or_not_measured():
    found = verdicts(
        [
            record(gpu_table.FORWARD, "copy of h (limit)", 0.091),
            record(gpu_table.FORWARD, "alp_kernels triton", 0.10),
            record(gpu_table.BOTH, "alp_kernels triton", 0.20),
            record(gpu_table.BOTH, "released ALP: generator, checkpoint", 1.0),
            *heads(token=46.0, sequence=48.1, masked=20.0, mib=6145.0),
        ]
    )
    assert found.pop("perturb forward: copy / ours") == "met"
    assert found.pop("perturb backward / its forward") == "MISSED"  # 0.10 of 0.10
    assert found.pop("perturb forward + backward: released / ours") == "MISSED"
    assert found.pop("loss head, token level / three GEMMs") == "met"
    assert found.pop("loss head, token level: GiB above the inputs") == "MISSED"
    assert found.pop("loss head, sequence level / three GEMMs") == "MISSED"
    assert found.pop("loss head, 60 % masked / none masked") == "met"
    assert set(found.values()) == {"not measured"}


def test_times_of_a_cpu_and_wrong_results_meet_no_target():
    on_cpu = [record(gpu_table.FORWARD, v, 1.0, device_type="cpu") for v in ("copy of h (limit)", "alp_kernels triton")]
    wrong = [record(gpu_table.FORWARD, v, 1.0) for v in ("copy of h (limit)", "alp_kernels triton")]
    wrong[1] = {k: v for k, v in wrong[1].items() if k != "ms"} | {"failed": "u is wrong"}
    for records in (on_cpu, wrong, []):
        assert set(verdicts(records).values()) == {"not measured"}
    assert any("wrong: alp_kernels triton" in line for line in gpu_table.groups(wrong))


def test_targets_name_ops_and_variants_that_the_benchmarks_have(monkeypatch):
    """A renamed variant would otherwise turn up as one that was not measured, on a GPU, when it is too late."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("pytest_benchmark")
    from bench import test_loss_head, test_perturb, test_perturb_rms_norm, test_update

    device, records = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (test_perturb, test_perturb_rms_norm, test_loss_head, test_update):
        for group in module.groups(device, False):
            records += [record(group.op, v.name, 1.0, str(group.case), mib=1.0) for v in group.variants]
    assert [what for what, verdict in verdicts(records).items() if verdict == "not measured"] == []


def test_sanitizer_reports_are_counted(session):
    race = gpu.Done("sanitizer", "racecheck head_fwd", code=0)
    race.log = (
        "========= Error: Race reported between Write access at _head_fwd_kernel+0x5d0 in /a/head.py:237\n"
        "=========     and Read access at _head_fwd_kernel+0x610 in /a/head.py:240 [16 hazards]\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    gpu.read_sanitizer(race, gpu.SUMMARY["racecheck"])
    assert race.counts == {"errors": 1}
    assert "_head_fwd_kernel+0x5d0 in /a/head.py:237" in race.notes[0]
    clean = gpu.Done("sanitizer", "memcheck head_fwd", code=0, log="========= ERROR SUMMARY: 0 errors\n")
    gpu.read_sanitizer(clean, gpu.SUMMARY["memcheck"])
    assert clean.counts == {"errors": 0}
    refused = gpu.Done("sanitizer", "memcheck normal", code=1, log="$ tool\n========= Device not supported\n")
    gpu.read_sanitizer(refused, gpu.SUMMARY["memcheck"])
    assert refused.counts == {}
    assert refused.notes == ["no report: ========= Device not supported"]
    session.done = [clean, refused]
    assert not gpu.has_failed(session)
    session.done = [clean, race]
    assert gpu.has_failed(session)
    assert "racecheck: head_fwd 1" in gpu.summary(session, [])


def test_a_test_that_hung_fails_the_run_and_one_without_time_does_not(session):
    session.done = [gpu.Done("tests", "test_gpu.py", code=-9, is_cut=True)]
    assert gpu.has_failed(session)
    session.done = [gpu.Done("tests", "test_gpu.py"), gpu.Done("bench", "test_perturb.py", code=-9, is_cut=True)]
    assert not gpu.has_failed(session)


def test_wheels_that_are_not_there_are_refused(tmp_path):
    command = (sys.executable, ROOT / "scripts" / "gpu.py", "--out", tmp_path, "--wheels", tmp_path / "none")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "it needs a folder that holds *.whl files" in done.stderr


def test_a_peer_does_the_same_work_and_is_not_ours():
    case = "a case"
    names = (
        "alp, alp-sequence",
        "trl",
        "liger-kernel RMSNorm alone (no noise)",
        "cut-cross-entropy (cross-entropy only)",
    )
    lines = list(gpu_table.groups(record("op", name, ms, case) for name, ms in zip(names, (3, 9, 1, 2), strict=True)))
    assert lines[1].split()[-2:] == ["9", "trl"]
    assert " 3 " in lines[1]


def test_a_step_past_its_end_is_stopped_with_its_children(tmp_path, session):
    mark = tmp_path / "mark"
    code = f"import subprocess, sys, time; subprocess.Popen(['sh', '-c', 'sleep 4; touch {mark}']); time.sleep(30)"
    start = time.monotonic()
    done = session.run("tests", "sleeper", (sys.executable, "-c", code), start + 2.5)
    assert time.monotonic() - start < 2.5 + gpu.GRACE_S
    assert done.is_cut
    assert "KeyboardInterrupt" in done.log, "it was asked before it was killed"
    late = session.run("tests", "late", ("true",), time.monotonic())
    assert late.code is None
    assert late.notes == ["no time was left for it"]
    time.sleep(max(0.0, start + 5 - time.monotonic()))
    assert not mark.exists()


def test_a_run_of_nothing_prints_the_table_last_and_writes_few_files(tmp_path):
    command = (
        sys.executable,
        ROOT / "scripts" / "gpu.py",
        "--out",
        tmp_path / "out",
        "--only",
        "none",
        "--minutes",
        "1",
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("not measured") == len(gpu_table.TARGETS)
    assert len(done.stdout) < 6000
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    assert (tmp_path / "out" / "summary.txt").read_text() == done.stdout
    assert json.loads((tmp_path / "out" / "status.json").read_text()) == []


def test_a_full_table_stays_short(session):
    session.has_gpu, session.device = True, "NVIDIA H100 80GB HBM3, 79 GiB"
    for name in ("triton_cases.py", "test_gpu.py", "test_head.py"):
        counts = {"passed": 100, "failed": 30, "skipped": 5}
        session.done.append(gpu.Done("tests", name, code=1, counts=counts, notes=["test_" + "x" * 80] * 30))
    for op in range(9):
        for tool in gpu.SUMMARY:
            notes = ["_kernel+0x5d0 in /a/b/c.py:237" * 3] * 3
            session.done.append(gpu.Done("sanitizer", f"{tool} op_{op}", counts={"errors": 3}, notes=notes))
    records = [
        record(f"op {i} forward + backward", v, 1.0, "a model " + "x" * 80)
        for i in range(60)
        for v in ("three bare GEMMs (limit)", "alp_kernels triton", "a peer with a long name, token level")
    ]
    assert len("\n".join(gpu.summary(session, records))) < 6000


@pytest.mark.slow
def test_gpu_tests_pass_in_the_interpreter():
    pytest.importorskip("triton")
    chosen = "every_kernel or repeats or strided or checkpointed"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, ROOT / "tests" / "test_gpu.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
