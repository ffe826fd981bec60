"""scripts/gpu.py without a GPU: its table separates met, missed and not measured, and it ends in time."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_report  # noqa: E402
import gpu_session  # noqa: E402
import gpu_table  # noqa: E402

ALONE = """
torch functorch torchgen triton numpy pytest _pytest py pluggy iniconfig packaging pygments setuptools pkg_resources
_distutils_hack typing_extensions sympy isympy mpmath networkx jinja2 markupsafe filelock fsspec alp_kernels alp
"""
"""The packages that alp_kernels needs (PyTorch, Triton, NumPy), pytest, and their dependencies."""
BLOCKER = f"""
import sys
from importlib.metadata import packages_distributions
for name in packages_distributions().keys() - set({ALONE!r}.split()):
    sys.modules[name] = None
"""


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


def count(what, value, **details):
    return {"count": what, "value": value, "device_type": "cuda", **details}


def verdicts(records):
    """Return the verdict of each target's line, by the target's name."""
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
            record(gpu_table.LOSS, "three bare GEMMs (limit)", 30.0, f"qwen2.5-1.5b {gpu_table.LONG_HEAD}"),
            record(gpu_table.LOSS, "alp_kernels triton, token level", 36.0, f"qwen2.5-1.5b {gpu_table.LONG_HEAD}"),
            count("launches a layer", 8),
            count("syncs of fused_alp_loss, token level", 2),
            *(count(gpu_table.SYNCS + what, 2) for what in gpu_table.OTHERS),
        ]
    )
    assert found.pop("perturb forward: copy / ours") == "met"
    assert found.pop("perturb backward / its forward") == "MISSED"  # 0.10 of 0.10
    assert found.pop("perturb forward + backward: released / ours") == "MISSED"
    assert found.pop("loss head, token level / three GEMMs") == "met"
    assert found.pop("loss head, token level: GiB above the inputs") == "MISSED"
    assert found.pop("loss head, sequence level / three GEMMs") == "MISSED"
    assert found.pop("loss head, 60 % masked / none masked") == "met"
    assert found.pop("loss head at D 1536, N 16384, token level / three GEMMs") == "MISSED"
    assert found.pop("update: kernels a layer launches for its noise") == "met"
    assert found.pop("fused_alp_loss, token level: syncs") == "MISSED"
    assert found.pop("fused_alp_loss, other levels and packed: syncs") == "met"
    assert set(found.values()) == {"not measured"}


def test_the_share_of_a_copy_that_is_aimed_at_is_the_cards():
    for device, bound, note in (
        ("NVIDIA H100 80GB HBM3", ">= 0.90", "60 us of issue, 89 of memory)"),
        ("NVIDIA H200", ">= 0.80", "issue-bound, 0.80 to 0.90 expected)"),
        ("NVIDIA B200", ">= 0.80", "44 us of issue, 38 of memory: issue-bound"),
        ("some other GPU", ">= 0.90", "copy / ours"),
    ):
        copy, ours = record(gpu_table.FORWARD, "copy (limit)", 0.85), record(gpu_table.FORWARD, "alp_kernels triton", 1)
        line = gpu_table.targets([r | {"device": device} for r in (copy, ours)])[0]
        assert bound in line and note in line
        assert line.split()[0] == ("met" if bound == ">= 0.80" else "MISSED")


def test_times_of_a_cpu_and_wrong_results_meet_no_target():
    on_cpu = [record(gpu_table.FORWARD, v, 1.0, device_type="cpu") for v in ("copy of h (limit)", "alp_kernels triton")]
    wrong = [record(gpu_table.FORWARD, v, 1.0) for v in ("copy of h (limit)", "alp_kernels triton")]
    wrong[1] = {k: v for k, v in wrong[1].items() if k != "ms"} | {"failed": "u is wrong"}
    for records in (on_cpu, wrong, []):
        assert set(verdicts(records).values()) == {"not measured"}
    assert any("wrong: alp_kernels triton" in line for line in gpu_table.groups(wrong))


def test_targets_name_ops_and_variants_that_the_benchmarks_have(monkeypatch):
    """Otherwise a renamed variant would show up as not measured, and only on a GPU."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("pytest_benchmark")
    from bench import counts, test_loss_head, test_perturb, test_perturb_rms_norm, test_update

    device, records = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (test_perturb, test_perturb_rms_norm, test_loss_head, test_update):
        for group in module.groups(device, False):
            records += [record(group.op, v.name, 1.0, str(group.case), mib=1.0) for v in group.variants]
    records += [count(what, 0) for what, _ in counts.calls(counts.make_sample(torch.device("cpu"), True))]
    found = verdicts(records)
    assert {what for what, verdict in found.items() if verdict == "not measured"} == {
        "update: kernels a layer launches for its noise",  # bench/counts.py counts these two, see below
        "update: syncs of its noise",
    }
    text = (ROOT / "bench" / "counts.py").read_text()
    assert '"launches a layer"' in text and '"syncs of an update\'s noise"' in text


@pytest.mark.parametrize("name", [name for name, step in gpu.STEPS.items() if isinstance(step, gpu.Bench)])
def test_a_step_of_the_benchmarks_selects_cases_and_variants_of_a_gpu(name):
    """Without a GPU the cases differ. A word that no GPU case has would leave a step with nothing to time."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("pytest_benchmark")
    expression = pytest.importorskip("_pytest.mark.expression").Expression
    from bench.contest import turns

    step = gpu.STEPS[name]
    module = importlib.import_module(f"bench.{step.file.removesuffix('.py')}")
    options = [option.removeprefix("--") for option in step.options]
    groups = [g for g in module.groups(torch.device("cuda"), False) if g.wants is None or g.wants in options]
    wanted = expression.compile(step.cases or "test")
    chosen = [
        turn
        for turn in turns(groups, 1, step.variants.split(","))
        if wanted.evaluate(lambda word, turn=turn: word.lower() in f"test_{turn}".lower())
    ]
    kept = list(dict.fromkeys(turn.group.case for turn in chosen))
    assert kept
    for part in step.variants.split(","):
        assert any(part in turn.variant.name for turn in chosen)
    if name.startswith("head-long"):
        assert [(case.rows, case.channels) for case in kept] == [(16384, 1536)]
    elif name.startswith("head"):
        assert [case.masked for case in kept] == ([0.0] if name == "head-peers" else [0.0, 0.6])


def test_a_run_takes_less_than_its_five_minutes():
    for plan in (gpu.FIRST, gpu.SECOND):
        assert 240 < sum(gpu.STEPS[name].seconds for name in plan) <= 300 - gpu_session.GRACE_S - gpu_session.CLOSING_S
    assert gpu.SECOND[-1] == "memcheck"


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
    assert "racecheck: head_fwd 1" in gpu_report.summary(session, [])


NCU = """==PROF== Connected to process 7 (/usr/bin/python3)
==PROF== Profiling "_a_kernel": 0%....50%....100% - 9 passes
perturb: launched
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",\
"launch__registers_per_thread","smsp__issue_active.avg.per_cycle_active",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio"
"","","","ns","byte","byte","register/thread","inst/cycle","inst","inst","inst"
"0","7","_a_kernel","1,000","2,000,000","3,500,000","40","0.50","1.25","2.50","9"
"1","7","_another_kernel","n/a","0","0","32","0.25","0","0","0"
==PROF== Disconnected from process 7
""".replace("\\\n", "")


def test_the_profilers_table_is_read_between_its_messages():
    """The numbers are made up, but the layout is ncu's: names, units, and a row for each launch."""
    first, second = gpu_profile.read(NCU)
    line = (
        "_a_kernel: 1.0 us, 2.0 MB read, 3.5 MB written, issue active 0.50, 40 registers; stalls: long scoreboard 2.5"
    )
    assert gpu_profile.lines([first])[0].startswith(line)
    assert (second["us"], second["registers"]) == (None, 32)
    assert gpu_profile.lines([second])[0].startswith("_another_kernel: 0.0 MB read")
    assert gpu_profile.read("==ERROR== ERR_NVGPUCTRPERM - no permission to read the counters") == []


def test_what_a_step_lacks_is_named(session):
    session.missing = {"pytest-benchmark", "hypothesis"}
    gpu.STEPS["head"].run(session, session.end)
    gpu.STEPS["update"].run(session, session.end)
    assert session.lacks("tests", "test_head.py", "hypothesis") and not session.lacks("tests", "test_gpu.py", "torch")
    session.has_gpu = True
    lines = gpu_report.summary(session, [])
    assert "not installed: hypothesis, pytest-benchmark" in lines
    assert any(line.startswith("bench") and "pytest-benchmark is not installed" in line for line in lines)
    assert any(line.startswith("tests") and "hypothesis is not installed): test_head.py" in line for line in lines)


def test_wheels_are_unpacked_without_pip(tmp_path, session):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer.py", "")
        wheel.writestr("peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: peer\nVersion: 1.0\n")
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no archive")
    gpu.unpack(session, wheels)
    code = "import peer, importlib.metadata as m; print(m.version('peer'))"
    found = session.run("environment", "peer", (sys.executable, "-c", code), session.end)
    assert found.log.splitlines()[1:] == ["1.0"]
    broken = next(d for d in session.done if d.name.startswith("broken"))
    assert "not a zip file" in broken.notes[0]


def test_device_checks_need_pytorch_triton_and_pytest_alone(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["TRITON_INTERPRET"] = "1"

    def python(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    files = [str(file) for file in gpu.kernel_tests()[:6]]
    options = ["-q", "-p", "no:cacheprovider", "-k", "philox or large or decoder and dtype0-False", *files]
    done = python("-c", f"""
import sys, pytest
from tests.support import gpu_kernels_once
assert sys.modules["hypothesis"] is None
assert gpu_kernels_once.main(["--list"]) == 0
assert gpu_kernels_once.main(["philox", "scale_", "2x20"]) == 0
sys.exit(pytest.main({options!r}))
""")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(gpu.WATCHED) < set(done.stdout.splitlines()[0].split())


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
    assert time.monotonic() - start < 2.5 + gpu_session.GRACE_S
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
    assert done.stdout.count("not measured") == 1 + len(gpu_table.TARGETS)
    assert len(done.stdout) < 6000
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    assert (tmp_path / "out" / "summary.txt").read_text() == done.stdout
    assert json.loads((tmp_path / "out" / "status.json").read_text()) == {"steps": {}, "processes": []}


def test_a_full_table_stays_short(session):
    session.has_gpu, session.device = True, "NVIDIA H100 80GB HBM3, 79 GiB"
    session.seconds = dict.fromkeys(gpu.FIRST, 30.0)
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
    records += [
        record(f"tuning: op {i}", f"setting {j} " + "x" * 40, 1.0) | {"reference": f"setting 0 {'x' * 40}"}
        for i in range(3)
        for j in range(20)
    ]
    records.append(count("launches of an update", 5000, lines=["x" * 300] * 25))
    records += 8 * gpu_profile.read(NCU)
    assert len("\n".join(gpu_report.summary(session, records))) < 11000


@pytest.mark.slow
def test_both_runs_pass_in_the_interpreter(tmp_path):
    """Every step of both runs, except those that would repeat another step if there is no GPU. `counts` runs the update."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    pytest.importorskip("pytest_benchmark")
    again = {"head-long", "update", *(name for name in gpu.STEPS if name.endswith("-peers"))}
    steps = [name for name in dict.fromkeys((*gpu.FIRST, *gpu.SECOND)) if name not in again]
    command = [sys.executable, ROOT / "scripts" / "gpu.py", "--out", tmp_path, "--cpu", "--minutes=20"]
    done = subprocess.run([*command, f"--only={','.join(steps)}"], capture_output=True, text=True, check=False)
    processes = json.loads((tmp_path / "status.json").read_text())["processes"]
    logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    assert all(p["code"] == 0 and not p["is_cut"] for p in processes if p["kind"] != "sanitizer"), done.stdout + logs
    assert not any(p["counts"].get("failed") for p in processes)
    assert {p["kind"] for p in processes} == {"environment", "kernels", "bench", "profile", "tests", "sanitizer"}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8 and "trace.json.gz" in files
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"perturb forward", "loss head forward + backward", "tuning: loss head"} <= {r.get("op") for r in records}
    assert "launches a layer" in {r.get("count") for r in records}
    assert all(name in done.stdout for name in steps)
    assert len(done.stdout) < 11000
