"""What `pip install lightllm-serve` gives: two packages, typed, with the built-in plugins as entry points."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def entry_points(wheel: zipfile.ZipFile) -> ConfigParser:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    parser = ConfigParser()
    parser.read_string(wheel.read(name).decode())
    return parser


def test_the_wheel_brings_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lightllm", "lightllm_builtin"}
    assert len(top) == 3


def test_both_packages_are_typed(wheel: zipfile.ZipFile) -> None:
    assert {"lightllm/py.typed", "lightllm_builtin/py.typed"} <= set(wheel.namelist())


def test_the_wheel_holds_the_license_and_every_module_of_the_tree(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for folder in (ROOT / "core", ROOT / "builtin_plugins"):
        modules = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
        assert modules <= names


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    assert entry_points(wheel)["console_scripts"]["lightllm-serve"] == "lightllm.cli:main"


def test_every_built_in_plugin_is_a_package_with_an_entry_point(wheel: zipfile.ZipFile) -> None:
    targets = list(entry_points(wheel)["lightllm"].values())
    packages = {f"lightllm_builtin.{path.parent.name}" for path in (ROOT / "builtin_plugins").glob("*/*/__init__.py")}
    assert sorted(targets) == sorted(packages)


def test_the_modules_of_the_built_in_plugins_import_from_the_wheel_without_torch(wheel: zipfile.ZipFile) -> None:
    code = f"""
import importlib, sys
sys.path.insert(0, {wheel.filename!r})
for name in {list(entry_points(wheel)["lightllm"].values())!r}:
    assert importlib.import_module(name).__file__.startswith({wheel.filename!r})
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr


def test_the_sdist_holds_the_tests_and_what_the_wheel_is_built_from(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "core/lightllm/plugins.py", "tests/test_plugins.py"} <= names
    assert not any("__pycache__" in name or name.startswith(".venv") for name in names)
