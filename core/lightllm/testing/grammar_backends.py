"""Grammar backends: small grammars of every kind, against `re`, `json` and JSON Schema validation."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Collection, Iterator
from typing import Any

import jsonschema_rs

from lightllm import grammar as g
from lightllm.grammar import (
    Fixed,
    Grammar,
    GrammarError,
    Joined,
    Marker,
    OneOf,
    Regex,
    Repeated,
    Rules,
    Trigger,
    Triggered,
)
from lightllm.testing.grammars import TextMatcher
from lightllm.testing.rules import broken, resolve, shown

GBNF = 'root ::= "a" item+ | "b"\nitem ::= [0-9] | "(" item ")"'
LARK = 'start: "a" item+ | "b"\nitem: /[0-9]/ | "(" item ")"'
ITEMS = (["a1", "a(1)", "a((1))2(3)", "b"], ["a", "a(1", "ab", "a1)", ""])
CALL = (Trigger(Regex("<call>"), Fixed("1;")),)
TWO = (Trigger(Marker("[TOOL_CALLS]"), Fixed("1")), Trigger(Marker("<t>"), Joined((Fixed("2"), Marker("[ARGS]")))))

CASES: tuple[tuple[Grammar, list[str], list[str]], ...] = (
    (Fixed(""), [""], ["a"]),
    (Fixed('a"\n\\/天😀'), ['a"\n\\/天😀'], ["", 'a"', 'a"\n\\/天😀 ']),
    (Marker("[ARGS]"), ["[ARGS]"], ["", "[TOOL_CALLS]"]),
    (Marker("</t>"), ["</t>"], ["<t>", "</t"]),
    (Joined((Marker("[ARGS]"), Fixed("a"), Regex("b?"))), ["[ARGS]a", "[ARGS]ab"], ["[ARGS]", "a", "[ARGS]a[ARGS]"]),
    (OneOf((Fixed("a"), Fixed("ab"), Fixed("天"))), ["a", "ab", "天"], ["", "b", "天气", "a天"]),
    (Repeated(Fixed("ab")), ["", "ab", "ab" * 9], ["a", "aba"]),
    (Repeated(Fixed("ab"), 1, 2), ["ab", "abab"], ["", "ababab"]),
    (Repeated(Fixed("ab"), 2), ["abab", "ab" * 9], ["ab"]),
    (Rules(GBNF), *ITEMS),
    (Rules(LARK), *ITEMS),
    (Triggered(()), ["", "a\n天"], ["[ARGS]"]),
    (
        Triggered(CALL),
        ["", "hello\n天", "<cal", "a<call>1;", "<call>1;a<call>1;", "<ca<call>1;"],
        ["<call>", "<call>2", "x<call>1", "<call>1;<call>"],
    ),
    (Triggered(CALL, least=1), ["a<call>1;", "<call>1;b"], ["", "<call", "<call>2"]),
    (Triggered(CALL, most=1), ["", "a<call>1;"], ["<call>1;b", "<call>1;<call>1;"]),
    (Triggered(TWO), ["", "a[TOOL_CALLS]1<t>2[ARGS]b"], ["[TOOL_CALLS]", "[TOOL_CALLS]2", "<t>2", "[ARGS]"]),
)
"""(grammar, texts that fit, texts that do not)."""

PATTERNS = (r"(ab|a)*b?", r"[a-c]{2,3}\.?", r"^(a|b+)?$", r"[^ab]*", r".*a.b", r"(?i:a|b)+1?", r"a*?b+?")

SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
    {"type": ["string", "null"], "minLength": 1, "maxLength": 2},
    {"enum": [0, "a", None, [1], {"a": 1}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}]},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "array", "maxItems": 0}}},
    {},
)
INSTANCES: tuple[Any, ...] = (
    *(0, -3, 11, 12, -4, 1.5, "", "a", "天", "天气", "abc", '"\n\\', None, True, False, [], [1], [True], [False, True]),
    *([True] * 3, {}, {"a": 1}, {"a": ""}, {"a": "x", "b": [1]}, {"b": 1}, {"a": None}, {"a": []}, {"a": "x", "c": 1}),
)

WRONG: tuple[Grammar, ...] = (Regex("("), Regex("["), g.json({"type": "string", "pattern": "("}), Rules("SELECT *"))
"""What no backend can compile."""


def check_grammar_backend(backend: Any, *, without: Collection[str] = ()) -> None:
    """It lets through what a grammar says and nothing else, in whatever tokens the text comes; knows what must come and
    where an answer ends; and refuses what it cannot compile with a `GrammarError`.

    ``backend``: the class, or its record. ``without``: kinds of grammar it does not compile (``"Rules"``,
    ``"Triggered"``, ...). JSON comes without whitespace and in UTF-8; an object's properties in the schema's order.
    """
    target = resolve(backend)
    held = TextMatcher(target, special=("[TOOL_CALLS]", "[ARGS]", "<t>"), added=("</t>",))
    check = _Check(held, target, {*without})
    check.matchers()
    check.masks()
    check.refusals()
    for grammar, good, bad in CASES:
        if check.can(grammar):
            check.texts(grammar, good, bad, "by what the grammar says")
    if "Regex" not in without:
        check.patterns()
    if "Json" not in without:
        check.schemas()


class _Check:
    def __init__(self, held: TextMatcher, target: Any, without: set[str]) -> None:
        self.held = held
        self.without = without
        self.server = target(None, held.size, [held.eos])  # as the process that checks what clients send has it

    def can(self, grammar: object) -> bool:
        return not {type(part).__name__ for part in _parts(grammar)} & self.without

    def texts(self, grammar: Grammar, good: list[str], bad: list[str], by: str) -> None:
        for backend, where in ((self.held.backend, "with a tokenizer"), (self.server, "without one, to check")):
            try:
                backend.compile(grammar)
            except GrammarError as error:
                raise broken(f"it compiles this kind of grammar {where}", f"grammar: {grammar}", f"{error}") from error
        for text, fits in [*((text, True) for text in good), *((text, False) for text in bad)]:
            if self.held.fits(grammar, text) != fits:
                raise broken(
                    "an answer is let through if and only if the grammar allows it, as a whole",
                    f"grammar: {shown(grammar)}",
                    f"text:    {text!r}",
                    f"{by} it fits; the backend refuses it" if fits else f"{by} it does not fit; it is let through",
                )

    def patterns(self) -> None:
        draw = random.Random(0)
        texts = ["".join(chars) for n in range(4) for chars in itertools.product("ab.", repeat=n)]
        texts += ["".join(draw.choices("abc.A1天\n", k=draw.randint(1, 5))) for _ in range(40)]
        for pattern in PATTERNS:
            matching = [text for text in texts if re.fullmatch(pattern, text)]
            self.texts(Regex(pattern), matching, [text for text in texts if text not in matching], "by Python's re")

    def schemas(self) -> None:
        for schema in SCHEMAS:
            texts = {_compact(value): jsonschema_rs.is_valid(schema, value) for value in INSTANCES}
            good = [text for text, valid in texts.items() if valid]
            bad = [text for text, valid in texts.items() if not valid]
            broken_off = [text[:-1] for text in good if not _is_json(text[:-1])]
            loose = [f" {text}" for text in good]
            loose += {json.dumps(value, ensure_ascii=False) for value in INSTANCES} - texts.keys()
            self.texts(g.json(schema), good, bad + broken_off + loose, "by its JSON Schema, without whitespace,")

    def refusals(self) -> None:
        for grammar in filter(self.can, WRONG):
            for backend in (self.held.backend, self.server):
                try:
                    backend.compile(grammar)
                except GrammarError as error:
                    if not str(error).strip():
                        raise broken("a GrammarError tells the client what is wrong", f"grammar: {grammar}") from error
                except Exception as error:
                    raise broken(
                        "compile raises GrammarError for what it cannot compile",
                        f"grammar: {grammar}",
                        f"it raised {type(error).__name__}: {error}",
                    ) from error
                else:
                    raise broken("compile raises GrammarError for what it cannot compile", f"grammar: {grammar}")

    def matchers(self) -> None:
        grammar = OneOf((Fixed("yes"), Fixed("no")))
        if not self.can(grammar):
            return
        held, where = self.held, f"grammar: {grammar}"
        begun, yes, no = (held.compile(grammar) for _ in range(3))
        before = held.allowed(begun)
        for letter in b"yes":
            if yes.finished() or not yes.accept(letter):
                raise broken(
                    "accept goes on by a token that is allowed", where, f"token {letter} of 'yes'", yes.error()
                )
        if not yes.finished():
            raise broken("a matcher is finished when nothing can follow", where, "after 'yes' it is not")
        if held.allowed(begun) != before or no.finished() or not no.accept(ord("n")):
            raise broken("each compile gives a matcher of its own, at the beginning", where, "another's steps moved it")
        if no.accept(ord("x")):
            raise broken("accept is False for a token that is not allowed", where, "after 'n', the token of 'x'")
        if not no.error():
            raise broken("error says why a matcher cannot go on", where, "after a token that is not allowed it is ''")
        matcher = held.compile(Fixed("abc"))
        matcher.accept(ord("a"))
        forced = matcher.forced()
        if not b"bc".startswith(held.text(forced).encode()):
            raise broken(
                "forced gives tokens that must come next, or none", "grammar: Fixed('abc'), after 'a'", f"{forced}"
            )
        if not all(matcher.accept(token) for token in forced):
            raise broken("what is forced has not been accepted yet, and can be", "grammar: Fixed('abc')", f"{forced}")

    def masks(self) -> None:
        """A row for each matcher, of the model's vocabulary, whatever was in them before."""
        import torch

        from lightllm.testing.grammars import bits

        held = self.held
        words = -(-held.size // 32)
        grammars = [Fixed(text) for text in ("a", "b", "")] * 5
        matchers = [held.compile(grammar) for grammar in grammars]
        masks = torch.full((len(matchers), words), -1, dtype=torch.int32)
        held.backend.fill(matchers, masks)
        for i, (grammar, mask) in enumerate(zip(grammars, masks, strict=True)):
            wanted = [ord(grammar.text)] if grammar.text else [held.eos]
            if bits(mask) != wanted:
                raise broken(
                    "fill sets the bits of the tokens that may come, of the end-of-sequence ids where the answer may "
                    "end, and clears all others",
                    f"grammar: {grammar}, row {i} of {len(masks)}",
                    f"expected: {wanted}",
                    f"found:    {shown(bits(mask))}",
                )


def _parts(grammar: Any) -> Iterator[object]:
    yield grammar
    for part in (
        grammar
        if isinstance(grammar, tuple)
        else map(grammar.__getattribute__, getattr(grammar, "__struct_fields__", ()))
    ):
        yield from _parts(part) if not isinstance(part, str) else ()


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
