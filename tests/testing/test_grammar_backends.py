"""The kit's check of grammar backends: the built-in one passes, and of wrong ones each breaks one rule."""

from __future__ import annotations

from typing import Any

import pytest

from lightllm.grammar import Json, Regex, Repeated, Triggered
from lightllm.testing import check_grammar_backend
from lightllm_builtin.grammar.backend import Llguidance, Matcher


def test_the_built_in_backend_passes() -> None:
    check_grammar_backend(Llguidance)


class Changed(Matcher):
    def __init__(self, matcher: Matcher) -> None:
        super().__init__(matcher.raw)


class Yes(Changed):
    def accept(self, token: int) -> bool:
        super().accept(token)
        return True


class Endless(Changed):
    def finished(self) -> bool:
        return False


class Silent(Changed):
    def error(self) -> str:
        return ""


class Guessing(Changed):
    def forced(self) -> list[int]:
        return [120] if not self.finished() else []


def with_matcher(kind: Any) -> type:
    class Backend(Llguidance):
        def compile(self, grammar: Any) -> Any:
            return kind(super().compile(grammar))

    return Backend


class Early(Llguidance):
    """An answer may end after any beginning."""

    def fill(self, matchers: Any, masks: Any) -> None:
        super().fill(matchers, masks)
        eos = self._raw.token_to_id("<eos>")
        masks[:, eos // 32] |= 1 << eos % 32


class Smearing(Llguidance):
    """Leaves what was in the masks."""

    def fill(self, matchers: Any, masks: Any) -> None:
        before = masks.clone()
        super().fill(matchers, masks)
        masks |= before


class Loose(Llguidance):
    def compile(self, grammar: Any) -> Any:
        if isinstance(grammar, Repeated):
            grammar = Repeated(grammar.part)
        return super().compile(grammar)


class Spaced(Llguidance):
    """Lets JSON be written with a space after a comma, too."""

    def compile(self, grammar: Any) -> Any:
        if isinstance(grammar, Json) and "maxItems" in grammar.schema and "boolean" in grammar.schema:
            grammar = Regex(r"\[(true|false)(, ?(true|false))?\]")
        return super().compile(grammar)


class Raising(Llguidance):
    def compile(self, grammar: Any) -> Any:
        if isinstance(grammar, Regex) and grammar.pattern in ("(", "["):
            raise KeyError(grammar.pattern)
        return super().compile(grammar)


class Shared(Llguidance):
    """One matcher for all who ask for the same."""

    def compile(self, grammar: Any) -> Any:
        if "yes" not in str(grammar):
            return super().compile(grammar)
        if "kept" not in self.__dict__:
            self.kept = super().compile(grammar)
        return self.kept


class NoTriggers(Llguidance):
    def compile(self, grammar: Any) -> Any:
        from lightllm.grammar import GrammarError

        if isinstance(grammar, Triggered):
            raise GrammarError("no free text with triggers")
        return super().compile(grammar)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        (Early, "fill sets the bits of the tokens that may come"),
        (Loose, "an answer is let through if and only if the grammar allows it, as a whole"),
        (Spaced, "without whitespace, it does not fit; it is let through"),
        (with_matcher(Endless), "a matcher is finished when nothing can follow"),
        (with_matcher(Yes), "accept is False for a token that is not allowed"),
        (with_matcher(Silent), "error says why a matcher cannot go on"),
        (with_matcher(Guessing), "forced gives tokens that must come next, or none"),
        (Raising, "compile raises GrammarError for what it cannot compile"),
        (Shared, "each compile gives a matcher of its own"),
        (NoTriggers, "it compiles this kind of grammar with a tokenizer"),
        (Smearing, "fill sets the bits of the tokens that may come"),
    ],
)
def test_a_wrong_backend_is_told_why(backend: Any, rule: str) -> None:
    with pytest.raises(AssertionError) as failure:
        check_grammar_backend(backend)
    assert str(failure.value).startswith("this rule is broken: ")
    assert rule in str(failure.value)


def test_kinds_that_a_backend_is_said_to_be_without_are_not_asked_for() -> None:
    check_grammar_backend(NoTriggers, without=["Triggered"])
