"""The README's Python runs as printed, block after block in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_readme_code_runs(capsys):
    pytest.importorskip("transformers")
    assert BLOCKS
    namespace = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", README.read_text())
    assert len(links) > 5
    assert [link for link in links if not (README.parent / link).exists()] == []


@pytest.mark.parametrize("page", sorted(README.parent.glob("docs/*.md")), ids=lambda page: page.name)
def test_python_in_the_docs_is_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        compile(block, page.name, "exec")
