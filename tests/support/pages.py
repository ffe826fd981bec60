"""Read README and docs: their Python blocks, their `alp` commands, their links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks in `language`, each as the number of its first line on the page and its text."""
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in _BLOCK.finditer(text) if m[1] == language]


def needs_gpu(block: str) -> bool:
    return ".cuda(" in block


def script(page: Path, *, has_gpu: bool) -> str:
    """A page's Python blocks in order, at the page's line numbers; without a GPU, blocks that need one are left out."""
    lines: list[str] = []
    for start, block in blocks(page, "python"):
        if has_gpu or not needs_gpu(block):
            lines += [""] * (start - 1 - len(lines)) + block.splitlines()
    return "\n".join(lines) + "\n"


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each `alp` command in a page's shell blocks."""
    for _, block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = words[words.index("-m") + 1 :]
            while "alp" in words:
                words = words[words.index("alp") + 1 :]
                yield words[: words.index("&&")] if "&&" in words else words


def links(page: Path) -> list[tuple[str, str]]:
    """Path and anchor of each link to a file of the project."""
    found = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", _BLOCK.sub("", page.read_text()))
    return [(path, anchor) for path, anchor in found if path or anchor]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
