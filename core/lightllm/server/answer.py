"""From a job to an HTTP answer: tokens in from the engine, `Piece`s of choices out, whole or as server-sent events.

Both ways read the same pieces; an endpoint only says how they look (`Shape`). A client that goes away ends the job.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import msgspec
from litestar.exceptions import HTTPException
from litestar.types import Receive, Scope, Send

from lightllm.chat import OutputParser
from lightllm.checks import Wrong
from lightllm.engine.client import EngineUnavailable, Generation
from lightllm.engine.request import Logprobs, Output, SamplingParams, joined
from lightllm.interfaces import Event, Text
from lightllm.server.protocol import ApiError, CachedTokens, Usage, unavailable
from lightllm.server.state import ServerState
from lightllm.tokenizer import StopStrings, Tokenizer

log = logging.getLogger("lightllm.server")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Checked and ready for the engine. ``parsers``: one fresh parser per choice and prompt, in order of choices.

    ``nothing``: no token was asked for, only the prompt's logprobs. The engine makes one all the same; it is dropped.
    ``body``: the request as it was sent, for listeners.
    """

    id: str
    body: bytes
    endpoint: str
    model: str
    prompts: Sequence[list[int]]
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool = False
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    nothing: bool = False
    parsers: Sequence[OutputParser] = ()
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Piece:
    """What came next of a choice. ``logprobs``: (offset of the token in the choice's text, entry)."""

    index: int
    events: list[Event]
    logprobs: list[tuple[int, Logprobs]]
    finish: str | None


class Choice:
    """One choice on its way from tokens to events. ``index`` counts over all prompts."""

    def __init__(self, tokenizer: Tokenizer, job: Job, index: int) -> None:
        self.index = index
        self.generated = 0
        self.finish: str | None = None
        self.texts: list[str] | None = None
        """What has been said, where somebody wants to know."""
        self._job = job
        self._decoder = tokenizer.decoder(skip_special_tokens=job.skip_special_tokens)
        self._stops = StopStrings(job.stops, include=job.include_stop) if job.stops else None
        self._parser = job.parsers[index] if job.parsers else None
        self._decoded = self._emitted = 0  # characters
        self._pending: list[tuple[int, int, Logprobs]] = []  # of tokens whose text is not all out yet

    @property
    def failure(self) -> str | None:
        return self._parser.failure if self._parser else None

    def push(self, output: Output) -> Piece:
        """The engine's next tokens. After a stop string ``finish`` is set though the engine goes on."""
        if self._job.nothing:
            self.finish = "length" if output.finish else None
            return Piece(self.index, [], [], self.finish)
        text, self.finish = self._read(output) if self._stops is None else self._read_to_stop(output, self._stops)
        self._emitted += len(text)
        if self.texts is not None:
            self.texts.append(text)
        if self._parser is None:
            events: list[Event] = [Text(text)] if text else []
        else:
            events = self._parser.push(text)
            if self.finish is not None:
                events += self._parser.close()
        return Piece(self.index, events, self._due(), self.finish)

    def _read(self, output: Output) -> tuple[str, str | None]:
        """The text to emit, and whether the answer ends with it."""
        self.generated += len(output.tokens) + (output.stop_token is not None)
        text = self._decode(output, 0, len(output.tokens))
        return text if output.finish is None else text + self._decoder.close(), output.finish

    def _read_to_stop(self, output: Output, stops: StopStrings) -> tuple[str, str | None]:
        """The same. Token by token: those after a stop string that have come already are none of this answer's."""
        text = ""
        for i in range(len(output.tokens)):
            self.generated += 1
            piece, stop = self._decode(output, i, i + 1), None
            if self.generated >= self._job.params.min_tokens:  # else it is too early to end the answer
                piece, stop = stops.push(piece)
            text += piece
            if stop is not None:
                return text, "stop"
        if output.finish is None:
            return text, None
        self.generated += output.stop_token is not None
        piece, stop = stops.push(self._decoder.close())
        return (text + piece, "stop") if stop is not None else (text + piece + stops.close(), output.finish)

    def _decode(self, output: Output, start: int, end: int) -> str:
        tokens = output.tokens[start:end]
        if output.logprobs is None:
            text = self._decoder.push(tokens)
        else:
            text = ""
            for token, entry in zip(tokens, output.logprobs[start:end], strict=True):
                begin = self._decoded + len(text)
                text += self._decoder.push([token])
                self._pending.append((begin, self._decoded + len(text), entry))
        self._decoded += len(text)
        return text

    def _due(self) -> list[tuple[int, Logprobs]]:
        """Entries whose text is out; at the end, of those partly in a stop string too."""
        due = []
        while self._pending:
            start, end, entry = self._pending[0]
            if end > self._emitted and not (self.finish is not None and start < self._emitted):
                break
            due.append((start, entry))
            del self._pending[0]
        return due


class Run:
    """A job in the engine. Entering starts it, or raises `EngineUnavailable`; leaving aborts what is unfinished."""

    def __init__(self, state: ServerState, job: Job) -> None:
        self.job = job
        self.prompt_logprobs: dict[int, list[Logprobs]] = {}
        """Prompt number -> its logprobs, there before the first piece of its choices."""
        self._state = state
        self._choices = [Choice(state.tokenizer, job, i) for i in range(len(job.prompts) * job.n)]
        self._open = len(self._choices)
        self._cached: dict[int, int] = {}
        self._generations: list[Generation] = []
        self._contexts = AsyncExitStack()
        self._queue: asyncio.Queue[tuple[int, Output] | Exception] = asyncio.Queue()
        self._started = time.monotonic()
        self._first: float | None = None
        self._error: str | None = None
        self._request: Any = None

    async def __aenter__(self) -> Run:
        job = self.job
        async with AsyncExitStack() as contexts:
            for prompt in job.prompts:
                generation = self._state.engine.generate(prompt, job.params, job.n)
                self._generations.append(await contexts.enter_async_context(generation))
            self._contexts = contexts.pop_all()
        if self._state.listeners:
            for choice in self._choices:
                choice.texts = []
            self._request = msgspec.json.decode(job.body)
            self._state.tell("on_request", self._facts())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._contexts.aclose()
        if self._state.listeners:
            failed = self._error or (repr(error) if isinstance(error, Exception) else None)
            finishes = [choice.finish for choice in self._choices]
            status = "error" if failed else "aborted" if None in finishes else "ok"
            facts = {
                "status": status,
                "error": failed,
                "finish_reasons": finishes,
                "answers": ["".join(choice.texts or ()) for choice in self._choices],
                "completion_tokens": sum(choice.generated for choice in self._choices),
                "cached_tokens": sum(self._cached.values()),
                "time_to_first_token": self._first,
                "duration": time.monotonic() - self._started,
            }
            self._state.tell("on_finish", {**self._facts(), **facts})

    def _facts(self) -> dict[str, Any]:
        job = self.job
        return {
            "id": job.id,
            "endpoint": job.endpoint,
            "model": job.model,
            "stream": job.stream,
            "n": job.n,
            "created": job.created,
            "prompt_tokens": sum(len(prompt) for prompt in job.prompts),
            "request": self._request,
        }

    def usage(self) -> Usage:
        """So far. A prompt counts once, whatever ``n``; stop tokens were generated too."""
        prompt = sum(len(tokens) for tokens in self.job.prompts)
        generated = sum(choice.generated for choice in self._choices)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=CachedTokens(sum(self._cached.values())),
        )

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """All that is there at a time, one `Piece` per choice. Raises `ApiError` or `EngineUnavailable`."""
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                pieces = []
                fault: str | ApiError | None = None
                for number, output in batch:
                    choice = self._choices[number * self.job.n + output.index]
                    if output.finish == "refused":
                        fault = ApiError(f"This request cannot be finished: {output.error}.")
                        continue
                    if output.finish in ("error", "abort"):
                        fault = output.error or "the generation was aborted"
                        continue
                    pieces.append(choice.push(output))
                    if choice.finish is not None:
                        self._open -= 1
                        if output.finish is None:
                            self._generations[number].abort(output.index)
                    fault = fault or choice.failure
                if self._first is None:
                    self._first = time.monotonic() - self._started
                yield pieces
                if isinstance(fault, ApiError):
                    raise fault
                if fault is not None:
                    raise internal_error(fault, f"the request could not be finished: {fault}")

    async def _batches(self) -> AsyncGenerator[list[tuple[int, Output]], None]:
        """Outputs, several at once when they are there already: who reads slowly gets fewer, larger events."""
        batch: dict[tuple[int, int], Output] = {}
        held: dict[int, list[Output]] = {}
        wants_prompt = self.job.params.prompt_logprobs is not None
        try:
            async with aclosing(self._outputs()) as outputs:
                async for number, output in outputs:
                    self._note(number, output)
                    if wants_prompt and number not in self.prompt_logprobs and output.error is None:
                        # another choice than the one that brings the prompt's
                        held.setdefault(number, []).append(output)
                    else:
                        for o in [*held.pop(number, ()), output]:
                            old = batch.get((number, o.index))
                            batch[number, o.index] = o if old is None else joined(old, o)
                    if batch and not self._waiting():
                        yield [(n, o) for (n, _), o in batch.items()]
                        batch.clear()
        except Exception:
            if batch:
                yield [(n, o) for (n, _), o in batch.items()]
            raise
        if batch:
            yield [(n, o) for (n, _), o in batch.items()]

    def _note(self, number: int, output: Output) -> None:
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[number] = output.prompt_logprobs
        if output.index == 0:
            self._cached.setdefault(number, output.cached_tokens)

    def _waiting(self) -> bool:
        return self._generations[0].waiting() if len(self._generations) == 1 else not self._queue.empty()

    async def _outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """(number of the prompt, output)."""
        if len(self._generations) == 1:
            async for output in self._generations[0]:
                yield 0, output
            return
        tasks = [asyncio.create_task(self._pump(i, generation)) for i, generation in enumerate(self._generations)]
        try:
            # not "while a pump runs": one whose choices a stop string has ended gets nothing more, not even an end
            while self._open:
                item = await self._queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, number: int, generation: Generation) -> None:
        try:
            async for output in generation:
                self._queue.put_nowait((number, output))
        except Exception as error:
            self._queue.put_nowait(error)

    def fail(self, error: Exception) -> ApiError:
        """What to tell the client of it; noted for the listeners."""
        answer = api_error(error)
        self._error = answer.message
        return answer


# ---------------------------------------------------------------------------------------------------------------------


class Shape(Protocol):
    """How an endpoint's answers look."""

    def chunks(self, piece: Piece, run: Run) -> Iterable[bytes]:
        """The server-sent events of a piece, as JSON."""

    def usage_chunk(self, run: Run) -> bytes: ...

    def whole(self, pieces: Sequence[Piece], run: Run) -> bytes:
        """The answer made of all pieces, as JSON."""


class Answer:
    """An ASGI application that runs one job."""

    def __init__(self, state: ServerState, job: Job, shape: Shape) -> None:
        self._state, self._job, self._shape = state, job, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _while_connected(receive, self._stream(send) if self._job.stream else self._whole(send))

    async def _whole(self, send: Send) -> None:
        async with Run(self._state, self._job) as run:
            pieces: list[Piece] = []
            try:
                async with aclosing(run.pieces()) as batches:
                    async for batch in batches:
                        pieces += batch
            except Exception as error:
                raise run.fail(error) from None
            body = self._shape.whole(pieces, run)
        await JsonAnswer(body)(None, None, send)

    async def _stream(self, send: Send) -> None:
        shape = self._shape
        async with Run(self._state, self._job) as run:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            # nginx would otherwise gather the events
            headers.append((b"x-accel-buffering", b"no"))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async with aclosing(run.pieces()) as batches:
                    async for batch in batches:
                        events = [b"data: %b\n\n" % chunk for piece in batch for chunk in shape.chunks(piece, run)]
                        if events:
                            body = b"".join(events)
                            await send({"type": "http.response.body", "body": body, "more_body": True})
                tail = b"data: %b\n\n" % shape.usage_chunk(run) if self._job.include_usage else b""
                tail += b"data: [DONE]\n\n"
            except Exception as error:
                tail = b"data: %b\n\n" % run.fail(error).body()
        await send({"type": "http.response.body", "body": tail, "more_body": False})


class JsonAnswer:
    """An ASGI application that sends JSON."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self._body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but stop when the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


_GONE = "client disconnected prematurely"
"""What Litestar says, with a 500, of a body that did not come whole."""


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. What is our own fault is logged, under an id that the client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineUnavailable):
        return unavailable(error)
    if isinstance(error, HTTPException) and error.detail == _GONE:
        return ApiError("The body ended too soon.")
    if isinstance(error, HTTPException) and error.status_code < 500:
        messages = {404: "There is no such path here.", 413: "The body is too large."}
        message = messages.get(error.status_code, error.detail or "The request cannot be handled.")
        return ApiError(message, status=error.status_code, headers=error.headers)
    return internal_error(error, str(error) if isinstance(error, Wrong) else "internal error")


def internal_error(cause: str | Exception, message: str) -> ApiError:
    id = uuid.uuid4().hex[:12]
    log.error("error %s: %s", id, cause, exc_info=cause if isinstance(cause, Exception) else None)
    return ApiError(f"{message[:1].upper()}{message[1:]} (error id {id})", status=500, type="server_error")
