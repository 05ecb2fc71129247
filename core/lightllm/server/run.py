"""Runs the application: the socket, uvicorn and signals, beside the line to the engine. Ends when either ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from lightllm.engine.client import EngineClient
from lightllm.interfaces import UserError
from lightllm.server.checker import GrammarChecker

if TYPE_CHECKING:
    from litestar.types import ASGIApp
    from rich.progress import Progress, TaskID

    from lightllm.engine.request import Loading

log = logging.getLogger("lightllm")

GRACE_SECONDS = 10
"""What answers that are under way get to finish in, once the server is told to stop."""

INTERRUPTED = 130


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises UserError when it cannot be had.

    Listening from the very start means that a taken port is known before a model is loaded.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: another program listens there; choose another, or 0 for any") from None
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return sock


def address(sock: socket.socket) -> str:
    """The URL to reach it by."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: ASGIApp, engine: EngineClient, checker: GrammarChecker, sock: socket.socket, on_ready: Callable[[], None]
) -> int:
    """Serve until told to stop; the exit code. Raises UserError when the engine cannot be started or kept alive."""
    return uvloop.run(_run(app, engine, checker, sock, on_ready))


async def _run(
    app: ASGIApp, engine: EngineClient, checker: GrammarChecker, sock: socket.socket, on_ready: Callable[[], None]
) -> int:
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            timeout_keep_alive=75,  # beyond the 60 s for which most proxies keep theirs
        )
    )
    # uvicorn would raise the signal again once it is done, and the process die before the engine is stopped.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    caught: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        server.force_exit = bool(caught)
        caught.append(number)
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    ready = asyncio.Event()

    def tell() -> None:
        on_ready()
        ready.set()

    line = asyncio.create_task(engine.run(tell))
    warming = asyncio.create_task(_warm(checker, ready))
    serving = asyncio.create_task(_serve(server, sock))
    await asyncio.wait({line, serving}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    try:
        await serving
        if line.done():
            line.result()
    finally:
        warming.cancel()
        await engine.stop()
        await asyncio.gather(line, warming, return_exceptions=True)
        await checker.close()
    return INTERRUPTED if signal.SIGINT in caught else 0


async def _warm(checker: GrammarChecker, ready: asyncio.Event) -> None:
    """Once the engine, which has better use for the cores until then, is ready."""
    await ready.wait()
    try:
        await checker.warm()
    except Exception as error:
        log.warning("grammars cannot be checked: %s", error)


async def _serve(server: uvicorn.Server, sock: socket.socket) -> None:
    try:
        await server.serve(sockets=[sock])
    except SystemExit:  # what uvicorn does when a lifespan fails; it has logged why
        raise UserError("the server could not start: a plugin's lifespan failed, see above") from None


class LoadingBar:
    """Shows what the engine is at while it starts: a bar on a terminal, else a line for every stage."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show(None)

    def show(self, loading: Loading | None) -> None:
        """``None``: there is nothing more to show."""
        if self._progress is None:
            if loading is not None and loading.stage != self._stage:
                self._stage = loading.stage
                log.info("%s", loading.stage)
            return
        if loading is None:
            self._progress.stop()
            if self._task is not None:
                self._progress.remove_task(self._task)
                self._task = None
            return
        if self._task is None:
            self._task = self._progress.add_task(loading.stage, total=None)
            self._progress.start()
        self._progress.update(
            self._task, description=loading.stage, completed=loading.done, total=loading.total or None
        )
