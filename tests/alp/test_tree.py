"""The tree says who knows whom: the loop on top, rooms below it, the study a guest. Read from the imports themselves."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDY = {
    "compare",
    "grid",
    "grid_plots",
    "grid_report",
    "summary",
    "statistics",
    "report",
    "evidence",
    "presets",
    "study",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in (ROOT / "alp").rglob("*.py")}


@cache
def imports(module: str, at_once: bool = False) -> frozenset[str]:
    """Modules of alp that this one imports: anywhere, or as soon as it is imported itself."""
    path, found = MODULES[module], set()
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if at_once and id(node) in later:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names} | {source}
    return frozenset(found & MODULES.keys() - {module, "alp"})


def reach(module: str, at_once: bool = False) -> set[str]:
    """What it needs, directly or not, itself included."""
    seen, ahead = set(), [module]
    while ahead:
        if (one := ahead.pop()) not in seen:
            seen.add(one)
            ahead += imports(one, at_once)
    return seen


def room(module: str) -> str:
    """`train` of alp.train, `tasks` of alp.tasks.gym."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_needs_itself(module: str) -> None:
    assert not any(module in reach(one) for one in imports(module)), "a circle"


@pytest.mark.parametrize(
    ("above", "below"),
    [("tools", "tasks"), ("update", "sampling"), *(("train", below) for below in ("tasks", "sampling", "tools"))],
)
def test_rooms_do_not_know_what_stands_above_them(above: str, below: str) -> None:
    for module in MODULES:
        if room(module) == below:
            assert above not in map(room, reach(module)), module


def test_no_room_imports_the_loop_or_the_command_line() -> None:
    for module in MODULES:
        if module.count(".") > 1 and room(module) not in STUDY:
            assert not {"alp.train", "alp.cli"} & imports(module), module


def test_only_the_command_line_knows_the_study() -> None:
    for module in MODULES:
        if room(module) not in STUDY | {"cli"}:
            assert not STUDY & set(map(room, imports(module))), module


def test_the_loop_knows_tasks_samplers_and_tools_by_their_protocols() -> None:
    at_once = reach("alp.train", at_once=True)
    assert {module for module in at_once if room(module) in {"tasks", "sampling", "tools"}} <= {
        "alp.tasks",
        "alp.tasks.task",
    }
    lazily = imports("alp.train") - imports("alp.train", at_once=True)
    assert {room(module) for module in lazily} <= {"setup", "plots"}
