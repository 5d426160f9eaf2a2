"""The wheel holds what an installation needs, under the names that are imported."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("reference", "datasets", "gpu", "conformance")


def setuptools_is_recent() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: setuptools leaves build/ and egg-info beside the sources that it packs."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    if not setuptools_is_recent():
        pytest.skip("building a wheel without network needs setuptools 77 or newer installed")
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", target, sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("smca_detr-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_under_smca(wheel: zipfile.ZipFile, sources: Path) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [
        path
        for package in PACKAGES
        for path in (sources / package).rglob("*")
        if path.suffix in (".py", ".cu", ".c", ".xfails", ".html")
    ]
    modules = {path.relative_to(sources) for path in files}
    markers = {f"smca/{package}/py.typed" for package in PACKAGES}
    assert packed == {f"smca/{path.as_posix()}" for path in modules} | markers
    assert packed >= {f"smca/{package}/__init__.py" for package in PACKAGES}


def test_wheel_holds_licence_and_commands(wheel: zipfile.ZipFile) -> None:
    info = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "Apache License" in wheel.read(info["licenses/LICENSE"]).decode()
    (command,) = re.findall(r"smca *= *([\w.]+):main", wheel.read(info["entry_points.txt"]).decode())
    assert command.replace(".", "/") + ".py" in wheel.namelist()


def test_constraints_pin_every_dependency() -> None:
    """An unpinned one would make two installations of one commit differ."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []  # exact, and without "+cpu"

    def plain(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")

    pinned = {plain(line) for line in pins}
    needed = {plain(r) for r in (*project["dependencies"], *project["optional-dependencies"]["dev"])}
    assert needed - pinned == set()


def test_an_editor_that_knows_only_the_environment_finds_the_sources() -> None:
    """By the path file that `make setup` leaves there: pyright without settings resolves smca.gpu.attention."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("needs the environment that `make setup` builds")
    (line,) = Path(sysconfig.get_path("purelib"), "zz-smca-sources.pth").read_text(encoding="utf-8").splitlines()
    for package in PACKAGES:
        assert (Path(line) / "smca" / package).resolve() == ROOT / package
