"""`plugins new` for a stranger: written, installed by pip, tested and served where only our wheel is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2e.environment import Environment

from lightllm.scaffold import KINDS
from lightllm.testing import Server, write_scripted

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def run(*command: str, cwd: Path) -> str:
    """Its output. Fails with it unless the command does what it should."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def install(environment: Environment, cwd: Path, *homes: str) -> None:
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run(str(environment.python), "-m", "pip", "install", *options, *homes, cwd=cwd)


@pytest.fixture
def environment(fresh: Environment) -> Iterator[Environment]:
    """Without the plugins again after the test."""
    yield fresh
    names = ["shout", *(f"my-{kind}" for kind in KINDS)]
    run(str(fresh.python), "-m", "pip", "uninstall", "--quiet", "--yes", *names, cwd=Path.cwd())


def test_a_new_parser_is_installed_passes_its_tests_and_is_served(environment: Environment, tmp_path: Path) -> None:
    said = run(*environment.command(), "plugins", "new", "shout", "--kind", "tool-parser", cwd=tmp_path)
    assert "pip install -e ./shout\n" in said
    install(environment, tmp_path, "./shout")
    tested = run(str(environment.python), "-m", "pytest", "-q", "./shout", cwd=tmp_path)
    assert " passed" in tested and "failed" not in tested and "skipped" not in tested

    listed = json.loads(run(*environment.command(), "plugins", "--json", "--check", cwd=tmp_path))
    (plugin,) = [plugin for plugin in listed if plugin["distribution"] == "shout"]
    assert plugin["status"] == "ok"
    assert plugin["provides"] == {"tool_parsers": ["shout"]}

    write_scripted(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--plugin", "lightllm.testing.scripted"]
    with Server(*options, "--tool-call-parser", "shout", command=environment.command(), scripted=True) as server:
        message = server.chat("What time is it?", says="Wait. <<now {}>>", tools=[TOOL])["choices"][0]["message"]
    assert message["content"] == "Wait. "
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}


@pytest.mark.timeout(1800)
def test_new_plugins_of_every_kind_pass_their_tests_side_by_side(environment: Environment, tmp_path: Path) -> None:
    names = [f"my-{kind}" for kind in KINDS]

    def new(kind: str) -> None:
        run(*environment.command(), "plugins", "new", f"my-{kind}", "--kind", kind, "--into", "plugins", cwd=tmp_path)

    def tests(some: list[str]) -> str:
        return run(str(environment.python), "-m", "pytest", *some, cwd=tmp_path)

    with ThreadPoolExecutor(2) as cores:
        list(cores.map(new, KINDS))
    homes = [f"./plugins/{name}" for name in names]
    install(environment, tmp_path, *homes)
    listed = json.loads(run(*environment.command(), "plugins", "--json", "--check", cwd=tmp_path))
    assert {plugin["name"]: plugin["status"] for plugin in listed if not plugin["builtin"]} == dict.fromkeys(
        names, "ok"
    )
    with ThreadPoolExecutor(2) as cores:
        tested = "".join(cores.map(tests, (homes[::2], homes[1::2])))
    for name in names:
        assert f"test_{name.replace('-', '_')}.py" in tested
    assert "skipped" not in tested
