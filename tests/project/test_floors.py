"""The packages are layered in floors: every import, also inside functions, goes to a lower floor, without cycles."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = {
    "alp_kernels": [
        {"checks", "dtypes", "memory"},
        {"objective"},
        {"operators"},
        {"stream"},
        {"reference"},
        {"protocol"},
        {"native", "triton"},
        {"engine"},
        {"noise"},
        {"loss", "layers"},
        {"sigma"},
        {""},  # alp_kernels itself: what users import
        {"integrations"},
    ],
    "alp": [
        {"advantage", "doctor", "errors", "methods", "quiet"},
        {"plugins"},
        {"config"},
        {"policy"},
        {"ranks", "rollout"},
        {"runs", "sampling", "tasks", "update"},
        {"tools", "warmup"},
        {"setup"},
        {"measures"},
        {"train"},  # the loop
        {"study", "preloaded"},  # these use the loop
        {"cli", "evidence"},
        {"__main__", ""},
    ],
}
"""From the lowest floor up. Modules on the same floor do not import each other."""


def modules(package: str) -> dict[str, Path]:
    """Map dotted names below `package` ("" for itself) to files."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, name: str, package: str, known: set[str], at_once: bool) -> Iterator[str]:
    """Yield what a module imports from its own package: anywhere, or (at_once) only when it is imported."""
    folder = name.split(".") if name else []
    if path.name != "__init__.py":
        folder = folder[:-1]
    tree = ast.parse(path.read_text())
    later = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)} if at_once else set()
    for node in ast.walk(tree):
        if id(node) in later:
            continue
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [package, *folder][: len(folder) + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, item in targets:
            if base.partition(".")[0] != package:
                continue
            inner = base.partition(".")[2]
            deeper = f"{inner}.{item}".lstrip(".") if item else inner
            yield deeper if deeper in known else inner


@functools.cache
def graph(package: str, at_once: bool = False) -> dict[str, set[str]]:
    files = modules(package)
    return {name: set(imported(path, name, package, set(files), at_once)) - {name} for name, path in files.items()}


def reach(package: str, name: str, at_once: bool = False) -> set[str]:
    """Return all modules that a module needs, directly or not, itself included."""
    edges, seen, ahead = graph(package, at_once), set(), [name]
    while ahead:
        if (one := ahead.pop()) not in seen:
            seen.add(one)
            ahead += edges[one]
    return seen


def lines(package: str, names: set[str]) -> int:
    files = modules(package)
    return sum(len(files[name].read_text().splitlines()) for name in names)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the modules of each cycle (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in edges[node]:
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in edges:
        if node not in number:
            visit(node)
    return found


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("package", ["alp_kernels", "alp"])
def test_no_imports_close_a_circle(package):
    assert circles(graph(package)) == []


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package):
    floor = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    wrong = []
    for name, others in graph(package).items():
        for other in others:
            room, below = name.partition(".")[0], other.partition(".")[0]
            if room != below and not floor[below] < floor[room]:
                wrong.append(f"{name} -> {other}")
    assert wrong == []


def test_the_loop_knows_tasks_samplers_and_tools_by_their_protocols():
    """Constructors are imported only where a run begins, and the loop's own code stays small."""
    at_once = reach("alp", "train", at_once=True)
    kinds = {name for name in at_once if name.partition(".")[0] in {"tasks", "sampling", "tools"}}
    assert kinds <= {"tasks", "tasks.task"}
    assert {name.partition(".")[0] for name in graph("alp")["train"] - graph("alp", True)["train"]} <= {"setup", "runs"}
    assert lines("alp", at_once) <= 2800


def test_the_library_does_not_know_the_loop():
    for path in modules("alp_kernels").values():
        assert not re.search(r"^\s*(from|import) alp\b", path.read_text(), re.MULTILINE), path


def test_operators_are_called_where_they_are_made():
    """torch.ops.alp_kernels.NAME would be an import by string."""
    callers = [name for name, path in modules("alp_kernels").items() if "torch.ops.alp_kernels" in _code(path)]
    assert sorted(callers) == ["layers.operators", "operators"]


def _code(path: Path) -> str:
    """The file's code without docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) tests\.(\w+\.)*test_", path.read_text(), re.MULTILINE), path


def test_the_table_of_where_things_are_names_files():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| [^|]+ \| (`[^|]+) \|$", table, re.MULTILINE):
        package, folder = "", ""
        for name in re.findall(r"`([^`]+)`", row):
            if name.startswith(("alp/", "alp_kernels/", "docs/")):
                package, folder = name.split("/")[0], name.rpartition("/")[0]
                assert (ROOT / name).exists(), name
            else:
                assert any((ROOT / where / name).exists() for where in (package, folder)), name
