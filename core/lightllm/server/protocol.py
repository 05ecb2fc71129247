"""What clients send and get: OpenAI's requests, responses and errors as msgspec structs.

Field names, types and bounds are those of OpenAI's API reference; what vLLM adds (top_k, min_p, prompt_logprobs,
chat_template_kwargs ...) is spelt as vLLM spells it. A null field is one that was not sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

T = TypeVar("T")

encode_json = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer that is an error: ``{"error": {"message", "type", "param", "code"}}`` with this HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type, self.param, self.code = message, status, type, param, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        return encode_json(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


def unavailable(why: object) -> ApiError:
    """The fault is neither the request's nor lasting."""
    return ApiError(
        f"The server cannot answer now: {why}", status=503, type="server_error", headers={"retry-after": "1"}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Requests

Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Top = Annotated[int, Meta(ge=0, le=20)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1)]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's: one of these. ``json``: a JSON Schema, as an object or as text."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class Generating(msgspec.Struct, kw_only=True):
    """What both endpoints that generate take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: dict[Integer, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Integer | None = None

    min_tokens: Count | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] | None = None
    stop_token_ids: list[Count] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Top | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    echo: bool | None = None
    user: str | None = None


class ChatRequest(Generating, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Any]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None


class CompletionRequest(Generating, kw_only=True):
    """POST /v1/completions. ``prompt``: a text, texts, token ids, or lists of token ids."""

    prompt: Any
    max_tokens: Count | None = None
    logprobs: Top | None = None
    best_of: Positive | None = None
    suffix: str | None = None


REQUEST_FIELDS = frozenset(
    field.encode_name for kind in (ChatRequest, CompletionRequest) for field in msgspec.structs.fields(kind)
)
"""What no plugin may claim."""


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize, of a prompt or of messages"""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[Annotated[int, Meta(ge=0, le=2**32 - 1)]]


class ToolFunction(msgspec.Struct, kw_only=True):
    name: Annotated[str, Meta(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: str
    function: ToolFunction


ACCEPTED = frozenset({"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"})
"""OpenAI's fields that mean nothing here and harm nothing."""

_decode = msgspec.json.Decoder().decode


def read_request(body: bytes, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """The request, and the fields that are not of its kind. Raises `ApiError` naming the field at fault."""
    try:
        fields = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"The body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError("The body must be a JSON object.")
    request = convert(fields, kind)
    known = {field.encode_name for field in msgspec.structs.fields(kind)}  # type: ignore[arg-type]
    return request, {name: value for name, value in fields.items() if name not in known and name not in ACCEPTED}


def convert(value: Any, kind: type[T], at: str = "") -> T:
    """Plain data as ``kind``. Raises `ApiError`; ``at``: where in the request the value stands."""
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        reason, param = _where(str(error), at)
        raise ApiError(f"Invalid value for {param!r}: {reason}." if param else f"{reason}.", param=param) from None
    except RecursionError:
        raise ApiError("The request is nested too deeply.", param=at or None) from None


_PATH = re.compile(r"(?P<reason>.*) - at (?:`key` in )?`\$(?P<path>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def _where(message: str, at: str) -> tuple[str, str | None]:
    """msgspec's message taken apart: what is wrong, and OpenAI's name of the place (``messages[0].role``)."""
    found = _PATH.fullmatch(message)
    reason, path = (found["reason"], found["path"].replace("[...]", "")) if found else (message, "")
    if missing := _MISSING.match(reason):
        reason, path = "it is required", f"{path}.{missing[1]}"
    param = (at + path).lstrip(".")
    return reason[:1].lower() + reason[1:].replace("`", ""), param or None


# ---------------------------------------------------------------------------------------------------------------------
# Responses


class CachedTokens(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Function(msgspec.Struct):
    name: str | None  # null, not absent, after a call's first chunk: clients index it without asking
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: Function


class ToolCallDelta(msgspec.Struct, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: Function


class Delta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


PromptLogprobs = list[dict[str, Any] | None]


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    """Of a whole completion, and of a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None = None


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "lightllm"
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class TokenizeResponse(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct):
    prompt: str
