"""Over a real server: what is logged of whole and streamed answers, of failures and of clients that go away."""

from __future__ import annotations

import json
import stat
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import lightllm_observe
from lightllm.testing import Server, check_plugin, serve

FAILING = """
from lightllm import Text, ToolParserRecord, hookimpl

class Failing:
    def __init__(self, tools): pass
    def push(self, text):
        raise ValueError(f"secret answer of a@b.org")
    def close(self): return []

@hookimpl
def lightllm_tool_parsers():
    return [ToolParserRecord(name="failing", target="failing_parser:Failing")]
"""
TOOLS = [{"type": "function", "function": {"name": "f"}}]
KEY = "server-key-1"


def observing(log: Path, *options: str, plugins: tuple[Path, ...] = ()) -> Any:
    return serve(["lightllm_observe", *plugins], options=["--observe-log", str(log), *options])


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def wait_for_lines(log: Path, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while len(found := lines(log)) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def abort(server: Server) -> None:
    """Go away amid a stream."""
    body = {"model": server.model, "stream": True, "messages": [{"role": "user", "content": "ab " * 2000}]}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())


def test_the_plugin_is_valid() -> None:
    check_plugin(lightllm_observe.plugin)


def test_every_request_is_a_line_and_all_are_totals(tmp_path: Path) -> None:
    log = tmp_path / "log"
    failing = tmp_path / "failing_parser.py"
    failing.write_text(FAILING)
    options = ["--tool-call-parser", "failing", "--api-key", KEY, "--observe-content", "redacted"]
    started = datetime.now(timezone.utc)
    with observing(log, *options, plugins=(failing,)) as server:
        assert server.http.get("/observe").status_code == 401
        server.http.headers["authorization"] = f"Bearer {KEY}"
        assert log.read_text() == ""
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        whole = server.chat("Hello, I am c@d.org", says="Hello there", n=2)
        streamed = server.stream("?", says="Streamed")
        server.complete("x", max_tokens=3)
        failed = server.http.post(
            "/v1/chat/completions",
            json={"model": server.model, "messages": [{"role": "user", "content": "?"}], "tools": TOOLS},
        )
        assert failed.status_code == 500
        abort(server)
        wait_for_lines(log, 5)
        totals = server.http.get("/observe").json()
        server.chat("One more", says="last")
    first, second, third, fourth, fifth, sixth = lines(log)

    assert started <= datetime.fromisoformat(first["time"].replace("Z", "+00:00")) <= datetime.now(timezone.utc)
    assert first["id"] == whole["id"]
    assert (first["endpoint"], first["model"], first["status"]) == ("chat.completions", server.model, "ok")
    assert (first["stream"], first["n"], first["finish_reasons"]) == (False, 2, ["stop", "stop"])
    usage = whole["usage"]
    assert first["prompt_tokens"] == usage["prompt_tokens"]
    assert first["completion_tokens"] == usage["completion_tokens"]
    assert 0 < first["time_to_first_token"] <= first["duration"] < 60
    assert first["request"]["messages"] == [{"role": "user", "content": "Hello, I am [email]"}]
    assert first["answers"] == ["Hello there", "Hello there"]

    assert (second["id"], second["stream"], second["answers"]) == (streamed[0]["id"], True, ["Streamed"])
    assert (third["endpoint"], third["request"]["prompt"], third["status"]) == ("completions", "x", "ok")
    assert fourth["status"] == "error"
    assert "[email]" in fourth["error"] and "a@b.org" not in log.read_text()
    assert (fifth["status"], fifth["finish_reasons"]) == ("aborted", [None])
    assert 0 < fifth["completion_tokens"] < 4000
    assert sixth["answers"] == ["last"]

    assert totals["requests"] == {"ok": 3, "error": 1, "aborted": 1}
    assert totals["tokens"]["completion"] == sum(line["completion_tokens"] for line in lines(log)[:5])
    assert totals["duration"]["p99"] == max(line["duration"] for line in lines(log)[:5])
    assert totals["log"] == {"written": 5, "dropped": 0, "lost": 0}
    assert KEY not in log.read_text()


def test_no_prompt_and_no_answer_is_logged_unless_asked_for_and_the_file_rotates(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with observing(log, "--observe-max-bytes", "1KB", "--observe-keep", "1") as server:
        for _ in range(6):
            server.chat("My prompt", says="My answer")
        server.complete("My prompt", max_tokens=1)
        wait_for_lines(log, 1)
    written = log.read_text() + (tmp_path / "log.1").read_text()
    assert "My" not in written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())


def test_without_a_log_there_are_totals() -> None:
    with serve("lightllm_observe") as server:
        server.chat("Hello")
        totals = server.http.get("/observe").json()
    assert (totals["requests"]["ok"], totals["log"]) == (1, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--observe-log", "/no/such/folder/log"), "it cannot be written (No such file or directory)"),
        (("--observe-max-bytes", "much"), "--observe-max-bytes: 'much' is not a size in bytes"),
        (("--observe-content", "some"), "--observe-content: 'some' is not one of "),
        (("--observe-keep", "-1"), "--observe-keep: '-1' is not a whole number at least 0"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_at_the_start(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(AssertionError, match="the server ended with") as failure:
        serve("lightllm_observe", options=options).__enter__()
    (line,) = [line for line in str(failure.value).splitlines() if "lightllm-serve: error: " in line]
    assert message in line
    assert "Traceback" not in str(failure.value)


def test_a_log_that_cannot_be_written_later_fails_no_request(tmp_path: Path) -> None:
    """The folder is gone when the file is full."""
    folder = tmp_path / "logs"
    folder.mkdir()
    with observing(folder / "log", "--observe-max-bytes", "1KB") as server:
        server.chat("Hello")
        wait_for_lines(folder / "log", 1)
        (folder / "log").unlink()
        folder.rmdir()
        for _ in range(6):
            server.chat("Hello")
        deadline = time.monotonic() + 60
        while not (found := server.http.get("/observe").json()["log"])["lost"]:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
    assert server.log.count("cannot be written, lines are lost: [Errno 2]") == 1
