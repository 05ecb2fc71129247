"""POST /v1/completions: texts or token ids to continue, with echo and OpenAI's older form of logprobs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightllm.engine.request import Logprobs, Ready
from lightllm.interfaces import Text
from lightllm.server.answer import Answer, Job, Piece, Run
from lightllm.server.openai import finite, prompt_logprobs
from lightllm.server.protocol import (
    ApiError,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Count,
    convert,
    encode_json,
    read_request,
)
from lightllm.server.sampling import budget, check_prompt, refuse_what_cannot_be, sampling_params, stop_strings
from lightllm.server.state import ServerState
from lightllm.server.structured import answer_wish, grammar_of

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint."""

MAX_CHOICES = 2048
"""Prompts times n: as many prompts as OpenAI takes in one request."""

TokenIds = list[Count]


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    text: str | None
    """As it was sent; None where it came as token ids."""


async def completion(state: ServerState, body: bytes) -> Answer:
    """Raises `ApiError`, or `EngineUnavailable`."""
    request, unknown = read_request(body, CompletionRequest)
    model = state.model_name(request.model)
    ready = state.ready()
    refuse_what_cannot_be(request)
    n = request.n or 1
    if request.suffix:
        raise ApiError("suffix is not supported by this server.", param="suffix")
    if request.best_of is not None and request.best_of != n:
        raise ApiError("best_of is only supported where it equals n.", param="best_of")
    prompts = await _prompts(state, request, ready)
    asked = request.max_tokens if request.max_tokens is not None else DEFAULT_MAX_TOKENS
    longest = max(len(prompt.tokens) for prompt in prompts)
    if request.max_tokens is None:
        # a default may be cut short, an explicit wish may not
        asked = min(asked, budget(longest, None, ready.max_model_len, "prompt"))
    max_tokens = budget(longest, max(asked, 1), ready.max_model_len, "prompt")
    grammar = await grammar_of(state, answer_wish(request))
    wanted = [k for k in (request.logprobs if request.echo else None, request.prompt_logprobs) if k is not None]
    params = sampling_params(
        state,
        ready,
        request,
        unknown,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=max(wanted, default=None),
        grammar=grammar,
    )
    job = Job(
        id=f"cmpl-{uuid.uuid4().hex}",
        body=body,
        endpoint="completions",
        model=model,
        prompts=[prompt.tokens for prompt in prompts],
        params=params,
        n=n,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
        stops=stop_strings(request),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        nothing=asked == 0,
    )
    return Answer(state, job, CompletionShape(state, job, request, prompts))


async def _prompts(state: ServerState, request: CompletionRequest, ready: Ready) -> list[Prompt]:
    given: Any = request.prompt
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise ApiError("prompt must be a text, a list of texts, token ids, or a list of token ids.", param="prompt")
    if len(given) * (request.n or 1) > MAX_CHOICES:
        raise ApiError(f"At most {MAX_CHOICES} choices may be asked for at once.", param="prompt")
    prompts = []
    for i, item in enumerate(given):
        at = "prompt" if len(given) == 1 else f"prompt[{i}]"
        if isinstance(item, str):
            special = request.add_special_tokens is not False
            prompt = Prompt(await state.encode(item, add_special_tokens=special), item)
        else:
            prompt = Prompt(convert(item, TokenIds, at), None)
        check_prompt(prompt.tokens, ready, at)
        if not prompt.tokens:
            raise ApiError("A prompt must not be empty.", param=at)
        prompts.append(prompt)
    return prompts


@dataclass
class _Entries:
    """OpenAI's parallel lists, as they grow. ``text_offset`` counts characters from the choice's beginning."""

    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class CompletionShape:
    """`lightllm.server.answer.Shape` of completions."""

    def __init__(self, state: ServerState, job: Job, request: CompletionRequest, prompts: Sequence[Prompt]) -> None:
        self._tokenizer = state.tokenizer
        self._job = job
        self._prompts = prompts
        self._echo = bool(request.echo)
        self._top = request.logprobs
        self._prompt_top = request.prompt_logprobs
        self._begun: set[int] = set()
        self._echoes = [self._echoed(prompt) for prompt in prompts] if self._echo else []
        head = {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model}
        self._head = encode_json({**head, "system_fingerprint": None})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if job.include_usage else b"]}"

    def chunks(self, piece: Piece, run: Run) -> Iterator[bytes]:
        choice = self._choice(piece.index, [piece], run, begin=piece.index not in self._begun)
        self._begun.add(piece.index)
        if choice.text or choice.logprobs is not None or choice.finish_reason is not None:
            yield self._head + encode_json(choice) + self._tail

    def usage_chunk(self, run: Run) -> bytes:
        return self._head + b'],"usage":' + encode_json(run.usage()) + b"}"

    def whole(self, pieces: Sequence[Piece], run: Run) -> bytes:
        by_index: dict[int, list[Piece]] = {i: [] for i in range(len(self._prompts) * self._job.n)}
        for piece in pieces:
            by_index[piece.index].append(piece)
        choices = [self._choice(index, own, run, begin=True) for index, own in by_index.items()]
        if self._top is not None:
            for choice in choices:
                choice.logprobs = choice.logprobs or CompletionLogprobs([], [], [], [])
        if self._prompt_top is not None:
            for choice in choices:
                entries = run.prompt_logprobs.get(choice.index // self._job.n, [])
                choice.prompt_logprobs = prompt_logprobs(self._tokenizer, entries, self._prompt_top)
        return encode_json(
            Completion(
                id=self._job.id, created=self._job.created, model=self._job.model, choices=choices, usage=run.usage()
            )
        )

    def _choice(self, index: int, pieces: Sequence[Piece], run: Run, *, begin: bool) -> CompletionChoice:
        number = index // self._job.n
        text = "".join(event.text for piece in pieces for event in piece.events if isinstance(event, Text))
        shift = len(self._echoes[number]) if self._echo else 0
        logprobs = None
        if self._top is not None:
            entries = _Entries()
            if self._echo and begin:
                self._add_prompt(entries, number, run)
            for piece in pieces:
                for offset, entry in piece.logprobs:
                    self._add(entries, offset + shift, entry)
            if entries.tokens:
                logprobs = CompletionLogprobs(entries.tokens, entries.logprobs, entries.top, entries.offsets)
        if self._echo and begin:
            text = self._echoes[number] + text
        finish = pieces[-1].finish if pieces else None
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)

    def _echoed(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.tokens, skip_special_tokens=self._job.skip_special_tokens)

    def _add_prompt(self, entries: _Entries, number: int, run: Run) -> None:
        tokens = self._prompts[number].tokens
        decoder = self._tokenizer.decoder(skip_special_tokens=self._job.skip_special_tokens)
        echo = self._echoes[number]

        def length(token: int, offset: int) -> int:
            """In the echo, which has the special tokens that were written in the text, but not those added to it."""
            text = decoder.push([token])
            if not text and token in self._tokenizer.special_ids:
                special = self._tokenizer.token_text(token)
                return len(special) if echo.startswith(special, offset) else 0
            return len(text)

        entries.tokens.append(self._tokenizer.token_text(tokens[0]))
        entries.logprobs.append(None)
        entries.top.append(None)
        entries.offsets.append(0)
        offset = length(tokens[0], 0)
        for entry in run.prompt_logprobs.get(number, []):
            self._add(entries, offset, entry)
            offset += length(entry.token, offset)

    def _add(self, entries: _Entries, offset: int, entry: Logprobs) -> None:
        text_of = self._tokenizer.token_text
        entries.tokens.append(text_of(entry.token))
        entries.logprobs.append(finite(entry.logprob))
        best = {text_of(token): finite(logprob) for token, logprob in entry.top[: self._top]}
        # OpenAI: "up to logprobs + 1 elements", the chosen token always being one
        entries.top.append(best | {text_of(entry.token): finite(entry.logprob)})
        entries.offsets.append(offset)
