"""What all checks share: how a broken rule is said, and how what is to be checked may be given."""

from __future__ import annotations

from typing import Any

from lightllm.checks import import_target
from lightllm.interfaces import Record


def broken(rule: str, *facts: str) -> AssertionError:
    """To be raised. ``facts``: what was given, what was expected, what came; a line each."""
    return AssertionError("\n  ".join([f"this rule is broken: {rule}", *facts]))


def resolve(given: Any) -> Any:
    """A record stands for its target."""
    return import_target(given.target) if isinstance(given, Record) else given


def shown(value: object, most: int = 400) -> str:
    """Its repr, cut in the middle where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"
