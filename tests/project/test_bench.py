"""The parts of the benchmark: what it counts, refuses, restores and prints."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="bench needs pytest-benchmark, which is not installed")

from bench import (
    head,
    peers,
    perturb,
    roofline,
    table,
    test_float32_head,
    test_loss_head,
    test_perturb,
    test_perturb_rms_norm,
    test_sampled_head,
    test_support_head,
)
from bench import test_sweep as sweep
from bench import test_threads as threads
from bench import test_tuning as tuning
from bench.cases import HeadCase, PerturbCase, head_cases, perturb_cases, rows_cases
from bench.contest import Contest, Group, Turn, Variant, turns
from tests.support.multiplications import Multiplications

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAYER = PerturbCase("tiny", 64, 96, torch.float32)
HEAD = HeadCase("tiny", 4, 16, 32, 256, torch.float32, masked=0.6)


class Pedantic:
    """The part of pytest-benchmark's fixture that a contest uses."""

    group = ""

    def pedantic(self, function, args, rounds, iterations):
        for _ in range(rounds):
            function(*args)


def group_of(*variants, **options):
    return Group(
        "op", "case", lambda device: torch.ones(8), variants,
        reference=variants[0].name, limit=variants[0].name, limit_scale=1.0, limit_text="", num_passes=1, **options,
    )  # fmt: skip


def play(group):
    """Run every variant once; return the contest and each outcome."""
    contest = Contest(CPU)
    outcomes = []
    for variant in group.variants:
        try:
            contest.play(Turn(group, variant, 0), Pedantic())
            outcomes.append("timed")
        except (pytest.fail.Exception, pytest.skip.Exception) as outcome:
            outcomes.append(str(outcome))
    return contest, outcomes


# ------------------------------------------------------------------ what runs and what does not


def test_a_wrong_result_fails_and_is_never_timed():
    def wrong(inputs, returned):
        raise AssertionError("not the sum")

    def build(inputs):
        return lambda: inputs.sum()

    group = group_of(Variant("right", build), Variant("wrong", build, wrong))
    contest, outcomes = play(group)
    assert outcomes[0] == "timed" and "not the sum" in outcomes[1]
    assert contest.entry(group, "right").ms and not contest.entry(group, "wrong").ms


def test_what_does_not_fit_in_memory_is_skipped_by_name_before_it_runs():
    def build(inputs):
        raise AssertionError("must not run")

    _, outcomes = play(group_of(Variant("large", build, needs_mib=1e12), needs_mib=1.0))
    assert "large" in outcomes[0] and "GiB" in outcomes[0]
    _, outcomes = play(group_of(Variant("small", build), needs_mib=1e12))
    assert "small" in outcomes[0]


def test_a_variant_is_timed_before_the_next_is_prepared_and_a_group_ends_before_the_next_begins():
    seen = []

    def building(name):
        def build(inputs):
            seen.append(f"build {name}")
            return lambda: seen.append(name)

        return Variant(name, build)

    groups = [group_of(building("limit"), building("ours")), group_of(building("peer"))]
    order = turns(groups, 2)
    assert [turn.variant.name for turn in order] == ["limit", "ours", "limit", "ours", "peer", "peer"]
    contest = Contest(CPU)
    for turn in order:
        contest.play(turn, Pedantic())
    began = [seen.index(f"build {name}") for name in ("limit", "ours", "peer")]
    assert seen[began[0] : began[1]].count("limit") > 1 and seen[began[1] : began[2]].count("ours") > 1
    assert {"limit", "ours"}.isdisjoint(seen[began[2] :])
    with pytest.raises(AssertionError, match="do not follow"):
        contest.play(order[0], Pedantic())


def test_variants_are_chosen_by_parts_of_their_names():
    group = test_perturb.groups(CPU, smoke=True)[0]
    names = [turn.variant.name for turn in turns([group], 1, ["limit", "alp_kernels native", "released"])]
    assert names == ["copy of h (limit)", "alp_kernels native", "released ALP: generator, checkpoint"]
    assert len(turns([group], 1, [""])) == len(turns([group], 1)) == len(group.variants)


def test_the_limit_and_ours_come_first_and_what_compiles_last():
    device = torch.device("cuda")
    layer, output = perturb_cases(device, smoke=True)[0], head_cases(device, smoke=True)[0]
    for variants in (
        test_loss_head.variants(output),
        test_perturb.variants(layer, with_backward=True),
        test_perturb_rms_norm.variants(layer, with_backward=True),
    ):
        names = [variant.name for variant in variants]
        ours = [name for name in names if name.startswith("alp_kernels")]
        assert "(limit)" in names[0] and names[1 : 1 + len(ours)] == ours
        assert names[-1].startswith("torch.compile")


def test_a_benchmark_that_is_killed_keeps_what_it_measured(tmp_path):
    code = """
import os
from bench import test_perturb

def killed(*_):
    os.kill(os.getpid(), 9)

test_perturb.released = killed
import pytest
pytest.main(["bench/test_perturb.py", "--benchmark-only", "--smoke", "--save-results", "-p", "no:cacheprovider",
             "--variants=limit,eager,released", "-k", "float32", f"--results-folder={FOLDER}"])
"""
    code = f"FOLDER = {str(tmp_path)!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stdout + done.stderr
    (results,) = tmp_path.glob("*.jsonl")
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["variant"] for record in found] == ["copy of h (limit)", "eager: h + sigma * randn_like(h)"]
    assert all(record["ms"]["p50"] > 0 for record in found)


def test_threads_are_restored_after_each_call():
    before = torch.get_num_threads()
    seen = []
    run = threads.with_threads(before + 1, lambda inputs: lambda: seen.append(torch.get_num_threads()))(None)
    run()
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_every_model_is_a_case_and_a_cpu_takes_a_few_by_default():
    for device in (CPU, torch.device("cuda")):
        cases = head_cases(device, smoke=False)
        assert len({case.model for case in cases}) == 8
        assert len(set(map(str, cases))) == len(cases)
        assert any(case.masked for case in cases if case.default)
    assert sum(case.default for case in head_cases(CPU, smoke=False)) == 3
    assert {case.channels for case in perturb_cases(torch.device("cuda"), smoke=False)} == {1536, 4096}


# ------------------------------------------------------------------ checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checks_of_perturb_rms_norm_take_the_op_and_no_other(dtype):
    inputs = test_perturb_rms_norm.make_inputs(CPU, dataclasses.replace(LAYER, rows=256, dtype=dtype))
    way = functools.partial(test_perturb_rms_norm.in_one, "reference")
    returned = test_perturb_rms_norm.forward_backward(way, inputs)()
    check = functools.partial(test_perturb_rms_norm.check, perturb.check_ours, inputs)
    check(returned)
    check(returned[:2])
    for number, name in enumerate(("", "y", "dh", "dweight", "dlog_sigma")):
        spoiled = list(returned)
        spoiled[number] = 1.5 * returned[number] + 1
        with pytest.raises(AssertionError, match=name):
            check(tuple(spoiled))


def test_checks_of_the_loss_head_take_the_loss_and_no_other():
    inputs = head.make_inputs(CPU, HEAD)
    step = functools.partial(head.ours, "reference", "sequence")
    returned = head.forward_backward(step, inputs)()
    head.check("sequence", inputs, returned)
    for number, name in enumerate(("loss", "dhidden", "dweight")):
        spoiled = list(returned)
        spoiled[number] = 1.1 * returned[number] + 0.01
        with pytest.raises(AssertionError, match=name):
            head.check("sequence", inputs, tuple(spoiled))
    with pytest.raises(AssertionError):
        head.check("token", inputs, returned)


def test_truth_of_the_loss_head_does_not_depend_on_its_chunks(monkeypatch):
    whole = head.make_inputs(CPU, HEAD)
    monkeypatch.setattr(head, "CHUNK_ROWS", 7)
    parts = head.make_inputs(CPU, HEAD)
    for name, truth in whole.truths.items():
        torch.testing.assert_close(parts.truths[name], truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [head.three_gemms, head.three_allocating_gemms])
def test_the_limit_is_checked_too(build):
    inputs = head.make_inputs(CPU, HEAD)
    products = build(inputs)()
    head.check_gemms(inputs, products)
    with pytest.raises(AssertionError, match="dweight"):
        head.check_gemms(inputs, products._replace(dweight=2 * products.dweight))


# ------------------------------------------------------------------ counted from the algorithm


@pytest.mark.parametrize("masked", [0.0, 0.6])
def test_flop_of_the_head_are_those_it_multiplies(masked):
    case = dataclasses.replace(HEAD, masked=masked)
    inputs = head.make_inputs(CPU, case)
    with Multiplications() as counter:
        head.forward_backward(functools.partial(head.ours, "reference", "token"), inputs)()
    assert roofline.head(case).flop == 2 * counter.count


def test_bytes_of_perturb_are_those_of_its_tensors():
    inputs = perturb.make_inputs(CPU, LAYER)
    u = perturb.forward(perturb.ours("reference"), inputs)()
    assert roofline.perturb_forward(LAYER).bytes == inputs.h.nbytes + u.nbytes
    assert roofline.perturb_backward(LAYER).bytes == inputs.du.nbytes


def test_the_least_time_is_the_larger_of_bytes_and_flop():
    ceilings = roofline.Ceilings(bytes_per_s=1e9, flop_per_s=1e12)
    assert ceilings.least_ms(roofline.Cost(bytes=10**6, flop=10**6)) == 1.0
    assert ceilings.least_ms(roofline.Cost(bytes=10**6, flop=10**10)) == 10.0


# ------------------------------------------------------------------ tuning


def test_every_constant_that_is_tuned_is_there_and_comes_back():
    pytest.importorskip("triton")
    from alp_kernels.triton import perturb as kernels

    for setting in (*tuning.OF_PERTURB, *tuning.OF_HEAD):
        for place, value in setting.constants.items():
            owner, name = tuning.located(place)
            assert callable(getattr(owner, name)) == callable(value)
    before = kernels.MAX_BLOCKS
    inside = tuning.Setting("", {"perturb.MAX_BLOCKS": 3}, num_warps=2).around(lambda: kernels.MAX_BLOCKS)
    assert (inside(), kernels.MAX_BLOCKS) == (3, before)


# ------------------------------------------------------------------ tables and plots


def test_each_column_of_the_tables_is_a_variant():
    layer, output = perturb_cases(CPU, smoke=True)[0], head_cases(CPU, smoke=True)[0]
    known = {
        "loss head forward + backward": test_loss_head.variants(output),
        test_sampled_head.OP: test_sampled_head.variants(rows_cases(CPU, smoke=True)[0]),
        test_float32_head.OP: test_float32_head.variants(output),
        test_support_head.OP: test_support_head.variants(test_support_head.cases(CPU, smoke=True)[0]),
        "perturb forward": test_perturb.variants(layer, with_backward=False),
        "perturb + RMSNorm forward": test_perturb_rms_norm.variants(layer, with_backward=False),
    }
    for layout in table.LAYOUTS:
        names = {variant.name for variant in known[next(iter(layout.ops))]}
        for engine in table.ENGINES.values():
            assert {column.variant.format(engine=engine) for column in layout.columns} <= names
    assert (sweep.ALONG_V, sweep.ALONG_N) == table.DRAWN
    assert {op for op, _ in sweep.cases(CPU, smoke=True)} == set(table.DRAWN)
    assert set(peers.OBJECTIVES) == {"token", "sequence"}


def test_a_file_with_the_markers_is_rewritten_between_them_only():
    text = "before\n<!-- bench.table: none -->\nstale\n<!-- end of bench.table -->\nafter\n"
    names = table.named((ROOT / "README.md").read_text())
    records = table.read([ROOT / name for name in names])
    whole, short = (
        table.replaced(t, ["a.jsonl", "b.jsonl"], records) for t in (text, text.replace(": none", ", in short: none"))
    )
    for new in (whole, short):
        assert table.named(new) == ["a.jsonl", "b.jsonl"]
        assert new.startswith("before\n") and new.endswith("<!-- end of bench.table -->\nafter\n")
        assert "stale" not in new
    assert "`fused_alp_loss` token" in whole and "`perturb`" in whole
    rows = [line for line in short.splitlines() if line.startswith("| ")][2:]
    assert [row.split(",")[0] for row in rows] == ["| policy loss"] * 4 + ["| noise"]
    assert "`perturb_rms_norm`" in whole and "`perturb_rms_norm`" not in short
    with pytest.raises(ValueError, match="no part to rewrite"):
        table.replaced("before", [], records)


def test_counts_profiles_and_tuning_are_no_rows(tmp_path):
    records = table.read(table.newest())
    other = [{"count": "syncs", "value": 1}, {"profile": "_a_kernel"}, records[0] | {"op": "tuning: perturb forward"}]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (*other, *records)))
    assert table.read([path]) == records


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_a_page_shows_what_its_records_say(page):
    text = (ROOT / page).read_text()
    names = table.named(text)
    assert names
    assert text == table.replaced(text, names, table.read(ROOT / name for name in names))


@pytest.mark.slow
def test_a_run_saves_records_that_become_tables_and_plots(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def python(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    run = python(
        "-m", "pytest", "bench/test_perturb.py", "bench/test_sweep.py", "--benchmark-only", "--smoke", "--sweep",
        "--passes=1", "--save-results", f"--results-folder={tmp_path}", "-p", "no:cacheprovider",
        "-k", "float32 and (native or reference or eager or limit) and not compile",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (results,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in results.read_text().splitlines()]
    for record in records:
        assert record["bytes"] > 0 and record["ceilings"]["gb_per_s"] > 0 and record["roof_frac"] > 0
        assert record["commit"] is None or len(record["commit"]) == 40
    assert table.newest(tmp_path) == [results]
    printed = python("-m", "bench.table", str(results))
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == table.markdown(table.read([results])) + "\n"
    assert "| forward, smoke: N 256, D 128, float32 |" in printed.stdout
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    code = "import sys; from bench.plots import main; [main([sys.argv[1], f'--folder={folder}']) for folder in sys.argv[2:]]"
    drawn = python("-c", code, str(results), *map(str, folders))
    assert drawn.returncode == 0, drawn.stderr
    first, second = (folder / f"head-sweep-{records[0]['device_type']}.svg" for folder in folders)
    assert first.read_bytes() == second.read_bytes()


def test_a_device_without_the_short_tables_ops_is_left_out_of_it():
    records = table.read(table.newest())
    other = [r | {"device_type": "cuda", "op": "update forward + backward"} for r in records[:2]]
    assert table.markdown(records + other, in_short=True) == table.markdown(records, in_short=True)
    assert table.markdown(other, in_short=True) == ""


def test_a_tie_is_not_bold():
    """Bold needs a fifth less time than each rival that computes the same; our two levels are no rivals of each other."""
    layout = table.LAYOUTS[0]

    def bold(**ms):
        row = {column: ms[column.title] for column in layout.columns if column.title in ms}
        measured = [(column, {"ms": {"p50": time}, "limit_ms": 1, "limit_frac": 1}) for column, time in row.items()]
        return [column.title for column, record in measured if "**" in table._time(column, record, measured)]

    token, sequence, eager, less = (
        "`fused_alp_loss` token", "`fused_alp_loss` sequence", "eager PyTorch", "cut-cross-entropy (no policy loss)"
    )  # fmt: skip
    assert bold(**{token: 100, sequence: 101, eager: 120}) == [token]
    assert bold(**{token: 100, sequence: 90, eager: 107}) == []
    assert bold(**{token: 100, sequence: 90, eager: 70}) == [eager]
    assert bold(**{token: 100, eager: 121, less: 50}) == [token]
    assert bold(**{token: 100, eager: 60, "torch.compile": 61}) == []
