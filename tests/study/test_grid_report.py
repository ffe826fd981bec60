"""A grid's page, tables, export and evidence, for synthetic grids with known effects and runs of a tiny model."""

import csv
import dataclasses
import gzip
import html.parser
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from alp import cli
from alp.errors import UserError
from alp.runs.svg import Range
from alp.study.grid import Cell, Grid, export_grid, load_grid
from alp.study.grid_report import TABLES, write_grid_report
from alp.study.pictures import pictures
from alp.study.report import write_report
from alp.study.summary import (
    QUANTITIES,
    Contrast,
    accuracies,
    contrast,
    entry_text,
    is_collapsed,
    measure,
    seconds_of,
    short,
    status,
    summarise,
)
from tests.support.synthetic_grid import make_grid, write_folder

BROKEN = {("gspo", 1): "failed", ("mis", 2): "unfinished", ("bypass-token", 3): "collapsed"}


@pytest.fixture(scope="module")
def grid() -> Grid:
    """A grid in which alp-sequence is better by 0.1, one run failed, one collapsed and one is unfinished."""
    return make_grid(effects={"alp-sequence": 0.1}, broken=BROKEN)


@pytest.fixture(scope="module")
def page(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_grid_report(grid, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def contrasts(grid: Grid) -> list[Contrast]:
    return contrast(grid, measure(grid))


def found(where: Grid | list[Contrast], arm: str, key: str) -> Contrast:
    contrasts = contrast(where, measure(where)) if isinstance(where, Grid) else where
    (one,) = [c for c in contrasts if (c.arm, c.quantity.key) == (arm, key)]
    return one


def tiny(accuracy: dict[str, list[float]], contrasts: list[tuple[str, str]]) -> Grid:
    """Return a grid with only final accuracies, by arm and seed."""
    cells = [
        Cell(arm, seed, [{"step": 1}], {"before": {"train": 0.1}, "after": {"train": value}}, None)
        for arm, values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    num_seeds = len(next(iter(accuracy.values())))
    return Grid("tiny", "", {arm: {} for arm in accuracy}, list(range(num_seeds)), contrasts, cells, {})


# ------------------------------------------------------------------ loading and exporting


def test_a_grid_folder_is_read_with_every_state_of_a_run(grid: Grid, tmp_path: Path) -> None:
    write_folder(grid, tmp_path / "grid")
    loaded = load_grid(tmp_path / "grid")
    assert [(c.arm, c.seed, status(c), len(c.metrics)) for c in loaded.cells] == [
        (c.arm, c.seed, status(c), len(c.metrics)) for c in grid.cells
    ]
    assert dataclasses.replace(loaded, cells=[]) == dataclasses.replace(grid, cells=[])
    assert loaded.cells[0] == grid.cells[0]


def test_a_run_that_failed_once_and_then_finished_is_finished(grid: Grid, tmp_path: Path) -> None:
    write_folder(grid, tmp_path / "grid")
    (tmp_path / "grid" / "runs" / "grpo-s0" / "failure.txt").write_text("killed")
    assert load_grid(tmp_path / "grid").cells[0].failure is None


def test_runs_that_have_not_begun_are_unfinished(grid: Grid, tmp_path: Path) -> None:
    write_folder(dataclasses.replace(grid, cells=[]), tmp_path / "grid")
    loaded = load_grid(tmp_path / "grid")
    assert len(loaded.cells) == 40 and {status(c) for c in loaded.cells} == {"unfinished"}
    assert write_report([tmp_path / "grid"]).is_file()


def test_an_export_gives_the_same_numbers_and_the_same_bytes(tmp_path: Path) -> None:
    grid = make_grid(3, 2, 20, broken={("gspo", 1): "failed"})
    export_grid(grid, tmp_path / "one")
    loaded = load_grid(tmp_path / "one")
    here, there = measure(grid), measure(loaded)
    for cell in here:
        assert there[cell] == pytest.approx(here[cell], rel=1e-4), cell
    export_grid(loaded, tmp_path / "two")
    for name in ("grid.json", "cells.jsonl.gz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lines = gzip.decompress((tmp_path / "one" / "cells.jsonl.gz").read_bytes()).decode()
    assert "NaN" not in lines and "Infinity" not in lines and "reward" in lines
    assert max(len(number) for number in re.findall(r"\d\.(\d+)", lines)) <= 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a grid: it has no grid.json"),
        ("{", "is not the description of a grid"),
        ('{"name": "x"}', "is not the description of a grid"),
        (
            '{"name": "x", "about": "", "arms": {"a": {}}, "seeds": [0], "contrasts": [["a", "b"]], "provenance": {}}',
            "contrasts name b, which is not an arm",
        ),
    ],
)
def test_what_is_no_grid_says_why(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_grid(tmp_path)


def test_a_damaged_export_is_a_user_error(tmp_path: Path) -> None:
    export_grid(make_grid(1, 1, 2), tmp_path)
    content = (tmp_path / "cells.jsonl.gz").read_bytes()
    (tmp_path / "cells.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as the cells of a grid"):
        load_grid(tmp_path)


# ------------------------------------------------------------------ numbers


def test_a_cells_numbers_follow_their_rules() -> None:
    steps: list[dict[str, Any]] = [
        {"step": t, "reward": r, "clean/k3_kl": k, "clean/token_ratio/std": 2.0, "rollout_s": 1.0, "update_s": 0.5}
        for t, r, k in ((1, 0.0, 0.1), (2, 0.5, 0.4), (3, 1.0, 0.1))
    ]
    steps[1] |= {"eval/train": 0.7, "sigma": [0.1, 0.3]}
    steps[2] |= {"eval/train": 0.6, "sigma": [0.1, 0.2]}
    cell = Cell(
        "a", 0, steps, {"before": {"train": 0.2}, "after": {"train": 0.65, "pass@4": 0.8, "pass@16": 0.9}}, None
    )
    values = measure(Grid("", "", {"a": {"steps": 3}}, [0], [], [cell], {}))["a", 0]
    assert accuracies(cell) == ([0, 2, 3], [0.2, 0.7, 0.65])
    expected = {"final_accuracy": 0.65, "best_accuracy": 0.7, "final_pass": 0.9, "reward_area": 0.5, "collapsed": 0.0}
    expected |= {"k3_max": 0.4, "k3_end": 0.2, "token_variance": 4.0, "sigma": 0.15, "step_s": 1.5, "run_s": 4.5}
    assert {key: values[key] for key in expected} == pytest.approx(expected)
    assert "peak_mib" not in values, "what was not recorded is missing, not 0"
    assert seconds_of({"step_s": 2.0, "rollout_s": 1.0}) == 2.0 and seconds_of({"reward": 1.0}) is None


def test_a_failed_run_keeps_its_last_accuracy_and_reward() -> None:
    steps: list[dict[str, Any]] = [{"step": t, "reward": 0.2, "clean/k3_kl": 0.1} for t in (1, 2, 3)]
    steps[1] |= {"eval/train": 0.3}
    steps[2] |= {"reward": 1.0, "clean/k3_kl": float("nan")}
    cell = Cell("a", 0, steps, None, "non-finite gradient")
    values = measure(Grid("", "", {"a": {"steps": 11}}, [0], [], [cell], {}))["a", 0]
    assert values["final_accuracy"] == 0.3 and values["k3_max"] == 0.1 and values["collapsed"] == 1.0
    assert values["reward_area"] == pytest.approx((0.2 + 0.6 + 8 * 1.0) / 10)


def test_spikes_need_a_kl_at_every_step_and_wait_for_the_lag() -> None:
    kl = [0.01, 0.04, 0.09, 0.16, 0.25, 1.0] + [0.2] * 8 + [0.8]
    for every, lag, expected in ((1, 0, 2), (1, 6, 1), (10, 0, None)):
        steps: list[dict[str, Any]] = [
            {"step": i + 1} | ({"clean/k3_kl": k} if i % every == 0 else {}) for i, k in enumerate(kl)
        ]
        grid = Grid("", "", {"a": {"rollout": {"lag": lag}}}, [0], [], [Cell("a", 0, steps, None, None)], {})
        assert measure(grid)["a", 0].get("kl_spikes") == expected


def test_collapse_is_seen_in_greedy_or_sampled_accuracy() -> None:
    def ended(train: float, greedy: float) -> bool:
        before = {"train": 0.4, "greedy": 0.9}
        return is_collapsed(Cell("a", 0, [], {"before": before, "after": {"train": train, "greedy": greedy}}, None))

    assert not ended(0.3, 0.6) and ended(0.1, 0.6) and ended(0.3, 0.4)


def test_the_summary_says_how_many_seeds_it_is_over(grid: Grid) -> None:
    arms = summarise(grid, measure(grid))
    assert arms["grpo"]["final_accuracy"].n == 5
    assert entry_text(QUANTITIES["sigma"], arms["grpo"].get("sigma"), 5) == "-"
    assert entry_text(QUANTITIES["collapsed"], arms["gspo"]["collapsed"], 5) == "1 in 5 runs"
    assert arms["bypass-token"]["kl_spikes"].total == 5, "one in each of its runs"
    one_short = dataclasses.replace(arms["grpo"]["final_accuracy"], n=4)
    assert entry_text(QUANTITIES["final_accuracy"], one_short, 5).endswith("(4)")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8125, "0.812"), (12.345, "12.3"), (47979, "47979"), (0.00123456, "0.00123"), (1e-5, "1.00e-05"), (0.0, "0")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
    if value:
        assert short(value, signed=True) == f"+{text}" and short(-value) == f"-{text}"


# ------------------------------------------------------------------ contrasts


def test_a_true_effect_is_found_and_none_is_not_claimed(contrasts: list[Contrast]) -> None:
    better, same = found(contrasts, "alp-sequence", "final_accuracy"), found(contrasts, "tis-token", "final_accuracy")
    assert better.verdict == "higher" and better.paired.low > 0.05
    assert same.verdict == "cannot be told apart"
    assert re.fullmatch(
        r"alp-sequence - grpo: final accuracy \+0\.\d+ \[\+0\.\d+, \+0\.\d+\], higher \(p 0\.0\d+, 5 seeds\)",
        better.sentence,
    )
    assert "cannot be told apart (p 1.00, 5 seeds)" in same.sentence
    assert found(contrasts, "alp-sequence", "k3_max").sentence.startswith("alp-sequence / grpo: k3 KL, max x 3.")


def test_swapping_the_arms_swaps_the_words() -> None:
    accuracy = {"a": [0.5, 0.52, 0.48, 0.51, 0.5], "b": [0.7, 0.71, 0.69, 0.72, 0.69]}
    up, down = (found(tiny(accuracy, [pair]), pair[0], "final_accuracy") for pair in (("b", "a"), ("a", "b")))
    assert (up.verdict, down.verdict) == ("higher", "lower")
    assert up.paired.mean == -down.paired.mean and up.paired.low == -down.paired.high
    assert up.p_corrected == down.p_corrected


def test_many_contrasts_cost_a_claim() -> None:
    accuracy = {"a": [0.50, 0.52, 0.48, 0.51, 0.49], "b": [0.56, 0.54, 0.53, 0.61, 0.51]}
    accuracy |= {f"c{i}": [0.51, 0.50, 0.49, 0.50, 0.51] for i in range(6)}
    alone = found(tiny(accuracy, [("b", "a")]), "b", "final_accuracy")
    crowd = found(tiny(accuracy, [(arm, "a") for arm in accuracy if arm != "a"]), "b", "final_accuracy")
    assert alone.verdict == "higher" and crowd.verdict == "cannot be told apart"
    assert crowd.p_corrected == pytest.approx(7 * alone.p_corrected)


def test_equal_differences_claim_no_more_than_a_sign_flip_can() -> None:
    accuracy = {"a": [0.25] * 5, "b": [0.5] * 5}
    one = found(tiny(accuracy, [("b", "a")]), "b", "final_accuracy")
    assert one.p_corrected == 1 / 16 and one.verdict == "cannot be told apart"


def test_one_seed_is_not_tested_and_none_says_so() -> None:
    one = found(tiny({"a": [0.5], "b": [0.6]}, [("b", "a")]), "b", "final_accuracy")
    assert one.verdict == "not tested" and one.sentence == "b - a: final accuracy +0.100, not tested (1 seed)"
    cells = [Cell("b", 0, [{"step": 1, "eval/train": 0.5}], None, None)]
    none = dataclasses.replace(tiny({"a": [0.5], "b": [0.6]}, [("b", "a")]), cells=cells)
    assert found(none, "b", "final_accuracy").sentence == "b - a: final accuracy: no seed has both"


def test_unfinished_runs_wait_and_lost_ones_are_named(contrasts: list[Contrast]) -> None:
    assert found(contrasts, "mis", "final_accuracy").paired.n == 4
    failed = found(contrasts, "gspo", "final_accuracy")
    assert failed.paired.n == 5 and failed.sentence.endswith("5 seeds; gspo collapsed on 1)")
    assert found(contrasts, "bypass-token", "k3_max").sentence.endswith("5 seeds; bypass-token collapsed on 1)")


def test_quotients_are_used_only_where_all_is_positive() -> None:
    base = tiny({"a": [0.5] * 3, "b": [0.5] * 3}, [("b", "a")])
    for kl, is_ratio in ((0.01, True), (0.0, False)):
        cells = [
            dataclasses.replace(c, metrics=[{"step": 1, "clean/k3_kl": 0.02 + 0.01 * c.seed if c.arm == "b" else kl}])
            for c in base.cells
        ]
        assert found(dataclasses.replace(base, cells=cells), "b", "k3_max").is_ratio is is_ratio


# ------------------------------------------------------------------ the page


class Tags(html.parser.HTMLParser):
    """Asserts that open tags close, and counts tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("meta", "circle", "rect"):
            return
        assert self.open and self.open.pop() == tag, f"{tag} closes what is not open"


def test_the_page_stands_alone_and_is_well_formed(page: Path) -> None:
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe"} and "url(" not in text
    assert not [a for _, a in tags.seen if {"src", "href"} & a.keys()]
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    assert "&lt;accuracy&gt;" in text and "none &amp; nothing" in text
    assert sum(tag == "svg" for tag, _ in tags.seen) > 40 and page.stat().st_size < 1e6


def test_the_page_shows_what_went_wrong_and_what_was_found(page: Path) -> None:
    text = html.unescape(page.read_text())
    assert "38 of 40 runs finished, 1 failed, 1 unfinished" in text
    assert "gspo, seed 1: failed, non-finite gradient (after 30 steps)" in text
    assert "bypass-token, seed 3: collapsed" in text and "mis, seed 2 (30 steps)" in text
    assert "cannot give p below 1/16" in text
    assert re.search(r"alp-sequence - grpo: final accuracy \+0\.1\d+ .*?higher", text)
    for title in (
        "Sampled accuracy",
        "KL between consecutive policies",
        "Clean log-ratio by sequence",
        "Sigma by layer",
    ):
        assert f"<h3>{title}</h3>" in text
    assert "<th>update.sigma</th>" in text and "<th>seed</th>" not in text


def test_the_tables_hold_every_cell_and_contrast(page: Path, grid: Grid) -> None:
    summary = list(csv.DictReader((page.parent / "summary.csv").open()))
    row = next(r for r in summary if (r["arm"], r["quantity"]) == ("grpo", "final_accuracy"))
    assert float(row["mean"]) == pytest.approx(summarise(grid, measure(grid))["grpo"]["final_accuracy"].mean)
    contrasts = list(csv.DictReader((page.parent / "contrasts.csv").open()))
    assert {r["arm"] for r in contrasts} == grid.arms.keys() - {"grpo"}
    assert {r["verdict"] for r in contrasts} <= {"higher", "lower", "cannot be told apart", "not tested"}
    data = json.loads((page.parent / "report.json").read_text(), parse_constant=pytest.fail)
    assert len(data["cells"]) == 40 and len(data["contrasts"]) == len(contrasts)
    assert data["cells"][6]["status"] == "failed" and data["cells"][6]["is_collapsed"]


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    grid, page = make_grid(2, 2, 4), tmp_path / "own" / "report.html"
    write_grid_report(make_grid(1, 1, 1), page)
    write_grid_report(grid, page)
    assert "alp: synthetic" in page.read_text() and "gspo" in page.read_text()
    other = tmp_path / "thesis.html"
    other.write_text("<!doctype html><title>mine</title>")
    with pytest.raises(UserError, match=r"thesis\.html exists and is not a page of alp report"):
        write_grid_report(grid, other)
    with pytest.raises(UserError, match="is not a page of alp report"):
        write_grid_report(grid, tmp_path)
    (tmp_path / "summary.csv").write_text("mine")
    with pytest.raises(UserError, match=r"summary\.csv exists without report\.html"):
        write_grid_report(grid, tmp_path / "report.html")
    assert other.read_text().endswith("mine</title>") and (tmp_path / "summary.csv").read_text() == "mine"


def test_the_command_takes_a_grid_or_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = make_grid(2, 2, 12)
    write_folder(small, tmp_path / "grid")
    export_grid(small, tmp_path / "export")
    for folder in ("grid", "export"):
        monkeypatch.setattr(sys, "argv", ["alp", "report", str(tmp_path / folder)])
        assert cli.run() == 0
        said = capsys.readouterr().out
        assert f"wrote {tmp_path / folder / 'report.html'}" in said and "4 runs: 4 finished" in said
        assert all((tmp_path / folder / name).is_file() for name in TABLES)
    monkeypatch.setattr(sys, "argv", ["alp", "report", str(tmp_path / "grid"), str(tmp_path / "export")])
    assert cli.run() == 2
    assert "is a grid; report a grid alone, without other folders" in capsys.readouterr().err


def test_twenty_arms_have_panels_but_no_panel_of_twenty_lines() -> None:
    shown = {p.key: p for p in pictures(make_grid(20, 2, 12))}
    assert len(shown["reward"].panels) == 20 and shown["reward"].overlay is None
    assert {p.key for p in pictures(make_grid(2, 1, 12)) if p.overlay is not None} >= {"reward", "cost"}


def test_a_grid_of_one_step_or_of_little_data_still_has_a_page(tmp_path: Path) -> None:
    write_grid_report(make_grid(1, 1, 1), tmp_path / "a" / "report.html")
    bare = tiny({"a": [0.5], "b": [0.6]}, [("b", "a")])
    write_grid_report(bare, tmp_path / "b" / "report.html")
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "a" / "report.html").read_text())
    assert "b - a: final accuracy +0.100" in (tmp_path / "b" / "report.html").read_text()


@pytest.mark.parametrize(
    ("low", "high", "is_log"),
    [
        (0, 1, False),
        (-3.2, 7, False),
        (0, 60, False),
        (1e-6, 3e-1, True),
        (0.9, 1.3, True),
        (2, 2.1, True),
        (1, 1e9, True),
    ],
)
def test_ticks_are_few_and_inside(low: float, high: float, is_log: bool) -> None:
    ticks = Range(low, high, is_log).ticks()
    assert 2 <= len(ticks) <= 12 and all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_ranges_hold_their_values() -> None:
    for values in ([0.1, 0.5], [3.0, 3.0], [0.0, 0.0], [-1.0, 5.0], [math.nan, 2.0]):
        drawn = Range.of(values)
        assert all(0 <= drawn.place(v) <= 1 for v in values if math.isfinite(v))
    positive = Range.of([0.0, 1e-5, 1e-2], is_log=True)
    assert 0 < positive.low < 1e-5 and not positive.holds(0.0)
