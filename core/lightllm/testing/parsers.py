"""The law of parsers: every way of cutting the text into pushes gives the same events when joined."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations, pairwise
from math import comb
from typing import Any

from lightllm.chat import REASONING_EVENTS, TOOL_EVENTS, broken_rule, merged
from lightllm.checks import INTERRUPTS
from lightllm.interfaces import (
    CallArguments,
    CallGrammar,
    CallStart,
    Event,
    Reasoning,
    ReasoningGrammar,
    ReasoningParser,
    Text,
    ToolParser,
)
from lightllm.testing.rules import broken, resolve, shown

Make = Callable[[], ToolParser | ReasoningParser]
Call = tuple[str, str | Mapping[str, Any]]

PUSHED = 100_000
"""Characters that are pushed in all for one kind of cutting, where there are so many ways to cut."""

FEWEST = 30
"""Ways of cutting that are tried of a kind, however long the text."""


def check_tool_parser(
    parser: Any,
    text: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    content: str = "",
    calls: Sequence[Call] = (),
    grammar: bool = True,
) -> None:
    """Of ``text`` the parser makes ``content`` and ``calls``, however the text is cut and wherever it ends.

    ``parser``: the class, its record, or anything called with the tools. ``calls``: (name, arguments), the arguments a
    dict, compared as JSON, or a str, compared as text. If the parser is a `CallGrammar` and the text is only calls that
    their tools' schemas allow, its grammar must allow it, too, with the arguments written without whitespace;
    ``grammar=False`` for what models write and the grammar need not.
    """
    target = resolve(parser)

    def make() -> ToolParser:
        made: ToolParser = target(tools)
        return made

    events = _obey(make, TOOL_EVENTS, text)
    _expect("content", text, events, content, _joined(events, Text))
    found = calls_of(events)
    _expect("names of the calls", text, events, [name for name, _ in calls], [name for name, _ in found])
    for (name, wanted), (_, written) in zip(calls, found, strict=True):
        if isinstance(wanted, str):
            _expect(f"arguments of {name}, as text", text, events, wanted, written)
        else:
            _expect(f"arguments of {name}", text, events, dict(wanted), _parsed(text, name, written))
    if grammar and found and not content and isinstance(make(), CallGrammar):
        from lightllm.testing.call_grammars import check_text_is_allowed

        check_text_is_allowed(make(), tools, text, found)


def check_reasoning_parser(
    parser: Any, text: str, *, prompt: str = "", reasoning: str = "", content: str = "", grammar: bool = True
) -> None:
    """Of ``text``, the answer to ``prompt``, the parser makes ``reasoning`` and ``content``, however the text is cut
    and wherever it ends.

    If the parser is a `ReasoningGrammar` and there is content, the grammar it makes for just this content must allow
    the text, too; ``grammar=False`` for what models write and the grammar need not.
    """
    target = resolve(parser)

    def make() -> ReasoningParser:
        made: ReasoningParser = target(prompt)
        return made

    events = _obey(make, REASONING_EVENTS, text)
    _expect("reasoning", text, events, reasoning, _joined(events, Reasoning))
    _expect("content", text, events, content, _joined(events, Text))
    if grammar and content and isinstance(made := make(), ReasoningGrammar):
        from lightllm.testing.call_grammars import check_thought_is_allowed

        check_thought_is_allowed(made, text, content)


def calls_of(events: Sequence[Event]) -> list[tuple[str, str]]:
    """(name, arguments as written) of each call."""
    names = [event.name for event in events if isinstance(event, CallStart)]
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] += event.fragment
    return list(zip(names, arguments, strict=True))


def read(make: Make, allowed: tuple[type, ...], pieces: Sequence[str]) -> list[list[Event]]:
    """The events of each push and, last, of close. Raises AssertionError where they are not what a parser may say."""
    try:
        parser = make()
    except INTERRUPTS:
        raise
    except BaseException as error:
        raise broken("a parser can be made", f"it raised {type(error).__name__}: {error}") from error
    told: list[list[Event]] = []
    started = 0
    for piece in [*pieces, None]:
        try:
            events: list[Any] = list(parser.close() if piece is None else parser.push(piece))
        except INTERRUPTS:
            raise
        except BaseException as error:
            rule = "push and close take any text and answer with events; they do not raise"
            raise broken(rule, f"{_where(pieces, piece)} raised {type(error).__name__}: {error}") from error
        for event in events:
            if fault := broken_rule(event, allowed, started):
                raise broken(fault, f"{_where(pieces, piece)} gave {shown(event)}")
            started += isinstance(event, CallStart)
        told.append(events)
    return told


def joined(make: Make, allowed: tuple[type, ...], pieces: Sequence[str]) -> list[Event]:
    """All events of these pushes."""
    return merged(chain(*read(make, allowed, pieces)))


def _where(pieces: Sequence[str], piece: str | None) -> str:
    what = "close()" if piece is None else f"push({shown(piece, 80)})"
    return f"text pushed {how(pieces)}: {what}"


def _obey(make: Make, allowed: tuple[type, ...], text: str) -> list[Event]:
    """The joined events, which are the same for all cuttings."""
    whole = joined(make, allowed, [text])
    again = joined(make, allowed, [text])
    if again != whole:
        raise broken(
            "a parser keeps its state to itself: each new one begins anew",
            f"text: {shown(text)}",
            f"the first parser gave:  {shown(whole)}",
            f"the second parser gave: {shown(again)}",
        )
    for pieces in cuttings(text):
        _same(make, allowed, pieces, whole)
    for end in _some(range(len(text)), len(text), random.Random(text)):
        # cut off by max_tokens or a stop sequence
        part = text[:end]
        _same(make, allowed, list(part), joined(make, allowed, [part]))
    return whole


def _same(make: Make, allowed: tuple[type, ...], pieces: Sequence[str], whole: list[Event]) -> None:
    told = read(make, allowed, pieces)
    found = merged(chain(*told))
    if found == whole:
        return
    facts = [
        f"text: {shown(''.join(pieces))}",
        f"pushed whole gave: {shown(whole)}",
        f"pushed {how(pieces)} gave: {shown(found)}",
    ]
    emitted: list[Event] = []
    for piece, events in zip(pieces, told, strict=False):
        emitted = merged([*emitted, *events])
        if not _begins(emitted, whole):
            facts.append(f"the two part with the push of {shown(piece, 80)}, which gave {shown(events)}")
            facts.append(
                "what has been emitted cannot be taken back: hold back what later text may make part of a call"
            )
            break
    raise broken("every way of cutting the text gives the same events when joined", *facts)


def _begins(part: Sequence[Event], whole: Sequence[Event]) -> bool:
    """Whether ``whole`` can still come of it."""
    if not part:
        return True
    last = part[-1]
    if len(part) > len(whole) or list(part[:-1]) != list(whole[: len(part) - 1]):
        return False
    same = whole[len(part) - 1]
    if isinstance(last, CallStart) or type(last) is not type(same):
        return last == same
    return _text_of(same).startswith(_text_of(last)) and getattr(last, "index", 0) == getattr(same, "index", 0)


def _text_of(event: Any) -> str:
    text: str = event.fragment if isinstance(event, CallArguments) else event.text
    return text


def cuttings(text: str) -> Iterator[list[str]]:
    """Ways to cut a text: in two and in three, into pieces of every size, at random; all of them for short texts."""
    length, draw = len(text), random.Random(text)
    for at in _some(range(1, length), length, draw):
        yield [text[:at], text[at:]]
    yield ["", text, ""]
    for size in _some(range(1, length // 2 + 1), length, draw):
        yield [text[i : i + size] for i in range(0, length, size)]
    pairs = comb(max(length - 1, 0), 2)
    if pairs <= _most(length):
        ends = list(combinations(range(1, length), 2))
    else:
        ends = [(min(pair), max(pair)) for pair in (draw.sample(range(1, length), 2) for _ in range(_most(length)))]
    for first, second in ends:
        yield [text[:first], text[first:second], text[second:]]
    for _ in range(FEWEST if length > 3 else 0):
        marks = draw.choices(range(length + 1), k=draw.randint(3, min(length, 40)))
        yield pieces_at(text, marks)


def pieces_at(text: str, marks: Sequence[int]) -> list[str]:
    """The text cut at these places."""
    return [text[start:end] for start, end in pairwise([0, *sorted(marks), len(text)])]


def _most(length: int) -> int:
    return max(FEWEST, PUSHED // max(length, 1))


def _some(values: range, length: int, draw: random.Random) -> Sequence[int]:
    """All of them, or as many as there is time for."""
    most = _most(length)
    return values if len(values) <= most else sorted({*values[: most // 4], *draw.sample(values, most), values[-1]})


def how(pieces: Sequence[str]) -> str:
    if len(pieces) == 1:
        return "whole"
    if all(len(piece) == 1 for piece in pieces):
        return "one character at a time"
    return f"as {shown(list(pieces))}"


def _joined(events: Sequence[Event], kind: type[Text] | type[Reasoning]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def _parsed(text: str, name: str, written: str) -> Any:
    try:
        return json.loads(written)
    except ValueError as error:
        raise broken(
            "the arguments of a whole call are JSON",
            f"text: {shown(text)}",
            f"arguments of {name}: {shown(written)}",
            f"{error}",
        ) from None


def _expect(what: str, text: str, events: Sequence[Event], wanted: object, found: object) -> None:
    if wanted != found:
        raise broken(
            f"the parser finds in the text what is in it; here: the {what}",
            f"text:     {shown(text)}",
            f"expected: {shown(wanted)}",
            f"found:    {shown(found)}",
            f"events:   {shown(events)}",
        )
