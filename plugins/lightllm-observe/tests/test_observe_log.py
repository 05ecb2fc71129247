"""The file, its rotation, and the thread that writes to it."""

from __future__ import annotations

import json
import logging
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm import UserError
from lightllm_observe.log import LogFile, Writer
from lightllm_observe.observer import CONTENT, FIELDS, Observer, weight
from lightllm_observe.totals import RECENT, Totals, percentiles

FACTS = {
    "id": "chatcmpl-1",
    "endpoint": "chat.completions",
    "model": "m",
    "stream": False,
    "n": 1,
    "created": 1700000000,
    "prompt_tokens": 7,
    "request": {"messages": [{"role": "user", "content": "I am a@b.org 天"}]},
    "status": "ok",
    "error": None,
    "finish_reasons": ["stop"],
    "answers": ["Hello a@b.org"],
    "completion_tokens": 3,
    "cached_tokens": 2,
    "time_to_first_token": 0.25,
    "duration": 0.5,
}


@contextmanager
def open_file(path: Path, max_bytes: int = 1000, keep: int = 2) -> Iterator[LogFile]:
    file = LogFile(str(path), max_bytes, keep)
    try:
        yield file
    finally:
        file.close()


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


# --- the file


def test_a_full_file_makes_room_and_the_oldest_goes(tmp_path: Path) -> None:
    with open_file(tmp_path / "log", max_bytes=8, keep=2) as file:
        for line in ("aaa\n", "bbb\n", "ccc\n", "ddd\n", "eee\n", "fff\n", "ggg\n"):
            file.append(line.encode())
    assert files(tmp_path) == {"log": "ggg\n", "log.1": "eee\nfff\n", "log.2": "ccc\nddd\n"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_without_old_files_to_keep_it_begins_anew(tmp_path: Path) -> None:
    with open_file(tmp_path / "log", max_bytes=4, keep=0) as file:
        for line in ("aaa\n", "bbb\n"):
            file.append(line.encode())
    assert files(tmp_path) == {"log": "bbb\n"}


def test_what_is_there_already_stays_and_counts(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("old\n")
    with open_file(tmp_path / "log", max_bytes=8) as file:
        for line in ("aaa\n", "bbb\n"):
            file.append(line.encode())
    assert files(tmp_path) == {"log": "bbb\n", "log.1": "old\naaa\n"}


def test_a_line_that_is_too_long_has_a_file_of_its_own(tmp_path: Path) -> None:
    with open_file(tmp_path / "log", max_bytes=8) as file:
        for line in ("long and longer\n", "b\n"):
            file.append(line.encode())
    assert files(tmp_path) == {"log": "b\n", "log.1": "long and longer\n"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "disk" / "real")
    with open_file(tmp_path / "log", max_bytes=4) as file:
        for line in ("aaa\n", "bbb\n"):
            file.append(line.encode())
    assert files(tmp_path / "disk") == {"real": "bbb\n", "real.1": "aaa\n"}


def test_a_rotation_that_fails_again_and_again_pushes_nothing_out(tmp_path: Path) -> None:
    with open_file(tmp_path / "log", max_bytes=4, keep=2) as file:
        for line in ("aaa\n", "bbb\n", "ccc\n"):
            file.append(line.encode())
        before = files(tmp_path)
        (tmp_path / "log.new").mkdir()
        for _ in range(3):
            with pytest.raises(IsADirectoryError):
                file.append(b"ddd\n")
        (tmp_path / "log.new").rmdir()
        assert files(tmp_path) == before
        file.append(b"eee\n")
    assert files(tmp_path) == {"log": "eee\n", "log.1": "ccc\n", "log.2": "bbb\n"}


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """A limit on the size of files is as good, and refuses in the middle of a line."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    script = """if True:
        import resource, sys
        from lightllm_observe.log import LogFile
        file = LogFile(sys.argv[1], 1000, 1)
        file.append(b"aaaaaa\\n")
        try:
            file.append(b"bbbbbb\\n")
        except OSError as error:
            print(error.strerror)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.append(b"cccccc\\n")
    """
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, preexec_fn=limit, env=os.environ | path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert files(tmp_path) == {"log": "aaaaaa\ncccccc\n"}


@pytest.mark.parametrize("what", ["missing/log", "folder", "pipe", "/dev/null"])
def test_what_is_no_file_to_append_to_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--observe-log .*: it cannot be written \(.*\); give another file"):
        Observer(str(tmp_path / what), max_bytes=1000, keep=1, content="none")


# --- the thread


class Gate:
    """In a `LogFile`'s place: lets lines through when it is told to."""

    path = "gate"

    def __init__(self) -> None:
        self.open, self.waiting = threading.Event(), threading.Event()
        self.lines: list[bytes] = []

    def append(self, line: bytes) -> None:
        self.waiting.set()
        assert self.open.wait(60)
        if line == b"bad":
            raise OSError("no space")
        self.lines.append(line)

    def close(self) -> None:
        self.lines.append(b"closed")


def writer(gate: Any, max_items: int = 2, max_weight: int = 100) -> Writer[str]:
    made: Writer[str] = Writer(gate, str.encode, max_items=max_items, max_weight=max_weight)
    made.start()
    return made


def test_what_comes_too_fast_is_dropped_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    made = writer(gate)
    made.put("a")
    assert gate.waiting.wait(60)
    for item in "bcdef":
        made.put(item)
    assert made.dropped == 3
    gate.open.set()
    made.close(60)
    assert (gate.lines, made.written) == ([b"a", b"b", b"c", b"closed"], 3)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert "cannot keep up" in caplog.text and "lacks 3 lines" in caplog.text


def test_what_waits_is_limited_by_its_weight_too() -> None:
    gate = Gate()
    made = writer(gate, max_items=10)
    made.put("a", 100)
    assert gate.waiting.wait(60)  # and no longer counted
    made.put("b", 60)
    made.put("c", 60)
    made.put("d", 40)
    gate.open.set()
    made.close(60)
    assert (gate.lines, made.dropped) == ([b"a", b"b", b"d", b"closed"], 1)


def test_lines_that_cannot_be_written_are_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    gate.open.set()
    made = writer(gate, max_items=10)
    for item in ("a", "bad", "bad", "b"):
        made.put(item)
    made.close(60)
    assert (gate.lines, made.written, made.lost) == ([b"a", b"b", b"closed"], 2, 2)
    assert caplog.text.count("no space") == 1


def test_a_disk_that_hangs_does_not_keep_the_server_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    made = writer(gate)
    made.put("a")
    assert gate.waiting.wait(60)
    made.put("b")
    made.close(0.01)
    assert "lacks 2 lines" in caplog.text
    made.put("c")
    assert made.dropped == 1
    gate.open.set()


# --- lines


def lines_of(path: Path, content: Any, *facts: dict[str, Any]) -> list[dict[str, Any]]:
    async def log() -> None:
        observer = Observer(str(path), max_bytes=1 << 20, keep=1, content=content)
        async with observer.lifespan():
            for one in facts:
                observer.on_finish(one)

    import asyncio

    asyncio.run(log())
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_prompts_and_answers_are_logged_as_far_as_is_asked(tmp_path: Path) -> None:
    (none,) = lines_of(tmp_path / "none", "none", FACTS)
    (redacted,) = lines_of(tmp_path / "redacted", "redacted", FACTS)
    (full,) = lines_of(tmp_path / "full", "full", FACTS)
    assert list(none) == ["time", *FIELDS]
    assert {name: none[name] for name in FIELDS} == {name: FACTS[name] for name in FIELDS}
    assert {name: full[name] for name in CONTENT} == {name: FACTS[name] for name in CONTENT}
    assert redacted["request"] == {"messages": [{"role": "user", "content": "I am [email] 天"}]}
    assert redacted["answers"] == ["Hello [email]"]


def test_an_error_does_not_give_away_what_is_not_to_be_logged(tmp_path: Path) -> None:
    facts = FACTS | {"status": "error", "error": "cannot parse a@b.org " + "x" * 1000}
    assert lines_of(tmp_path / "log", "none", facts)[0]["error"] == ("cannot parse [email] " + "x" * 1000)[:500]
    assert lines_of(tmp_path / "full", "full", facts)[0]["error"] == facts["error"]


def test_half_a_character_is_no_reason_to_lose_a_line(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "log", "full", FACTS | {"answers": ["a\ud83d\n\u2028"]})[0]["answers"] == [
        "a\ud83d\n\u2028"
    ]


def test_weights_are_about_right() -> None:
    assert 10 <= weight(FACTS["request"]) < 100
    assert weight({"prompt": [1] * 1000}) == 6 + 8000
    assert weight({"prompt": ["abc", "def"]}) == 12
    assert weight([None, True, 1.5, []]) == 32


# --- totals


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    expected = np.percentile(values, [50, 90, 99], method="inverted_cdf")
    assert list(percentiles(values).values()) == pytest.approx(expected, abs=1e-6)


def test_totals_count_everything_and_latencies_of_the_last() -> None:
    totals = Totals()
    assert totals.show()["duration"] == {"p50": None, "p90": None, "p99": None}
    totals.add(FACTS | {"status": "aborted", "time_to_first_token": None, "duration": 99.0})
    for _ in range(RECENT):
        totals.add(FACTS)
    shown = totals.show()
    assert shown["requests"] == {"ok": RECENT, "error": 0, "aborted": 1}
    assert shown["tokens"] == {"prompt": 7 * 1001, "completion": 3 * 1001, "cached": 2 * 1001}
    assert shown["duration"] == {"p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert shown["time_to_first_token"]["p99"] == 0.25
