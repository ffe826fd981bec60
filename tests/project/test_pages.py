"""The pages' Python blocks and `alp` commands run, and their links lead to files and headings that exist."""

import inspect
import os
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from alp import cli
from alp.methods import METHODS
from alp.study.grid import load_grid
from alp.study.summary import is_collapsed
from alp_kernels import Objective, fused_alp_loss, policy_loss
from tests.support import processes
from tests.support.compare import likely_order_bound
from tests.support.pages import DOCS, PAGES, README, ROOT, anchors, blocks, commands, links, needs_gpu, script
from tests.support.tiny_models import write_hub_copy

RANKS = {"parallel.md": 2}
NEEDS = {"peft.md": "peft", "trl.md": "trl", "trainers.md": "openrlhf"}
RUN = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_python_runs_as_printed(page, tmp_path):
    """Run a page's blocks in order in one namespace; on the ranks of RANKS if the page is about several."""
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    for start, block in blocks(page, "python"):
        compile(block, f"{page.name}, line {start}", "exec")
    path = tmp_path / f"page_{page.stem}.py"  # a name that no module has
    path.write_text(script(page, has_gpu=torch.cuda.is_available()))
    if page.name in RANKS:
        processes.run_script(path, RANKS[page.name], tmp_path)
        return
    write_hub_copy(tmp_path / "hub", "Qwen/Qwen2.5-0.5B-Instruct")  # a small model in the hub's cache, for offline use
    place = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_one_block_waits_for_a_gpu():
    waiting = [page.name for page in RUN for _, block in blocks(page, "python") if needs_gpu(block)]
    assert waiting == ["compile.md"]


# roundings in a gradient: two layers' products and the head's, forward and backward, and the sum over all tokens
BOUND = likely_order_bound(2 * (2 * (4 * 32 + 3 * 64) + 64) + 8 * 16, torch.float32)
ONE_PROCESS = """
def gradients(module, handle):
    return {name: p.grad for name, p in module.named_parameters()} | {"log_sigma": handle.log_sigma.grad}

alone = make_model()
with attach(alone, sigma=1e-2) as alone_handle:
    row_ids = whole.pop("row_ids")
    with alone_handle.perturbed(step=0, row_ids=row_ids):
        Update(alone)(**whole).backward()
    if rank == 0:
        torch.save((gradients(model, handle), gradients(alone, alone_handle)), "OUT")
"""


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_ddp_block_makes_the_gradient_of_one_process(num_ranks, tmp_path):
    """Compare the first block of parallel.md with one process that takes the whole batch without DDP."""
    _, block = blocks(DOCS / "parallel.md", "python")[0]
    path = tmp_path / "ddp.py"
    path.write_text(block + ONE_PROCESS.replace("OUT", str(tmp_path / "out.pt")))
    processes.run_script(path, num_ranks, tmp_path)
    split, whole = torch.load(tmp_path / "out.pt")
    assert split.keys() == whole.keys()
    for name, gradient in whole.items():
        assert 0 < gradient.abs().max() < 10
        assert (split[name] - gradient).abs().max() <= BOUND * gradient.abs().max(), name


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words) for page in PAGES for words in commands(page)],
    ids=lambda x: getattr(x, "name", None),
)
def test_alp_commands_are_understood(page, words, tmp_path, monkeypatch):
    """Each command parses its options and reaches the function that does the work."""
    reached = []

    def instead(*arguments, **options):
        reached.append(words[0])
        return {}

    for place in ("train.train", "study.compare.compare", "study.report.write_report", "doctor.describe_machine",
                  "measures.benchmark.evaluate_on", "measures.benchmark.evaluate_named"):  # fmt: skip
        monkeypatch.setattr(f"alp.{place}", instead)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_methods.py").write_text(blocks(DOCS / "compare.md", "python")[0][1])
    monkeypatch.setattr(sys, "argv", ["alp", *words])
    with mock.patch.dict(METHODS):  # a plugin's method stays in this test
        assert cli.run() == 0 and reached == words[:1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Linked files and headings exist. The site's build checks the pages' links, too, but not README's."""
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_readme_is_short():
    text = re.sub(r"<!--.*?-->|^```.*?^```|^\|.*?$", "", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(text.split()) < 600


# ------------------------------------------------------------------ the guide


def table(heading: str, *, whole: bool = False) -> str:
    """The first column of a section's tables, or all of their text."""
    (part,) = re.findall(rf"^## {heading}\n(.*?)^## ", (DOCS / "guide.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return "\n".join(rows if whole else [row.split("|")[1] for row in rows])


def test_the_guide_explains_every_diagnostic():
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    rows = (torch.full((2, 3), -1.6), torch.tensor([1.0, -1.0]), torch.ones(2, 3))
    out = fused_alp_loss(hidden, weight, torch.zeros(2, 3, dtype=torch.long), *rows, objective=Objective())
    explained = table("Reading the diagnostics")
    for key in out.stats.summary():
        of_ratio = re.fullmatch(r"sequence_ratio/.*|token_ratio/q(05|25|50|75|95)", key)
        assert of_ratio or f"`{key}`" in explained or f"`/{key.split('/')[-1]}`" in explained, key
    assert "`sequence_ratio/...`" in explained


@pytest.mark.parametrize("function", [fused_alp_loss, policy_loss])
def test_the_guide_has_the_shape_of_every_argument(function):
    named = table("Shapes") + "`logp` `entropy`"
    assert [name for name in inspect.signature(function).parameters if f"`{name}`" not in named] == []


def steps(names: tuple[str, ...], *, collapsed: bool) -> list[dict]:
    """Of ALP and Bypass runs: the last ten of those that collapsed, or all of the others after the first ten."""
    cells = [cell for name in names for cell in load_grid(DOCS / "evidence" / name).cells]
    cells = [cell for cell in cells if cell.arm.startswith(("alp", "bypass")) and is_collapsed(cell) == collapsed]
    assert len(cells) == (11 if collapsed else 40)
    return [metrics for cell in cells for metrics in (cell.metrics[-10:] if collapsed else cell.metrics[10:])]


def test_the_guides_ranges_are_what_the_committed_runs_had():
    stable = steps(("lag", "mismatch"), collapsed=False)
    lost = steps(("search-fresh", "search-fresh-sequence", "replication"), collapsed=True)
    rows = re.findall(
        r"^\| `(\S+)` \|.*\| (\S+) to (\S+) \| (\S+) to (\S+) \|$",
        table("Reading the diagnostics", whole=True),
        flags=re.M,
    )
    assert len(rows) == 16
    for key, *shown in rows:
        found = [
            np.quantile([m[key] for m in part if m.get(key) is not None], q)
            for part in (stable, lost)
            for q in (0.05, 0.95)
        ]
        assert [float(x) for x in shown] == [float(f"{x:.2g}") for x in found], key


def test_the_guide_quotes_messages_that_exist():
    code = "".join(path.read_text() for path in (ROOT / "alp_kernels").rglob("*.py"))
    quoted = re.findall(r'^\*\*"(.*?)"', (DOCS / "guide.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) == 5
    for text in quoted:
        for part in text.split(" ... "):
            assert part.strip(". ") in code, part
