"""Servers of the kit are real, say what they are told, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from lightllm.testing import Server, serve, write_scripted

PARSER = '''
from lightllm import CallArguments, CallStart, Text, ToolParserRecord, hookimpl


class Shouts:
    """``name!`` calls a tool."""

    def __init__(self, tools):
        self.text = ""

    def push(self, text):
        self.text += text
        return []

    def close(self):
        name, mark, rest = self.text.partition("!")
        return [CallStart(0, name), CallArguments(0, "{}"), Text(rest)] if mark else [Text(name)]


@hookimpl
def lightllm_tool_parsers():
    return [ToolParserRecord(name="shouts", target=f"{__name__}:Shouts")]
'''
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("plugin")
    (found / "shouting.py").write_text(PARSER)
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serve(folder / "shouting.py", options=["--tool-call-parser", "shouts"]) as running:
        yield running


def test_the_scripted_model_says_what_it_is_told(server: Server) -> None:
    said = " 北京 \n<|x|> [TOOL_CALLS] is a special token, 🙂 is not."
    (choice,) = server.chat("Hello", says=said, skip_special_tokens=False)["choices"]
    assert choice["message"]["content"] == said
    assert choice["finish_reason"] == "stop"
    (choice,) = server.chat([{"role": "user", "content": "Hello"}] * 2)["choices"]
    assert choice["message"]["content"] == "Hello"


def test_it_says_it_in_a_stream_too(server: Server) -> None:
    *chunks, last = server.stream("Hello", says="One two three.")
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "One two three."
    assert last["choices"][0]["finish_reason"] == "stop"


def test_it_completes_prompts(server: Server) -> None:
    (choice,) = server.complete("Hello<|script|>One two three.<|answer|>One", max_tokens=100)["choices"]
    assert choice["text"] == " two three."


def test_the_plugin_given_by_its_path_is_used(server: Server) -> None:
    (choice,) = server.chat("Hello", says="now!Done.", tools=[NOW])["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert choice["message"]["content"] == "Done."


def test_what_the_server_refuses_is_said_in_its_words(server: Server) -> None:
    for ask in (server.chat, server.stream):
        with pytest.raises(AssertionError, match=r"(?s)^the server answered 400: .*temperature.*its log ends with:"):
            ask("Hello", temperature=-1)
    with pytest.raises(AssertionError, match=r"^the server answered 404: "):
        server.complete("Hello", model="another")


def test_a_module_is_found_where_this_process_finds_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    with serve("shouting", options=["--tool-call-parser", "shouts"]) as server:
        assert server.chat("Hello", says="now!", tools=[NOW])["choices"][0]["finish_reason"] == "tool_calls"


def test_marks_of_ones_own_are_tokens(tmp_path: Path) -> None:
    write_scripted(tmp_path, special=["<|mine|>"], added=["<mine>"])
    with serve(model=tmp_path) as server:
        body = server.chat("Hello", says="<|mine|><mine>Hi")
        assert body["choices"][0]["message"]["content"] == "<mine>Hi"
        assert body["usage"]["completion_tokens"] == 1 + 1 + 2 + 1


def test_nothing_is_left_behind(tiny_llama: Path) -> None:
    with serve(model=tiny_llama, options=["--served-model-name", "tiny"]) as server:
        assert server.model == "tiny"
        assert server.process is not None
        processes = [psutil.Process(server.process.pid), *server.children()]
        assert len(processes) > 1
        assert server.complete("Hello", max_tokens=5, ignore_eos=True)["usage"]["completion_tokens"] == 5
        with pytest.raises(ValueError, match=r"^says=\.\.\. is for the scripted model"):
            server.chat("Hello", says="Hi")
    assert not any(process.is_running() for process in processes)
    assert "tiny is served on" in server.log


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with (
        pytest.raises(AssertionError, match=r"(?s)the server ended with \d.*nothing_of_this_name"),
        serve(tmp_path / "broken.py"),
    ):
        pass


def test_the_fixtures_work_in_a_strangers_suite(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["lightllm.testing"]\n')
    (tmp_path / "test_it.py").write_text(
        dedent(f"""
        import httpx, pytest
        from lightllm.testing import check_tool_parser

        servers = []

        def test_a_server(lightllm_server, tiny_llama):
            servers.append(lightllm_server({str(folder / "shouting.py")!r}))
            assert servers[0].chat("Hi", says="Hello")["choices"][0]["message"]["content"] == "Hello"
            assert (tiny_llama / "model.safetensors").exists()

        def test_it_is_gone():
            with pytest.raises(httpx.ConnectError):
                httpx.get(servers[0].url)
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
