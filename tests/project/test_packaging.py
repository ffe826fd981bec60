"""A wheel of this checkout: its contents, its import in a new environment, and its build without a compiler."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("scikit_build_core", reason="wheels are built with scikit-build-core, which is not installed")

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
LIBRARY = "alp_kernels/native/_native.so"


def build(kind: str, destination: Path, **environment: str) -> tuple[Path, str]:
    """Return the wheel or sdist, and the build's output. Calls the backend in a fresh process, as pip does."""
    script = f"import sys; from scikit_build_core.build import build_{kind}; print(build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(destination)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return destination / done.stdout.split()[-1], done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("pure"), **NO_COMPILER)


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    """Return what `code` prints in a new environment with only the wheel and this environment's torch."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    site = Path(paths["purelib"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "torch_from_outside.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    # the library must not need these: block their import
    blocked = "import sys; sys.modules['transformers'] = None; sys.modules['tyro'] = None\n"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ALP_KERNELS_ENGINE")}
    done = subprocess.run(
        [Path(paths["scripts"]) / "python", "-c", blocked + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import alp_kernels, torch
from alp_kernels.engine import pick, why_not
u = alp_kernels.perturb(torch.zeros(2, 8), torch.tensor(0.0), seed=1, step=2, layer=3)
assert torch.isfinite(u).all() and u.abs().min() > 0
print(alp_kernels.__version__, alp_kernels.__file__, pick(None, torch.device("cpu")).name, why_not("native", "cpu"), sep="|")
"""


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_one_wheel_serves_every_python_of_a_platform(wheel):
    path, _ = wheel
    assert path.name.startswith(f"alp_kernels-{VERSION}-py3-none-")
    assert "any" not in path.name
    assert LIBRARY in names(path)


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    contents = names(wheel[0])
    assert {name.split("/")[0] for name in contents} == {"alp_kernels", "alp", f"alp_kernels-{VERSION}.dist-info"}
    assert {f"alp_kernels-{VERSION}.dist-info/licenses/LICENSE", "alp_kernels/py.typed", "alp/__main__.py"} <= contents
    assert {name for name in contents if not name.endswith((".py", ".so"))} == {
        "alp_kernels/py.typed",
        f"alp_kernels-{VERSION}.dist-info/licenses/LICENSE",
        *(f"alp_kernels-{VERSION}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")),
    }


def test_the_wheel_names_its_command_and_asks_for_torch_and_numpy_alone(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        info = f"alp_kernels-{VERSION}.dist-info"
        assert "alp=alp.__main__:main" in archive.read(f"{info}/entry_points.txt").decode().replace(" ", "")
        metadata = archive.read(f"{info}/METADATA").decode().splitlines()
    always = [line for line in metadata if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in always] == ["torch", "numpy"]


def test_the_wheel_works_without_transformers(wheel, tmp_path):
    version, file, engine, reason = run_installed(wheel[0], tmp_path / "env", USE).strip().split("|")
    assert version == VERSION
    assert Path(file).is_relative_to(tmp_path.resolve())
    assert (engine, reason) == ("native", "None")


def test_without_a_compiler_the_install_works_and_says_what_serves(wheel_without_compiler, tmp_path):
    path, output = wheel_without_compiler
    assert path.name == f"alp_kernels-{VERSION}-py3-none-any.whl"
    assert "will be served by the reference engine" in output
    assert LIBRARY not in names(path)
    _, _, engine, reason = run_installed(path, tmp_path / "env", USE).strip().split("|")
    assert engine == "reference"
    assert "installed without a C++ compiler" in reason


def test_the_source_distribution_can_build_itself(tmp_path):
    path, _ = build("sdist", tmp_path)
    assert path.name == f"alp_kernels-{VERSION}.tar.gz"
    with tarfile.open(path) as archive:
        contents = {name.split("/", 1)[1] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "alp_kernels" / "native").glob("*.[ch]*")}
    assert len(sources) >= 7
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "alp_kernels/__init__.py", *sources} <= contents
    assert not [name for name in contents if name.endswith(".so")]
