"""The engine process: takes commands from one socket, steps, and reports to the other."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from lightllm.checks import describe
from lightllm.engine.request import Abort, Command, Fatal, Generate, Loading, Report
from lightllm.interfaces import UserError, WorkerLost

if TYPE_CHECKING:
    from lightllm.engine.engine import Engine

log = logging.getLogger("lightllm.engine")

COMMANDS, REPORTS, START = "commands", "reports", "start"
"""Names in the private directory the two processes share: two sockets, and the file that says what to build."""


QUIET_MILLISECONDS = 1000
"""Without a request, after which there is time for what may be needed later."""


def die_with_parent(directory: Path) -> None:
    """End this process when the one that started it is gone, however it went: its end of our stdin closes.

    The directory is then ours to clear away.
    """

    def wait() -> None:
        # not sys.stdin: a daemon thread inside its lock is fatal when the interpreter shuts down
        while os.read(0, 1024):
            pass
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="lifeline").start()


def run(directory: Path, build: Callable[[Callable[[Loading], None]], Engine]) -> int:
    """Build the engine and serve until told to stop. ``build`` is given a function that reports progress."""
    die_with_parent(directory)
    context = zmq.Context()
    commands, reports = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.connect(f"ipc://{directory / COMMANDS}")
    reports.connect(f"ipc://{directory / REPORTS}")
    encoder = msgspec.msgpack.Encoder()

    def report(message: Report) -> None:
        reports.send(encoder.encode(message))

    try:
        engine = build(report)
    except Exception as error:
        user = isinstance(error, UserError)
        if not user:
            log.exception("the engine could not be built")
        report(Fatal(message=str(error) if user else f"the engine could not be built: {describe(error)}", user=user))
        reports.close(linger=5000)
        return 1
    # What start-up left behind lives as long as the process; no collection need look at it again.
    gc.collect()
    gc.freeze()
    report(engine.ready)
    try:
        _serve(engine, commands, report)
    except WorkerLost as error:
        log.error("the engine ends: %s", error)
        return 1
    engine.close()
    reports.close(linger=0)
    return 0


def _serve(engine: Engine, commands: zmq.Socket[bytes], report: Callable[[Report], None]) -> None:
    decoder = msgspec.msgpack.Decoder(Command)
    warm = False
    while True:
        while True:
            if not (warm or engine.busy or commands.poll(QUIET_MILLISECONDS)):
                warm = True
                engine.warm()
            try:
                raw = commands.recv(zmq.NOBLOCK if engine.busy else 0)
            except zmq.Again:
                break
            command = decoder.decode(raw)
            if isinstance(command, Generate):
                engine.add(command)
            elif isinstance(command, Abort):
                engine.abort(command)
            else:
                return
        step = engine.step()
        report(step)
