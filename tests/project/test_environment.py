"""scripts/environment.py: what it installs with and without a lock for the machine, and what it does not print."""

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script for a checkout in tmp_path; it records its commands in `commands` and runs none."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "environment", raising=False)
    import environment

    for name in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path / "requirements")
    monkeypatch.setattr(environment, "LOCK", tmp_path / "requirements" / "locked.txt")
    commands: list[str] = []
    monkeypatch.setattr(environment, "run", lambda *command: commands.append(" ".join(map(str, command))) or True)
    monkeypatch.setattr(environment, "succeeds", lambda *command: False)  # nothing is installed yet
    monkeypatch.setattr(environment, "output_of", lambda *command: "")
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    monkeypatch.setattr(environment.venv, "create", lambda folder, **_: Path(folder).mkdir(exist_ok=True))
    environment.commands = commands
    return environment


def on(script: ModuleType, monkeypatch: pytest.MonkeyPatch, machine: str, version: tuple[int, int]) -> None:
    monkeypatch.setattr(script.sys, "platform", "linux")
    monkeypatch.setattr(script.sys, "version_info", version)
    monkeypatch.setattr(script.platform, "machine", lambda: machine)
    monkeypatch.setattr(script.platform, "system", lambda: "Linux")


@pytest.mark.parametrize("version", [(3, 11), (3, 13)])
def test_a_machine_with_a_lock_takes_it_for_packages_and_their_builds(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: tuple[int, int]
) -> None:
    on(script, monkeypatch, "x86_64", version)
    script.make_base("test", is_newest=False)
    lock = str(script.LOCK)
    (install,) = (c for c in script.commands if "--editable .[test]" in c)
    assert f"--constraint {lock} --build-constraint {lock}" in install
    (torch,) = (c for c in script.commands if f"torch=={script.TORCH}" in c)
    assert "--torch-backend=cpu" in torch and f"--constraint {lock}" in torch
    assert "taking the newest" not in capsys.readouterr().out
    script.commands.clear()
    script.make_base("test", is_newest=False)
    assert script.commands == [], "an environment that is there is left alone"
    script.LOCK.write_text(script.LOCK.read_text() + "more==1.0\n")
    script.make_base("test", is_newest=False)
    assert script.commands, "another lock, another environment"


@pytest.mark.parametrize(("machine", "version"), [("aarch64", (3, 11)), ("x86_64", (3, 14))])
def test_a_machine_without_a_lock_takes_the_ranges_and_is_told(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: str,
    version: tuple[int, int],
) -> None:
    on(script, monkeypatch, machine, version)
    base = script.make_base("train", is_newest=False)
    assert script.commands and not [c for c in script.commands if "constraint" in c]
    told = capsys.readouterr().out
    assert "locked.txt is for Python 3.11 to 3.13 on Linux and x86-64; this is Python" in told
    assert f"on Linux and {machine}: taking the newest versions that pyproject.toml allows" in told
    with pytest.raises(SystemExit, match=r"oldest.txt is for Python 3.11 to 3.13 on Linux and x86-64"):
        script.make_overlay(base, "oldest")
    with pytest.raises(SystemExit, match=r"there is no requirements.old\.txt"):
        script.make_overlay(base, "old")


def test_newest_takes_no_lock_and_asks_anew_each_time(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    on(script, monkeypatch, "x86_64", (3, 11))
    for _ in range(2):
        script.commands.clear()
        assert script.make_base("test", is_newest=True).folder.name == ".venv-newest"
        (install,) = (c for c in script.commands if "--editable .[test]" in c)
        assert f"--upgrade torch=={script.TORCH}" in install and "constraint" not in install


def test_pips_lines_about_folders_that_are_not_there_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "environment", raising=False)
    import environment

    ignored = "WARNING: Location 'file:///no/such/place/' is ignored: it is neither a file nor a directory."
    speak = f"import sys; print({ignored!r}, file=sys.stderr); print('a real one', file=sys.stderr); sys.exit(3)"
    assert environment.run(sys.executable, "-c", speak) is False
    shown = capsys.readouterr()
    assert shown.err == "a real one\n" and ignored not in shown.out.splitlines()
