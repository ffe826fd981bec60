"""The evidence page: it shows what the committed exports give, and its pictures are standalone files."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from alp.runs.svg import sheet
from alp.study import evidence
from alp.study.grid import load_grid
from alp.study.pictures import pictures
from alp.study.statistics import holm, paired
from alp.study.summary import QUANTITIES, measure, p_text, short
from tests.support.synthetic_grid import make_grid, write_folder

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"


def test_pictures_are_files_of_their_own() -> None:
    grid = make_grid(7, 2, 20)
    files = evidence.to_svg(grid)
    assert {"accuracy.svg", "k3.svg", "step_kl.svg", "histogram_token.svg", "envelope.svg", "sigma.svg"} == files.keys()
    for svg in files.values():
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg") and float(root.attrib["width"]) > 300
        assert "prefers-color-scheme:dark" in svg and "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert evidence.to_svg(grid) == files, "the same grid, the same bytes"
    assert "layer 3" in files["sigma.svg"]
    assert sheet(pictures(grid)[0].panels[:1]).count("<g ") == 2


def test_a_pages_parts_are_made_again_and_its_prose_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, export = tmp_path / "docs" / "evidence.md", tmp_path / "docs" / "evidence" / "lag"
    write_folder(make_grid(3, 3, 20, broken={("gspo", 1): "failed"}), tmp_path / "grid")
    arguments = ["--page", str(page)]
    assert evidence.main([*arguments, "--grid", str(tmp_path / "grid"), str(export)]) == 0
    text = page.read_text()
    assert "## lag" in text and "![Sampled accuracy](evidence/lag/accuracy.svg)" in text
    assert "- gspo, seed 1, after 10 steps: failed, non-finite gradient" in text
    assert "| grpo | 0." in text and "| gspo against grpo | " in text and (export / "k3.svg").is_file()
    page.write_text(text.replace("## lag", "## lag\n\nWhat this shows.").replace("| grpo | 0.", "| grpo | 9."))
    assert evidence.main(arguments) == 0
    assert page.read_text() == text.replace("## lag", "## lag\n\nWhat this shows.")
    assert evidence.main([*arguments, str(tmp_path / "nowhere")]) == 2
    assert "the page can link only to pictures below" in capsys.readouterr().err


def test_the_evidence_page_says_what_the_committed_exports_give() -> None:
    text = PAGE.read_text()
    exports = {path.parent.relative_to(PAGE.parent).as_posix() for path in PAGE.parent.glob("evidence/**/grid.json")}
    assert set(evidence.named(text)) == exports
    for place in exports:
        grid = load_grid(PAGE.parent / place)
        assert evidence.replaced(text, place, evidence.to_markdown(grid, place)) == text, place
        for name, svg in evidence.to_svg(grid).items():
            assert (PAGE.parent / place / name).read_text() == svg, f"{place}/{name}"


POOLED = {
    "final accuracy": "final_accuracy",
    "reward area": "reward_area",
    "mean k3 KL": "k3_mean",
    "token ratio q99.9": "token_q99.9",
}


def pooled(level: str, key: str, names: tuple[str, ...]) -> str:
    """ALP against Bypass over the seeds of several grids, as the page writes it."""
    differences = []
    for name in names:
        grid = load_grid(ROOT / "docs" / "evidence" / name)
        values = measure(grid)
        for seed in grid.seeds:
            alp, bypass = (values[f"{method}-{level}", seed][key] for method in ("alp", "bypass"))
            differences.append(math.log(alp / bypass) if QUANTITIES[key].is_ratio else alp - bypass)
    found = paired(differences)
    sizes = [found.mean, found.low, found.high]
    mean, low, high = map(math.exp, sizes) if QUANTITIES[key].is_ratio else sizes
    digits = 3 if found.p_t < 0.02 or abs(found.p_t - 0.05) < 0.005 else 2  # near 0.05 two do not say which side
    size = f"x {mean:.2f}" if QUANTITIES[key].is_ratio else f"{mean:+.2f}"
    return f"{size} [{low:.2f}, {high:.2f}], p {found.p_t:.{digits}f}"


def test_the_replication_table_is_what_its_seeds_give() -> None:
    rows = re.findall(r"^\| (.*), (token|sequence) \| (.*) \| (.*) \| (.*) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert [(name, level) for name, level, *_ in rows] == [(n, lvl) for n in POOLED for lvl in ("token", "sequence")]
    for name, level, *cells in rows:
        first = "search-fresh" if level == "token" else "search-fresh-sequence"
        sets = ((first,), ("replication",), (first, "replication"))
        assert cells == [pooled(level, POOLED[name], names) for names in sets], (name, level)


LEARNED = {
    "final accuracy": "final_accuracy",
    "reward area": "reward_area",
    "gradient norm": "grad_norm",
    "mean k3 KL": "k3_mean",
    "mass below 2^-12 after 25 steps": 25,
    "mass below 2^-12 after 50 steps": 50,
}


def sampled_table() -> list[str]:
    """Each sampled arm against the exact one, on the first seeds, the others and all, as the page writes it."""
    folder = PAGE.parent / "evidence" / "sampled"
    grid, mass = load_grid(folder), json.loads((folder / "small-mass.json").read_text())
    values = measure(grid)
    arms = [arm for arm, _ in grid.contrasts]
    sets = (grid.seeds[:5], grid.seeds[5:], grid.seeds)

    def number(arm: str, seed: int, key: str | int) -> float:
        return values[arm, seed][key] if isinstance(key, str) else mass[f"{arm}-s{seed}@{key}"]["2^-12"][0]

    lines = []
    for name, key in LEARNED.items():
        is_ratio = isinstance(key, int) or QUANTITIES[key].is_ratio
        cells: dict[str, list[str]] = {arm: [] for arm in arms}
        for seeds in sets:
            scale = math.log if is_ratio else float
            found = [
                paired([scale(number(arm, s, key)) - scale(number("exact", s, key)) for s in seeds]) for arm in arms
            ]
            for arm, one, p in zip(arms, found, holm([one.p_t for one in found]), strict=True):
                sizes = [one.mean, one.low, one.high]
                size, low, high = (
                    short(math.exp(x)) if is_ratio else short(round(x, 5), signed=True, digits=2) for x in sizes
                )
                cells[arm].append(f"{'x ' if is_ratio else ''}{size} [{low}, {high}], p {p_text(p)}")
        lines += [f"| {name} | {arm.removeprefix('sampled-')} | {' | '.join(cells[arm])} |" for arm in arms]
    return lines


def test_the_sampled_table_is_what_its_seeds_give() -> None:
    text = PAGE.read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| [^|]+ \| 2\^-1[024] \| ", line)]
    assert rows == sampled_table()


def test_the_readme_claims_what_the_page_does() -> None:
    readme = (ROOT / "README.md").read_text()
    for names, key in (
        (("replication",), "k3_mean"),
        (("replication",), "final_accuracy"),
        (("settle-fresh",), "k3_mean"),
    ):
        size, _, _ = pooled("token", key, names).partition(", p")
        assert size in readme, size
