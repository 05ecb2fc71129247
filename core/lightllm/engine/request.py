"""Everything that crosses the line between the server process and the engine process, as msgspec structs."""

from __future__ import annotations

from typing import Any

import msgspec

from lightllm.grammar import Grammar


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one request wants its tokens chosen. Already checked: the engine trusts these values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    logprobs: int | None = None  # None: none; k >= 0: the chosen token's, and the k likeliest
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    extra: dict[str, Any] = {}  # request fields that plugins claim


# --- server -> engine


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Continue ``prompt`` in ``n`` independent ways. ``id`` is unique among live requests."""

    id: str
    prompt: list[int]
    params: SamplingParams
    n: int = 1


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop and free. ``index`` None: every choice of the request."""

    id: str
    index: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave in good order."""


Command = Generate | Abort | Shutdown


# --- engine -> server


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of ``token`` before temperature and penalties, and the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice. ``finish``: "stop", "length", "abort", "error" or "refused" with the last of them, else
    None. "refused": the fault, ``error``, lies in the request.

    ``prompt_logprobs`` come once, before or with the first token: one entry per prompt token from the second on.
    A stop token is not among ``tokens``; ``stop_token`` names it.
    """

    id: str
    index: int
    tokens: list[int]
    finish: str | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    stop_token: int | None = None
    error: str | None = None
    cached_tokens: int = 0


def joined(old: Output, new: Output) -> Output:
    """Two successive outputs of one choice as one."""
    logprobs = [*(old.logprobs or ()), *(new.logprobs or ())] if old.logprobs or new.logprobs else None
    return msgspec.structs.replace(
        new,
        tokens=old.tokens + new.tokens,
        logprobs=logprobs,
        prompt_logprobs=new.prompt_logprobs if old.prompt_logprobs is None else old.prompt_logprobs,
    )


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state after a step."""

    running: int = 0
    waiting: int = 0
    free_slots: int = 0  # including cached ones nobody holds
    total_slots: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0  # since start
    cached_tokens: int = 0
    generated_tokens: int = 0


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All events of one engine step, in one message."""

    outputs: list[Output]
    stats: Stats


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start-up progress. ``total`` 0: unknown."""

    stage: str
    done: int = 0
    total: int = 0


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine can take requests. ``overlap``: a device computes steps while this process plans the next.
    ``summary``: lines for the start-up log."""

    max_model_len: int
    total_slots: int
    vocab_size: int
    overlap: bool = False
    summary: list[str] = []


class Fatal(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot start or go on. ``user``: the text is for the user as it stands (no traceback needed)."""

    message: str
    user: bool = False


Report = Step | Loading | Ready | Fatal
