"""The evidence page: what the committed exports give, and pictures that are files of their own."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from alp.runs.svg import sheet
from alp.study import evidence
from alp.study.grid import load_grid
from alp.study.pictures import pictures
from tests.support.synthetic_grid import make_grid, write_folder

ROOT = Path(__file__).parents[2]


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
    assert "it needs a folder below" in capsys.readouterr().err


def test_the_evidence_page_says_what_the_committed_exports_give() -> None:
    page = ROOT / "docs" / "evidence.md"
    text = page.read_text() if page.exists() else ""
    exports = {path.parent.relative_to(page.parent).as_posix() for path in page.parent.glob("evidence/**/grid.json")}
    assert set(evidence.named(text)) == exports
    for place in exports:
        grid = load_grid(page.parent / place)
        assert evidence.replaced(text, place, evidence.to_markdown(grid, place)) == text, place
        for name, svg in evidence.to_svg(grid).items():
            assert (page.parent / place / name).read_text() == svg, f"{place}/{name}"
