"""POST /v1/chat/completions: from the request to a job, and from pieces to OpenAI's chunks and whole answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightllm.chat import ChatError, OutputParser, merged
from lightllm.checks import blamed
from lightllm.engine.request import Logprobs
from lightllm.interfaces import CallArguments, CallIds, CallStart, Event, Reasoning, Text, ToolParser
from lightllm.server.answer import Answer, Job, Piece, Run
from lightllm.server.protocol import (
    Alternative,
    ApiError,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Delta,
    Function,
    PromptLogprobs,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    encode_json,
    read_request,
)
from lightllm.server.sampling import budget, check_prompt, refuse_what_cannot_be, sampling_params, stop_strings
from lightllm.server.state import ServerState
from lightllm.server.structured import answer_wish, chat_grammar
from lightllm.server.tools import Tools, read_tools
from lightllm.tokenizer import Tokenizer


async def chat_completion(state: ServerState, body: bytes) -> Answer:
    """Raises `ApiError`, or `EngineUnavailable`."""
    request, unknown = read_request(body, ChatRequest)
    model = state.model_name(request.model)
    ready = state.ready()
    refuse_what_cannot_be(request)
    wish = answer_wish(request)
    tools = read_tools(request)
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    prompt = render(
        state,
        request.messages,
        tools.shown,
        # what is to be continued is not followed by a new turn, unless the request insists
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        variables=variables,
    )
    # the template has written the special tokens
    tokens = await state.encode(prompt, add_special_tokens=bool(request.add_special_tokens))
    if not tokens:
        raise ApiError("The chat template made an empty prompt of these messages.", param="messages")
    check_prompt(tokens, ready, "messages")
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    max_tokens = budget(len(tokens), asked, ready.max_model_len, "messages")
    n = request.n or 1
    with blamed(state.tool_parser_name):
        tool_parsers = [
            state.tool_parser(tools.callable) if state.tool_parser and tools.callable else None for _ in range(n)
        ]
    with blamed(state.reasoning_parser_name):
        reasoning_parsers = [state.reasoning_parser(prompt) if state.reasoning_parser else None for _ in range(n)]
    grammar = await chat_grammar(state, wish, tools, tool_parsers[0], reasoning_parsers[0])
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = sampling_params(
        state,
        ready,
        request,
        unknown,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        grammar=grammar,
    )
    job = Job(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        body=body,
        endpoint="chat.completions",
        model=model,
        prompts=[tokens],
        params=params,
        n=n,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
        stops=stop_strings(request),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=_chosen(
            request.skip_special_tokens,
            # formats are marked with special tokens, [TOOL_CALLS] for one
            default=tool_parsers[0] is None and reasoning_parsers[0] is None,
        ),
        parsers=[
            OutputParser(*pair, reasoning_name=state.reasoning_parser_name, tools_name=state.tool_parser_name)
            for pair in zip(reasoning_parsers, tool_parsers, strict=True)
        ],
    )
    return Answer(state, job, ChatShape(state, job, request, tools, _call_id_maker(state, tool_parsers[0])))


def _chosen(value: bool | None, *, default: bool) -> bool:
    return default if value is None else value


def render(
    state: ServerState,
    messages: list[Any],
    tools: list[dict[str, Any]],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    variables: dict[str, Any],
) -> str:
    """The prompt of a conversation. Raises `ApiError`."""
    if state.chat_template is None:
        raise ApiError(
            "This model has no chat template: start the server with --chat-template FILE, or use /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    try:
        return state.chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=_chosen(add_generation_prompt, default=not continue_final_message),
            continue_final_message=continue_final_message,
            kwargs=variables,
        )
    except ChatError as error:
        raise ApiError(f"Invalid value for {error.param!r}: {error}", param=error.param) from None


class ChatShape:
    """`lightllm.server.answer.Shape` of chat completions."""

    def __init__(
        self, state: ServerState, job: Job, request: ChatRequest, tools: Tools, call_id: Callable[[], str]
    ) -> None:
        self._tokenizer = state.tokenizer
        self._top = request.top_logprobs or 0
        self._prompt_top = request.prompt_logprobs
        self._parallel = tools.parallel
        self._reasons = state.reasoning_parser is not None
        self._call_id = call_id
        self._begun: set[int] = set()
        self._called: set[int] = set()
        self._job = job
        head = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model}
        # all chunks begin and end alike
        self._head = encode_json({**head, "system_fingerprint": None})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if job.include_usage else b"]}"

    # --- streamed

    def chunks(self, piece: Piece, run: Run) -> Iterator[bytes]:
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk(ChatChunkChoice(index=piece.index, delta=Delta(role="assistant", content="")))
        logprobs = self._logprobs(piece.logprobs)
        for event in self._events(piece):
            yield self._chunk(ChatChunkChoice(index=piece.index, delta=self._delta(event), logprobs=logprobs))
            logprobs = None
        if logprobs is not None:
            yield self._chunk(ChatChunkChoice(index=piece.index, delta=Delta(content=""), logprobs=logprobs))
        if piece.finish is not None:
            finish = self._finish(piece)
            yield self._chunk(ChatChunkChoice(index=piece.index, delta=Delta(), finish_reason=finish))

    def usage_chunk(self, run: Run) -> bytes:
        return self._head + b'],"usage":' + encode_json(run.usage()) + b"}"

    def _chunk(self, choice: ChatChunkChoice) -> bytes:
        return self._head + encode_json(choice) + self._tail

    def _delta(self, event: Event) -> Delta:
        if isinstance(event, Text):
            return Delta(content=event.text)
        if isinstance(event, Reasoning):
            return Delta(reasoning_content=event.text, reasoning=event.text)
        if isinstance(event, CallStart):
            function = Function(event.name, "")
            call = ToolCallDelta(index=event.index, id=self._call_id(), type="function", function=function)
        else:
            call = ToolCallDelta(index=event.index, function=Function(None, event.fragment))
        return Delta(tool_calls=[call])

    # --- whole

    def whole(self, pieces: Sequence[Piece], run: Run) -> bytes:
        choices = [self._choice(index, [p for p in pieces if p.index == index]) for index in range(self._job.n)]
        answer = ChatCompletion(
            id=self._job.id, created=self._job.created, model=self._job.model, choices=choices, usage=run.usage()
        )
        if self._prompt_top is not None:
            answer.prompt_logprobs = prompt_logprobs(self._tokenizer, run.prompt_logprobs.get(0, []), self._prompt_top)
        return encode_json(answer)

    def _choice(self, index: int, pieces: list[Piece]) -> ChatChoice:
        content, reasoning = "", ""
        calls: list[ToolCall] = []
        by_index: dict[int, ToolCall] = {}
        for event in merged(event for piece in pieces for event in self._events(piece)):
            if isinstance(event, Text):
                content += event.text
            elif isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, CallStart):
                call = ToolCall(id=self._call_id(), function=Function(event.name, ""))
                by_index[event.index] = call
                calls.append(call)
            elif event.index in by_index:
                by_index[event.index].function.arguments += event.fragment
        message = ChatMessage(content=content or (None if calls else ""))
        if calls:
            message.tool_calls = calls
        if reasoning or self._reasons:
            message.reasoning_content = message.reasoning = reasoning
        entries = [entry for piece in pieces for entry in piece.logprobs]
        logprobs = self._logprobs(entries)
        if logprobs is None and self._job.params.logprobs is not None:
            logprobs = ChatLogprobs([])
        finish = self._finish(pieces[-1]) if pieces else None
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish)

    # --- both

    def _events(self, piece: Piece) -> Iterator[Event]:
        for event in piece.events:
            if isinstance(event, (CallStart, CallArguments)):
                if event.index > 0 and not self._parallel:
                    continue
                self._called.add(piece.index)
            yield event

    def _finish(self, piece: Piece) -> str | None:
        return "tool_calls" if piece.finish == "stop" and piece.index in self._called else piece.finish

    def _logprobs(self, entries: Sequence[tuple[int, Logprobs]]) -> ChatLogprobs | None:
        if not entries:
            return None
        t = self._tokenizer
        return ChatLogprobs(
            [
                TokenLogprob(
                    t.token_text(entry.token),
                    finite(entry.logprob),
                    list(t.token_bytes(entry.token)),
                    [
                        Alternative(t.token_text(token), finite(logprob), list(t.token_bytes(token)))
                        for token, logprob in entry.top[: self._top]
                    ],
                )
                for _, entry in entries
            ]
        )


def _call_id_maker(state: ServerState, parser: ToolParser | None) -> Callable[[], str]:
    if not isinstance(parser, CallIds):
        return lambda: f"call_{uuid.uuid4().hex[:24]}"

    def call_id() -> str:
        with blamed(state.tool_parser_name):
            return parser.call_id()

    return call_id


def finite(logprob: float) -> float:
    """JSON knows no infinity; a token that was ruled out shows as OpenAI shows it."""
    return logprob if logprob > -9999.0 else -9999.0


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[Logprobs], top: int) -> PromptLogprobs:
    """vLLM's form: per prompt token a map of token id to its figures; the first token has none.

    ``rank`` is null for a prompt token that is not among the likeliest that were asked for.
    """
    out: PromptLogprobs = [None]
    for entry in entries:
        best = entry.top[:top]
        ranks = {token: rank for rank, (token, _) in enumerate(best, 1)}
        out.append(
            {
                str(token): {
                    "logprob": finite(logprob),
                    "rank": ranks.get(token),
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, logprob in {entry.token: entry.logprob, **dict(best)}.items()
            }
        )
    return out
