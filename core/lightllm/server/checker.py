"""Checking grammars that clients send, in a process of its own.

A compiler of grammars, given the right input, may take minutes, gigabytes, or its process with it. So nothing a client
sent is compiled before a child process has done it within its bounds; one that has not is killed, and the next begins
anew. What is bounded is the child's own work: a busy machine is no fault of the grammar's.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from lightllm.grammar import Grammar, GrammarError
from lightllm.interfaces import GrammarBackend, UserError
from lightllm.server.protocol import unavailable

SECONDS = 0.8
"""Of processor time in which a grammar must be compiled, and tried."""

PATIENCE_SECONDS = 20.0
"""For a verdict, however busy the machine."""

START_SECONDS = 60.0

MEMORY_BYTES = 8 << 30
"""Address space of the child; what a backend imports may map a lot."""

STACK_BYTES = 64 << 20

KEPT = 1024
"""Verdicts remembered."""

_decode = msgspec.msgpack.Decoder(Grammar).decode
_encode = msgspec.msgpack.Encoder().encode


class GrammarChecker:
    """The server's side. ``command`` starts the child, ``start`` is the first message to it."""

    def __init__(self, command: Sequence[str], start: bytes) -> None:
        self._command = command
        self._start = start
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def check(self, grammar: Grammar) -> None:
        """Raises `GrammarError` where it cannot be compiled, `ApiError` where it could not be found out."""
        message = _encode(grammar)
        key = hashlib.sha256(message).digest()
        verdict = self._verdicts.pop(key, None)
        if verdict is None:
            async with self._lock:
                verdict = await self._ask(message)
        self._verdicts[key] = verdict
        while len(self._verdicts) > KEPT:
            self._verdicts.popitem(last=False)
        if verdict:
            raise GrammarError(verdict)

    async def warm(self) -> None:
        """Start the child now, so that the first request need not wait for it."""
        async with self._lock:
            await self._child()

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _ask(self, message: bytes) -> str:
        """The child's verdict. Raises for what it died of: next time it may have more luck."""
        process = await self._child()
        try:
            return await asyncio.wait_for(_exchange(process, message), PATIENCE_SECONDS)
        except (asyncio.TimeoutError, TimeoutError):
            await self.close()
            raise unavailable("the grammar could not be checked in time") from None
        except (OSError, EOFError):
            await self.close()
            if process.returncode == -signal.SIGPROF:
                raise GrammarError(f"it takes longer than {SECONDS} s to compile") from None
            raise GrammarError("compiling it takes too much memory, or more than the compiler can do") from None
        except asyncio.CancelledError:
            await self.close()  # its answer would be taken for the next one's
            raise

    async def _child(self) -> Process:
        """One that has made its backend."""
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
            try:
                await asyncio.wait_for(_exchange(self._process, self._start), START_SECONDS)
            except BaseException as error:
                await self.close()
                if isinstance(error, (asyncio.TimeoutError, TimeoutError, OSError, EOFError)):
                    raise unavailable("the process that checks grammars could not be started") from None
                raise
        return self._process


async def _exchange(process: Process, message: bytes) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(len(message).to_bytes(4, "big") + message)
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(4), "big")
    return (await process.stdout.readexactly(size)).decode()


def serve_checks(make: Callable[[bytes], GrammarBackend]) -> None:
    """The child: answer until the server's end of stdin closes. ``make`` is given the first message."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    def loop() -> None:
        backend: GrammarBackend | None = None
        problem = ""
        while header := sys.stdin.buffer.read(4):
            message = sys.stdin.buffer.read(int.from_bytes(header, "big"))
            verdict = ""
            try:
                if backend is None and not problem:
                    backend = make(message)
                elif backend is not None:
                    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
                    backend.compile(_decode(message))
            except Exception as error:
                known = isinstance(error, (GrammarError, UserError))
                verdict = str(error) if known else f"the grammar backend failed: {type(error).__name__}: {error}"
                if backend is None:
                    problem = verdict
            signal.setitimer(signal.ITIMER_PROF, 0)
            data = (verdict or problem).encode()
            answers.write(len(data).to_bytes(4, "big") + data)
            answers.flush()

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
