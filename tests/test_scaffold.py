"""`plugins new`: every kind is written under its new name, and a name that would not do is refused."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightllm import UserError
from lightllm.checks import RECORDS
from lightllm.options import UsageError
from lightllm.scaffold import KINDS, TEMPLATES, main, new

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(params=list(KINDS))
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A plugin of each kind."""
    return new("My_Own.plugin", request.param, tmp_path)


def test_there_is_a_template_for_every_kind_and_no_other() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == {"common", *KINDS}


def test_there_is_a_kind_for_every_kind_of_record() -> None:
    assert {kind.removesuffix("s").replace("_", "-") for kind in RECORDS if kind != "operators"} <= set(KINDS)
    assert "operators" in KINDS  # one record is a set of them


def test_a_plugin_is_a_distribution_with_tests(home: Path) -> None:
    assert home.name == "my-own-plugin"
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert {
        "README.md",
        "pyproject.toml",
        "src/my_own_plugin/__init__.py",
        "tests/conftest.py",
        "tests/test_my_own_plugin.py",
    } <= files
    project = tomllib.loads((home / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-own-plugin"
    assert project["project"]["entry-points"]["lightllm"] == {"my-own-plugin": "my_own_plugin"}


def test_nothing_of_the_template_s_name_is_left(home: Path) -> None:
    for path in home.rglob("*"):
        assert "example" not in path.name
        if path.is_file():
            assert "example" not in path.read_text().lower(), path
    assert "class MyOwnPlugin" in "".join(path.read_text() for path in home.rglob("*.py")) or _is_only_functions(home)


def _is_only_functions(home: Path) -> bool:
    return not any(isinstance(node, ast.ClassDef) for path in home.rglob("*.py") for node in ast.walk(_parsed(path)))


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def test_its_python_is_well_formed_and_says_what_it_was_written_for(home: Path) -> None:
    for path in home.rglob("*.py"):
        _parsed(path)
    assert 'lightllm_requires = ">=0.1,<0.2"' in (home / "src" / "my_own_plugin" / "__init__.py").read_text()


def test_what_is_written_needs_no_change_by_ruff(tmp_path: Path) -> None:
    for kind in KINDS:
        new(f"a-{kind}", kind, tmp_path)
    ruff = [str(Path(sys.executable).with_name("ruff"))]
    options = ["--isolated", "--no-cache", "--line-length", "120"]
    rules = ["--extend-select", "I,UP,B,SIM,RUF"]
    homes = sorted(map(str, tmp_path.iterdir()))
    for home in homes:  # each alone, as its author would: what is first party depends on it
        done = subprocess.run([*ruff, "check", *options, *rules, "."], cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    done = subprocess.run([*ruff, "format", "--check", *options, *homes], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_its_declaring_module_imports_nothing_heavy(home: Path) -> None:
    heavy = {"torch", "litestar", "transformers", "numpy", "llguidance"}
    code = f"import sys, my_own_plugin; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=home / "src", capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "no name for a plugin"),
        ("-dash", "no name for a plugin"),
        ("two words", "no name for a plugin"),
        ("../up", "no name for a plugin"),
        ("größe", "no name for a plugin"),
        ("3d", "could not be called '3d' in Python"),
        ("Lambda", "could not be called 'lambda' in Python"),
        ("lightllm", "there is a module 'lightllm' already"),
        ("LightLLM.serve", "there is a module 'lightllm_serve' already"),
        ("torch", "there is a module 'torch' already"),
        ("tool-parsers", "there is tool-parsers"),
    ],
)
def test_a_name_that_would_not_do_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        new(name, "tool-parser", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no kind of plugin called 'tool-parsr'\. Did you mean tool-parser\?"):
        new("shout", "tool-parsr", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shout").mkdir()
    with pytest.raises(UserError, match="shout is there already"):
        new("shout", "tool-parser", tmp_path)
    assert list((tmp_path / "shout").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_the_user_s_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        new("shout", "tool-parser", tmp_path / "file")


def test_compiled_files_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installers compile the templates."""
    shutil.copytree(TEMPLATES, tmp_path / "templates")
    cache = tmp_path / "templates" / "sampler" / "src" / "example_plugin" / "__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / "sampler.cpython-311.pyc").write_bytes(b"\x00\xff")
    monkeypatch.setattr("lightllm.scaffold.TEMPLATES", tmp_path / "templates")
    home = new("shout", "sampler", tmp_path)
    assert not any(path.name == "__pycache__" for path in home.rglob("*"))


def test_the_command_writes_it_and_says_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shout", "--kind", "sampler", "--into", str(tmp_path)]) == 0
    assert (tmp_path / "shout" / "src" / "shout" / "sampler.py").is_file()
    assert f"pip install -e {tmp_path / 'shout'}\n" in capsys.readouterr().out


def test_the_command_lists_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n  {kind} " in out for kind in KINDS)


def test_the_command_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match="--kind"):
        main(["shout"])
