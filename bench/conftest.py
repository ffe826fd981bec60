"""`pytest bench/ --benchmark-only`: times every op against its peers and prints one table.

    --all-cases             every model, not only the default ones; cases that do not fit in memory are skipped by name
    --sweep                 time and memory of the loss head along V and N, in test_sweep.py (see bench.plots)
    --tuning                the kernels with other tiles and warps, in test_tuning.py; on a GPU
    --variants=A,B          only variants whose name contains A or B: --variants limit,alp_kernels
    --save-results          also write the numbers as JSON lines, in a new file for each run in bench/results
    --results-folder=DIR    ... or in DIR
    --passes=N              how often the variants take turns; use more for numbers to publish
    --smoke                 tiny shapes: tests the harness in two minutes; its times mean nothing
    --benchmark-verbose     also show pytest-benchmark's own table
    -k "qwen3-8b and bfloat16"       only some cases

Every variant's result is checked before timing. A variant with a wrong result is not timed and fails the run.
Results are saved after each turn, so a killed run keeps what it measured.
Ratios come from medians of the same run. Variants whose package or hardware is missing are skipped by name.
`python -m bench.table` makes Markdown from saved records, `python -m bench.plots` the sweep's picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .contest import Contest, turns
from .report import save, table

CONTEST = pytest.StashKey[Contest]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alp-kernels benchmarks")
    group.addoption("--save-results", action="store_true", help="write the numbers as JSON lines")
    results = Path(__file__).parent / "results"
    group.addoption("--results-folder", type=Path, default=results, metavar="DIR", help=f"default {results}")
    group.addoption("--variants", default="", metavar="A,B", help="only variants whose name contains A or B")
    group.addoption("--passes", type=int, metavar="N", help="how often the variants take turns")
    group.addoption("--all-cases", action="store_true", help="every model that fits in memory")
    group.addoption("--sweep", action="store_true", help="the loss head along V and N")
    group.addoption("--tuning", action="store_true", help="the kernels with other tiles and warps")
    group.addoption("--smoke", action="store_true", help="tiny shapes; the times mean nothing")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[CONTEST] = Contest(device, config.getoption("smoke"))
    config.option.benchmark_quiet = True  # the table at the end replaces its row for each pass


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        option = metafunc.config.getoption
        groups = metafunc.module.groups(metafunc.config.stash[CONTEST].device, option("smoke"))
        wanted = [group for group in groups if group.wants is None or option(group.wants)]
        metafunc.parametrize("turn", turns(wanted, option("passes"), option("variants").split(",")), ids=str)


@pytest.fixture
def contest(pytestconfig: pytest.Config) -> Iterator[Contest]:
    contest = pytestconfig.stash[CONTEST]
    yield contest
    if pytestconfig.getoption("save_results"):
        save(contest, pytestconfig.getoption("results_folder"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    contest = config.stash[CONTEST]
    if not contest.groups:
        return
    terminalreporter.section("times")
    for line in table(contest):
        terminalreporter.write_line(line)
    if config.getoption("smoke"):
        terminalreporter.write_line("--smoke: tiny shapes, these times mean nothing.")
    if config.getoption("save_results"):
        terminalreporter.write_line(f"saved: {save(contest, config.getoption('results_folder'))}")
