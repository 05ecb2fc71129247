"""Which of the installed records serve: what was asked for by name, or under ``auto`` the best of those that can."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lightllm.checks import Wrong, blamed, describe
from lightllm.interfaces import Adapters, ModelInfo, UserError
from lightllm.plugins import Plugins, Provided

log = logging.getLogger("lightllm")

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "attention_backends": "--attention-backend",
        "operators": "--operators",
        "samplers": "--sampler",
        "linear_methods": "--quantization",
        "grammar_backends": "--grammar-backend",
        "executors": "--executor",
        "tool_parsers": "--tool-call-parser",
    }
)
"""Kinds that take a name, ``plugin/name`` or ``auto``."""


def choose(plugins: Plugins, kind: str, asked: str, *facts: Any) -> Provided:
    """``facts`` are for the record's ``supports``, which must always agree, or its ``matches``, which counts only under
    ``auto``. Raises UserError."""
    what = kind.replace("_", " ").removesuffix("s")
    if asked != "auto":
        chosen = plugins.find(kind, asked)
        if hasattr(chosen.record, "supports") and (reason := _answer(chosen, facts)):
            raise UserError(f"{OPTIONS[kind]} {asked}: {reason}")
        log.info("%s: %s, as asked for", what, chosen.label)
        return chosen
    best: Provided | None = None
    passed: list[str] = []
    for candidate in sorted(plugins.records(kind), key=lambda p: -p.record.priority):
        reason = why_not(plugins, candidate, *facts)
        if reason is None and best is None:
            best = candidate
        else:
            passed.append(f"not {candidate.label}: {reason or 'of lower priority'}")
    if best is None:
        reasons = "; ".join(passed) or "none is installed"
        raise UserError(f"no {what} can serve this model: {reasons}.{plugins.broken_note()}")
    log.info("%s: %s%s", what, best.label, f" ({'; '.join(passed)})" if passed else "")
    return best


def why_not(plugins: Plugins, candidate: Provided, *facts: Any) -> str | None:
    """Why a record that nobody asked for cannot serve; one that fails to say so is passed over with a warning.

    Raises what it raised where plugins are strict, or ``--plugin`` names its.
    """
    try:
        return _answer(candidate, facts)
    except (Wrong, UserError) as error:
        if plugins.strict or candidate.plugin.asked_for:
            raise
        reason = describe(error if isinstance(error, UserError) else error.__cause__ or error)
        log.warning("%s is passed over: %s", candidate.label, reason)
        return reason


def _answer(candidate: Provided, facts: tuple[Any, ...]) -> str | None:
    record = candidate.record
    answer: str | None = None
    with blamed(candidate.label):
        if hasattr(record, "supports"):
            answer = record.supports(*facts) if record.supports else None
        elif hasattr(record, "matches"):
            answer = record.matches(*facts) if record.matches else "it is chosen by name only"
    return answer


def serving_models(plugins: Plugins, info: ModelInfo) -> list[Provided]:
    return [p for p in plugins.records("models") if info.architecture in p.record.architectures]


def model_record(plugins: Plugins, info: ModelInfo) -> Provided:
    """The model plugin for this architecture. Raises UserError when there is none, or several."""
    serving = serving_models(plugins, info)
    if len(serving) == 1:
        return serving[0]
    if serving:
        raise UserError(
            f"several plugins serve {info.architecture}: {', '.join(p.label for p in serving)}; use --no-plugin"
        )
    known = sorted({a for p in plugins.records("models") for a in p.record.architectures})
    raise UserError(
        f"{info.path}: no model plugin serves the architecture {info.architecture!r}. Served: {', '.join(known)}."
        + plugins.broken_note()
    )


def adapters(plugins: Plugins, weight_format: Provided) -> Adapters:
    """What model plugins bring along for this weight format."""

    def adapter(name: str) -> Any:
        wanted = f"{weight_format.record.name}/{name}"
        bringing = [p for p in plugins.records("models") if wanted in p.record.adapters]
        if len(bringing) > 1:
            raise UserError(f"several plugins read {wanted}: {', '.join(p.label for p in bringing)}; use --no-plugin")
        return plugins.load(bringing[0], bringing[0].record.adapters[wanted]) if bringing else None

    return adapter


def claimed_fields(plugins: Plugins) -> dict[str, Provided]:
    """Request field -> the logits processor that claims it. Two claims on one field are an error naming both."""
    claims: dict[str, Provided] = {}
    for provided in plugins.records("logits_processors"):
        for name in provided.record.fields:
            if name in claims:
                raise UserError(
                    f"{claims[name].label} and {provided.label} both claim the request field {name!r}: "
                    "block one with --no-plugin"
                )
            claims[name] = provided
    return claims
