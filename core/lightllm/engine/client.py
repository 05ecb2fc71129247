"""The server's side of the line: starts, watches and restarts the engine process, and routes its reports."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType

import msgspec
import zmq
import zmq.asyncio

from lightllm.engine.process import COMMANDS, REPORTS, START
from lightllm.engine.request import (
    Abort,
    Command,
    Fatal,
    Generate,
    Loading,
    Output,
    Ready,
    Report,
    SamplingParams,
    Shutdown,
    Stats,
    Step,
)
from lightllm.interfaces import UserError

log = logging.getLogger("lightllm.engine")

RESTARTS = 3
"""Deaths in a row, without a step in between, after which the engine is given up."""

STOP_SECONDS = 10.0

LONGEST_NAME = 40
"""Of a socket in a directory for temporary files."""

THREADS = {"GOMP_SPINCOUNT": "30000"}
"""How long OpenMP's threads spin for each other before they sleep, unless the environment says. By default that is far
longer, and where another program wants one of the cores a step takes 20 to 50 times as long: on 2 cores with one of
them busy, steps that take 3 s alone took 12 s with this, and over 60 s without."""


class EngineUnavailable(Exception):
    """The engine process is not there: starting, restarting, or given up."""


class Generation:
    """One request's outputs, as they come. Leaving the context aborts what is unfinished."""

    def __init__(self, client: EngineClient, id: str, n: int) -> None:
        self.id = id
        self._client = client
        self._open = set(range(n))
        self._queue: asyncio.Queue[Output | EngineUnavailable] = asyncio.Queue()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    async def __aiter__(self) -> AsyncIterator[Output]:
        while self._open:
            output = await self._queue.get()
            if isinstance(output, EngineUnavailable):
                raise output
            if output.index not in self._open:
                continue  # aborted while this was on its way
            if output.finish is not None:
                self._finished(output.index)
            yield output

    def waiting(self) -> bool:
        """Whether the next output is here already."""
        return not self._queue.empty()

    def abort(self, index: int | None = None) -> None:
        """Stop one choice, or all: nothing more is yielded for it, and the engine frees its cache."""
        gone = self._open & ({index} if index is not None else self._open)
        if not gone:
            return
        self._client.send(Abort(id=self.id, index=index))
        for choice in gone:
            self._finished(choice)

    def put(self, output: Output | EngineUnavailable) -> None:
        self._queue.put_nowait(output)

    def _finished(self, index: int) -> None:
        self._open.discard(index)
        if not self._open:
            self._client.forget(self.id)


class EngineClient:
    """``start``: the msgpack the engine builds itself from. ``on_loading`` is told of start-up progress."""

    def __init__(self, start: bytes, on_loading: Callable[[Loading | None], None] | None = None) -> None:
        self.ready: Ready | None = None
        self.stats = Stats()
        self._start = start
        self._on_loading = on_loading or (lambda _: None)
        # a socket's path must be short
        parent = "/tmp" if len(tempfile.gettempdir()) > zmq.IPC_PATH_MAX_LEN - LONGEST_NAME else None
        # mkdtemp makes it 0700: nobody else may connect
        self._directory = Path(tempfile.mkdtemp(prefix="lightllm-", dir=parent))
        self._ids = itertools.count()
        self._live: dict[str, Generation] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._process: subprocess.Popen[bytes] | None = None
        self._commands: zmq.asyncio.Socket | None = None
        self._on_ready: Callable[[], None] | None = None
        self._life = self._life_steps = 0
        self._stopping = False

    # --- what the server uses

    @property
    def healthy(self) -> bool:
        return self.ready is not None and self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def generate(self, prompt: list[int], params: SamplingParams, n: int = 1) -> Generation:
        """Raises `EngineUnavailable` when there is no engine to send it to."""
        if not self.healthy:
            raise EngineUnavailable("the model is loading" if self.ready is None else "the engine has died")
        generation = Generation(self, f"{self._life}-{next(self._ids)}", n)
        self.send(Generate(id=generation.id, prompt=prompt, params=params, n=n))
        self._live[generation.id] = generation
        return generation

    def send(self, command: Command) -> None:
        if self._commands is not None:
            # never waits: the socket's queue has no limit
            self._commands.send(self._encoder.encode(command))

    def forget(self, id: str) -> None:
        self._live.pop(id, None)

    # --- life of the process

    def launch(self) -> None:
        """Start the process. Separate from `run` so that it loads while the server is still importing."""
        self._life += 1
        (self._directory / START).write_bytes(self._start)
        command = [sys.executable, "-m", "lightllm", "engine", str(self._directory)]
        # Our end of its stdin is its lifeline. Ctrl-C must reach only us: we stop it in good order.
        env = THREADS | os.environ
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=env)

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve the line until `stop`. ``on_ready`` is called once, when the engine takes requests for the first time.

        Raises UserError when the engine cannot be started or kept alive.
        """
        self._on_ready = on_ready
        deaths = 0
        while True:
            self._life_steps = 0
            fatal = await self._one_life()
            if self._stopping:
                return
            deaths = 1 if self._life_steps else deaths + 1
            self.ready = None
            code = self._process.returncode if self._process else None
            reason = fatal.message if fatal else _obituary(code)
            for generation in list(self._live.values()):
                generation.put(EngineUnavailable(reason))
            self._live.clear()
            if self._on_ready is not None or deaths > RESTARTS or (fatal and fatal.user):
                raise UserError(reason)
            log.error("%s; restarting it", reason)
            await asyncio.sleep(min(2.0 ** (deaths - 1) - 1, 10))
            self.launch()

    async def _one_life(self) -> Fatal | None:
        context = zmq.asyncio.Context()
        commands, reports = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        for socket, name in ((commands, COMMANDS), (reports, REPORTS)):
            socket.set_hwm(0)
            (self._directory / name).unlink(missing_ok=True)
            socket.bind(f"ipc://{self._directory / name}")
        self._commands = commands
        process = self._process
        assert process is not None
        reader = asyncio.create_task(self._read(reports))
        watcher = asyncio.create_task(asyncio.to_thread(process.wait))
        try:
            await asyncio.wait({reader, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done() and not reader.done():
                # what it managed to say before it went
                await asyncio.wait({reader}, timeout=0.2)
            elif reader.done() and not watcher.done():
                await asyncio.wait({watcher}, timeout=STOP_SECONDS)
                if process.poll() is None:
                    process.kill()
                await watcher
            return reader.result() if reader.done() and not reader.cancelled() else None
        finally:
            reader.cancel()
            self._commands = None
            self._on_loading(None)
            assert process.stdin is not None
            process.stdin.close()
            commands.close(linger=0)
            reports.close(linger=0)
            context.term()

    async def _read(self, reports: zmq.asyncio.Socket) -> Fatal:
        """Route reports until the engine says it cannot go on."""
        decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
        while True:
            report = decoder.decode(await reports.recv())
            if isinstance(report, Step):
                self._life_steps += 1
                self.stats = report.stats
                for output in report.outputs:
                    if generation := self._live.get(output.id):
                        generation.put(output)
            elif isinstance(report, Loading):
                self._on_loading(report)
            elif isinstance(report, Ready):
                self._on_loading(None)
                self.ready = report
                if self._on_ready is not None:
                    self._on_ready()
                    self._on_ready = None
            elif isinstance(report, Fatal):
                return report

    async def stop(self) -> None:
        """End the engine: politely, then not. One that is still loading does not listen yet."""
        self._stopping = True
        process = self._process
        if process is not None and self.ready is not None:
            self.send(Shutdown())
            try:
                await asyncio.wait_for(asyncio.to_thread(process.wait, STOP_SECONDS), STOP_SECONDS + 1)
            except (subprocess.TimeoutExpired, asyncio.TimeoutError):
                process.kill()
        self.close()

    def close(self) -> None:
        """Leave nothing behind, from wherever start-up got to."""
        self._stopping = True
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _obituary(code: int | None) -> str:
    if code is not None and code < 0:
        kill = " (killed: out of memory?)" if -code == 9 else ""
        return f"the engine process was ended by signal {-code}{kill}"
    return f"the engine process ended with exit code {code}"
