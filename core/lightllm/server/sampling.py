"""From a request's fields to checked `SamplingParams`; whatever cannot be honoured is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lightllm.engine.request import Ready, SamplingParams
from lightllm.grammar import Grammar
from lightllm.server.protocol import ApiError, ChatRequest, Generating
from lightllm.server.state import ServerState, Validator

log = logging.getLogger("lightllm.server")


def sampling_params(
    state: ServerState,
    ready: Ready,
    request: Generating,
    unknown: Mapping[str, Any],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """What the request leaves open is generation_config.json's, else OpenAI's default."""
    defaults = generation_defaults(state.info.generation)
    _check_token_ids(request, ready)
    if request.min_tokens and request.min_tokens > max_tokens:
        raise ApiError(
            f"min_tokens is {request.min_tokens}, but at most {max_tokens} tokens are to be generated.",
            param="min_tokens",
        )

    def chosen(name: str, default: Any) -> Any:
        value = getattr(request, name)
        return value if value is not None else defaults.get(name, default)

    return SamplingParams(
        temperature=chosen("temperature", 1.0),
        top_p=chosen("top_p", 1.0),
        top_k=min(max(chosen("top_k", 0), 0), ready.vocab_size),
        min_p=chosen("min_p", 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=chosen("repetition_penalty", 1.0),
        logit_bias=request.logit_bias or {},
        seed=request.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        grammar=grammar,
        extra=claimed(state.claims, unknown),
    )


_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (1e-9, 1),
    "top_k": (-1, float("inf")),
    "min_p": (0, 1),
    "repetition_penalty": (1e-9, 10),
}


def generation_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """The sampling defaults that a checkpoint recommends.

    ``do_sample: false`` says that transformers would decode greedily, not that a chat server should: its sampling
    figures are then left aside and OpenAI's defaults (temperature 1) stand. Values no request may have are ignored.
    """
    names = _BOUNDS.keys() if generation.get("do_sample") is not False else {"repetition_penalty"}
    defaults = {}
    for name in names:
        value = generation.get(name)
        low, high = _BOUNDS[name]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            defaults[name] = value
    return defaults


def claimed(claims: Mapping[str, Validator | None], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that logits processors claim, each plugin having agreed to its own. Others are ignored."""
    extra: dict[str, Any] = {}
    of_plugin: dict[Validator, dict[str, Any]] = {}
    for name, value in unknown.items():
        if name not in claims:
            log.debug("request field %r is not known and ignored", name)
        elif value is not None:
            try:
                msgspec.msgpack.encode(value)
            except (OverflowError, RecursionError) as error:
                raise ApiError(f"Invalid value for {name!r}: {error}", param=name) from None
            extra[name] = value
            if validate := claims[name]:
                of_plugin.setdefault(validate, {})[name] = value
    for validate, fields in of_plugin.items():
        if reason := validate(fields):
            raise ApiError(f"Invalid value for {', '.join(fields)}: {reason}", param=next(iter(fields)))
    return extra


def stop_strings(request: Generating) -> tuple[str, ...]:
    stop = request.stop or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def check_prompt(tokens: Sequence[int], ready: Ready, what: str) -> None:
    """A tokenizer may know tokens that the model has no embedding for."""
    beyond = max(tokens, default=0)
    if beyond >= ready.vocab_size:
        raise ApiError(f"Token id {beyond} is not in the model's vocabulary of {ready.vocab_size}.", param=what)


def budget(prompt: int, asked: int | None, max_model_len: int, what: str) -> int:
    """How many tokens may be generated: what was asked, else what the context leaves. ``what`` holds the prompt."""
    if prompt >= max_model_len:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens. However, your {what} resulted in {prompt} "
            f"tokens. Please reduce the length of the {what}.",
            param=what,
            code="context_length_exceeded",
        )
    if asked is not None and prompt + asked > max_model_len:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {prompt + asked} "
            f"tokens ({prompt} in the {what}, {asked} in the completion). Please reduce the length of the {what} or "
            "completion.",
            param=what,
            code="context_length_exceeded",
        )
    return asked if asked is not None else max_model_len - prompt


def refuse_what_cannot_be(request: Generating) -> None:
    """Fields we know but cannot honour."""
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options may only be given when stream is true.", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError("prompt_logprobs are not available when streaming.", param="prompt_logprobs")
    if not isinstance(request, ChatRequest):
        return
    for name in ("functions", "function_call", "audio", "web_search_options"):
        if getattr(request, name) is not None:
            hint = " (use tools and tool_choice)" if name.startswith("function") else ""
            raise ApiError(f"{name} is not supported by this server{hint}.", param=name)
    if request.modalities is not None and request.modalities != ["text"]:
        raise ApiError("This server answers in text only.", param="modalities")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if request.echo:
        raise ApiError("echo is for /v1/completions.", param="echo")


def _check_token_ids(request: Generating, ready: Ready) -> None:
    for name, ids in (("logit_bias", request.logit_bias or ()), ("stop_token_ids", request.stop_token_ids or ())):
        for id in ids:
            if not 0 <= id < ready.vocab_size:
                raise ApiError(
                    f"Token id {id} is not in the vocabulary, which has {ready.vocab_size} tokens.", param=name
                )
