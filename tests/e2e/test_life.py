"""The real server's life: clients that leave, engines that die, signals. Nothing is lost and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from lightllm.testing import Server

LONG = {"prompt": "w5 w6", "max_tokens": 200, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "w5 w6", "max_tokens": 5, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    with Server("--model", str(checkpoint), "--max-running-requests", "1") as running:
        yield running


def complete(server: Server, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=SHORT | fields, timeout=600)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def engine_of(server: Server) -> psutil.Process:
    (engine,) = [child for child in server.children() if "engine" in child.cmdline()]
    return engine


def test_a_client_that_leaves_makes_room_at_once(server: Server) -> None:
    # one runs at a time, and these four would each take the whole pool's time: only their end lets the last one in
    for stream in (True, False, True, False):
        body = LONG | {"n": 100, "stream": stream}
        with httpx.Client(timeout=httpx.Timeout(30, read=0.5)) as http, pytest.raises(httpx.ReadTimeout):
            if stream:
                with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    next(response.iter_lines())
                raise httpx.ReadTimeout("we leave in the middle")
            http.post(f"{server.url}/v1/completions", json=body)
    began = time.monotonic()
    assert complete(server).status_code == 200
    assert time.monotonic() - began < 10


def test_an_engine_that_dies_is_replaced_and_its_requests_are_told(server: Server) -> None:
    before = complete(server).json()["choices"][0]["text"]
    first = engine_of(server)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"n": 100}, timeout=600) as response:
        lines = response.iter_lines()
        next(lines)
        first.kill()
        rest = "\n".join(lines)
    assert '"error"' in rest and "signal 9" in rest
    assert "[DONE]" not in rest
    until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert engine_of(server).pid != first.pid
    assert complete(server).json()["choices"][0]["text"] == before


def test_while_there_is_no_engine_the_answer_is_503(server: Server) -> None:
    engine_of(server).suspend()
    engine = engine_of(server)
    engine.kill()
    until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    reply = complete(server)
    if reply.status_code != 200:  # unless it is back already
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "server_error"
        assert "retry-after" in reply.headers
    until(lambda: complete(server).status_code == 200)


def test_sigterm_lets_answers_finish_and_leaves_nothing_behind(server: Server) -> None:
    found: list[str] = []

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=600) as response:
            found.extend(response.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    assert server.process is not None
    until(lambda: bool(found))
    engine = engine_of(server)
    server.process.terminate()
    assert server.process.wait(30) == 0
    reader.join(10)
    assert found[-2] == "data: [DONE]"
    assert not engine.is_running()
    assert "Traceback" not in server.log


def test_interrupting_it_ends_with_130(server: Server) -> None:
    assert server.process is not None
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 130
    assert "Traceback" not in server.log


def test_killing_the_server_ends_the_engine(server: Server) -> None:
    assert server.process is not None
    engine = engine_of(server)
    directory = Path(engine.cmdline()[-1])
    assert directory.is_dir()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(10)
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    assert not directory.exists()


def test_an_engine_that_cannot_be_kept_alive_ends_the_server_with_one_line(server: Server) -> None:
    assert server.process is not None
    for _ in range(6):
        until(lambda: server.process.poll() is not None or bool(server.children()), 60)
        if server.process.poll() is not None:
            break
        for child in server.children():
            child.kill()
        time.sleep(0.3)
    assert server.process.wait(60) == 1
    assert "lightllm-serve: error: the engine process was ended by signal 9" in server.log
    assert "Traceback" not in server.log
