"""The locks fit pyproject.toml: they pin exact versions within its ranges for everything an environment needs."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {path.stem: path for path in sorted(REQUIREMENTS.glob("*.txt"))}
MAIN_EXTRAS = ("test", "bench", "docs", "dev")
UNLOCKED = {"alp-kernels", "torch", "triton"}
"""PyTorch's build depends on the machine, and some builds come with their own Triton."""


def read_lock(path: Path) -> dict[str, str]:
    """Return versions by name, from the lines that apply to this machine."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in map(Requirement, lines):
        (pin,) = line.specifier
        assert pin.operator == "==" and "*" not in pin.version and line.url is None, line
        if line.marker is None or line.marker.evaluate():
            assert canonicalize_name(line.name) not in found, line
            found[canonicalize_name(line.name)] = pin.version
    return found


def requirements_of(*extras: str) -> list[Requirement]:
    """Return what pyproject.toml requires on this machine, including extras named by an extra."""
    found = list(map(Requirement, PROJECT["dependencies"]))
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if requirement.name == "alp-kernels":
                found += requirements_of(*requirement.extras)
            elif requirement.marker is None or requirement.marker.evaluate():
                found.append(requirement)
    return [r for r in found if canonicalize_name(r.name) not in UNLOCKED]


def forced(name: str) -> dict[str, Requirement]:
    path = REQUIREMENTS / f"{name}.in"
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()] if path.exists() else []
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}


def test_every_input_has_its_lock_and_every_lock_its_input() -> None:
    assert {path.stem for path in REQUIREMENTS.glob("*.in")} - {"build"} == LOCKS.keys() - {"locked"}
    makefile = (ROOT / "Makefile").read_text()
    called = set(re.findall(r"\btest-([\w.-]+)", re.search(r"^test-all:(.*?)\n\n", makefile, re.M | re.S).group(1)))
    assert called == LOCKS.keys() - {"locked"}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_what_pyproject_asks_for_within_its_ranges(name: str) -> None:
    versions = read_lock(LOCKS[name])
    overridden = forced(name)
    for requirement in [*requirements_of(*(MAIN_EXTRAS if name == "locked" else ("test",))), *overridden.values()]:
        requirement = overridden.get(canonicalize_name(requirement.name), requirement)
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {LOCKS[name].name}: make lock-keep"
        assert version in requirement.specifier, f"{name}: {requirement}, locked at {version}: make lock-keep"


def test_oldest_is_each_lower_bound_itself() -> None:
    versions = read_lock(LOCKS["oldest"])
    for requirement in requirements_of("test"):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                have, least = (
                    tuple(map(int, v.split("."))) for v in (versions[requirement.name.lower()], bound.version)
                )
                assert have == least + (0,) * (len(have) - len(least)), f"{requirement}, tested from {have} on"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place_and_no_build_of_torch(name: str) -> None:
    text = LOCKS[name].read_text()
    assert not re.search(r"https?:|file:|--|@", text)
    assert not [line for line in text.splitlines() if re.match(r"(torch|triton)==|nvidia-|cuda-", line)]


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not .venv: its versions are not those of locked.txt")
def test_what_is_installed_is_what_is_locked() -> None:
    """Checks everything that the extra `test` installs, from package to package."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from environment import is_locked_for_this_machine
    finally:
        sys.path.pop(0)
    if not is_locked_for_this_machine():
        pytest.skip("no lock for this machine")
    versions = read_lock(LOCKS["locked"])
    waiting, seen = requirements_of("test"), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name in UNLOCKED or (name, extra) in seen:
                continue
            seen.add((name, extra))
            assert importlib.metadata.version(name) == versions[name], name
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    assert len(seen) > 60
