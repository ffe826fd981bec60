"""Every Triton kernel compiles, without a GPU, for each target and fits its registers and shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tests.support import aot  # noqa: E402

SHARED_LIMIT = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "cuda:100": 227 << 10, "hip:gfx942": 64 << 10}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict[str, float]]]:
    """{target: {"case: kernel": measurements}}, from separate processes: kernels may be interpreted in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def build(target: str) -> dict[str, dict[str, int]]:
        child = subprocess.run(
            [sys.executable, "-m", "tests.support.aot", "--json", target],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert child.returncode == 0, f"{target}: {child.stderr[-4000:]}"
        return json.loads(child.stdout.splitlines()[-1])

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(SHARED_LIMIT, pool.map(build, SHARED_LIMIT), strict=True))


pytestmark = pytest.mark.slow
each_target = pytest.mark.parametrize("target", SHARED_LIMIT)


def test_the_committed_table_is_what_the_compiler_makes(measured):
    committed = aot.committed_table()
    if not committed.startswith(f"Triton {triton.__version__}\n"):
        pytest.skip("the table is of another version of Triton; the other tests hold the limits")
    assert aot.table(measured) == committed, "python -m tests.support.aot --write makes it anew"


@pytest.mark.parametrize("dtype", ["bf16", "fp32 rms"])
def test_noise_costs_at_most_26_instructions_an_element(measured, dtype):
    assert measured["cuda:90"][f"perturb_fwd {dtype}: _perturb_fwd_kernel"]["per_element"] <= 26
    assert measured["cuda:90"][f"perturb_bwd {dtype}: _perturb_bwd_kernel"]["per_element"] <= 26


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (10, ["head_token_loss bf16 alp: _head_token_loss_kernel"]),
        (10, ["head_exp bf16: _head_fwd_kernel"]),
        (10, ["head_exp bf16 few rows: _head_fwd_kernel"]),
        (10, ["head_exp fp32: _head_fwd_kernel"]),
        (20, ["head_token_loss bf16 entropy: _head_token_loss_kernel"]),
        (9, ["select bf16: _select_kernel"]),
        (11, ["select fp32: _select_kernel"]),
        (11, ["select bf16 few rows: _select_kernel"]),
        (20, ["head_fwd bf16: _head_fwd_kernel", "head_bwd bf16: _head_bwd_kernel"]),
    ],
)
def test_the_head_costs_at_most_so_many_instructions_a_logit(measured, limit, names):
    assert sum(measured["cuda:90"][name]["per_element"] for name in names) <= limit


def test_every_loop_over_a_row_is_counted(measured):
    for rows in measured.values():
        assert rows["head_token_loss bf16 entropy: _head_token_loss_kernel"]["loops"].count("_") >= 2
        assert "_rescale" in rows["head_token_loss bf16 alp: _head_token_loss_kernel"]["loops"]
        assert all(
            row["loops"]
            for name, row in rows.items()
            if re.search("head|perturb_[fb]wd_k|scale|long|select|sparse", name)
        )


@each_target
def test_no_kernel_spills_or_uses_local_memory(measured, target):
    spilled = {name: row for name, row in measured[target].items() if row["spills"] or row["stack"]}
    assert len(measured[target]) >= 26
    assert not spilled


@each_target
def test_shared_memory_fits(measured, target):
    assert max(row["shared"] for row in measured[target].values()) <= SHARED_LIMIT[target]


@each_target
def test_no_kernel_computes_in_double_precision(measured, target):
    """The one exception is a number per row: the head's log-sum-exp."""
    few = {name: 24 if name.startswith(("head_", "select ")) else 0 for name in measured[target]}
    assert not [name for name, row in measured[target].items() if row["float64"] > few[name]]


@each_target
@pytest.mark.parametrize(
    "case",
    [
        "perturb_fwd bf16: _perturb_fwd_kernel",
        "perturb_fwd fp32 rms: _perturb_fwd_kernel",
        "head_bwd bf16: _head_bwd_kernel",
        "head_exp bf16: _head_fwd_kernel",
        "head_exp bf16 few rows: _head_fwd_kernel",
        "head_token_loss bf16 alp: _head_token_loss_kernel",
    ],
)
def test_memory_moves_128_bits_at_a_time(measured, target, case):
    if target.startswith("hip") and "bf16" in case:
        pytest.skip("256 threads to a tile of 1024: 64 bits each")
    assert measured[target][case]["wide_loads"] >= 4  # one for each channel of a group
    assert measured[target][case]["wide_stores"] >= 4


@pytest.mark.parametrize("target", [name for name in SHARED_LIMIT if name.startswith("cuda")])
def test_the_sampled_backward_reads_128_bits_at_a_time(measured, target):
    for case in ("select bf16: _select_kernel", "select fp32: _select_kernel"):
        assert measured[target][case]["wide_loads"] >= 4
        assert measured[target][case]["shared"] == 0  # one warp a row needs no barrier
    for name in ("dhidden", "dweight"):
        assert measured[target][f"sparse_products bf16: _{name}_kernel"]["wide_loads"] >= 8  # one for each entry


@pytest.mark.parametrize("target", [name for name in SHARED_LIMIT if name.startswith("cuda")])
def test_single_logits_read_128_bits_at_a_time(measured, target):
    """Of each entry's row of h and row of w; four entries, and twice as many loads in float32."""
    for dtype, loads in (("bf16", 8), ("fp32", 16)):
        assert measured[target][f"sparse_logits {dtype}: _logits_kernel"]["wide_loads"] >= loads
