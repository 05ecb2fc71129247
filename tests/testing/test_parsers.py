"""The kit's law of parsers: one parser obeys it, and of others each breaks one rule, which is named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from lightllm import CallArguments, CallStart, Reasoning, Text, ToolParserRecord
from lightllm.grammar import Fixed, Grammar, Joined, Marker, OneOf, Regex, Repeated, Rules, Trigger, Triggered
from lightllm.grammar import json as schema_of
from lightllm.testing import check_call_grammar, check_reasoning_parser, check_tool_parser

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
TEXT = 'Let me <see>.<call>weather:{"city": "Rome"}</call> and <call>now:{}</call>.'
SAID: dict[str, Any] = {"content": "Let me <see>. and .", "calls": [("weather", {"city": "Rome"}), ("now", "{}")]}
ONLY = '<call>weather:{"city": "Rome"}</call><call>now:{}</call>'


class Good:
    """Reads ``<call>name:arguments</call>``. Waits for the whole of a call."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tools = tools
        self.rest = ""
        self.calls = 0

    def push(self, text: str) -> Iterator[Any]:
        self.rest += text
        while found := re.search(r"<call>(\w+):(.*?)</call>", self.rest, re.DOTALL):
            yield Text(self.rest[: found.start()])
            yield CallStart(self.calls, found[1])
            yield CallArguments(self.calls, found[2])
            self.calls += 1
            self.rest = self.rest[found.end() :]
        held = self.held()
        yield Text(self.rest[: len(self.rest) - held])
        self.rest = self.rest[len(self.rest) - held :]

    def held(self) -> int:
        """How many of the last characters may belong to a call."""
        if (at := self.rest.find("<call>")) >= 0:
            return len(self.rest) - at
        return max((n for n in range(1, 6) if self.rest.endswith("<call>"[:n])), default=0)

    def close(self) -> list[Any]:
        return [Text(self.rest)]


class Forced(Good):
    def call(self, tool: Mapping[str, Any], required: bool) -> Grammar:
        function = tool["function"]
        bound = required or function.get("strict")
        schema = function.get("parameters", {"maxProperties": 0}) if bound else {}
        return Joined((Fixed(f"{function['name']}:"), schema_of({"type": "object"} | schema)))

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        end = Marker("</call>")
        calls = Joined((OneOf(tuple(self.call(tool, required) for tool in self.tools)), end))
        if required:
            return Repeated(Joined((Marker("<call>"), calls)), 1, None if parallel else 1)
        return Triggered((Trigger(Marker("<call>"), calls),), most=None if parallel else 1)


def broken(check: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(AssertionError, match=r"^this rule is broken: ") as failure:
        check(*arguments, **keywords)
    return str(failure.value)


@pytest.mark.parametrize("parser", [Good, Forced, lambda tools: Good(tools)])
def test_a_parser_that_obeys_passes(parser: Any) -> None:
    check_tool_parser(parser, TEXT, tools=TOOLS, **SAID)
    check_tool_parser(parser, ONLY, tools=TOOLS, calls=SAID["calls"])
    check_tool_parser(parser, "", tools=TOOLS)
    check_tool_parser(parser, "<call>weather:{", tools=TOOLS, content="<call>weather:{")
    check_tool_parser(parser, "x" * 3000 + TEXT, tools=TOOLS, **SAID | {"content": "x" * 3000 + SAID["content"]})


def test_a_record_stands_for_its_parser() -> None:
    check_tool_parser(ToolParserRecord(name="good", target=f"{__name__}:Good"), TEXT, tools=TOOLS, **SAID)


class Hasty(Good):
    def held(self) -> int:
        return super().held() if "<call>" in self.rest else 0


class Sloppy(Good):
    """Looks at each piece for itself."""

    def push(self, text: str) -> Iterator[Any]:
        yield Text(text.strip())


class Sharing(Good):
    seen: ClassVar[list[str]] = []

    def push(self, text: str) -> Iterator[Any]:
        yield Text("again " * len(self.seen))
        self.seen.append(text)
        yield from super().push(text)


class FromOne(Good):
    def __init__(self, tools: Any) -> None:
        super().__init__(tools)
        self.calls = 1


class Reversed(Good):
    def push(self, text: str) -> list[Any]:
        return list(super().push(text))[::-1]


class Raising(Good):
    def push(self, text: str) -> Iterator[Any]:
        if "<" in text[1:]:
            raise ValueError("no tag here")
        yield from super().push(text)


class Silent(Good):
    def close(self) -> None:  # type: ignore[override]
        return None


class Strings(Good):
    def close(self) -> list[Any]:
        return [self.rest]


class Numbers(Good):
    def close(self) -> list[Any]:
        return [Text(None)]  # type: ignore[arg-type]


class Nameless(Good):
    def push(self, text: str) -> Iterator[Any]:
        for event in super().push(text):
            yield CallStart(event.index, "") if isinstance(event, CallStart) else event


class Careless(Good):
    """Cannot stand the end of a text amid a call."""

    def close(self) -> list[Any]:
        return [Text(self.rest)] if "<call>" not in self.rest else [Text("?"), *json.loads(self.rest)]


@pytest.mark.parametrize(
    ("parser", "rule"),
    [
        (Hasty, "every way of cutting the text gives the same events when joined"),
        (Sloppy, "every way of cutting the text gives the same events when joined"),
        (Sharing, "each new one begins anew"),
        (FromOne, "calls are counted from 0"),
        (Reversed, "CallStart comes before its CallArguments"),
        (Raising, "push and close take any text and answer with events; they do not raise"),
        (Silent, "push and close take any text and answer with events"),
        (Strings, "are of the types Text, CallStart, CallArguments"),
        (Numbers, "fields are of their types"),
        (Nameless, "a call has a name"),
        (Careless, "push and close take any text and answer with events; they do not raise"),
    ],
)
def test_a_parser_that_breaks_a_rule_is_told_which(parser: Any, rule: str) -> None:
    if parser is Sloppy:
        assert rule in broken(check_tool_parser, parser, "one two", content="one two")
    else:
        assert rule in broken(check_tool_parser, parser, TEXT, tools=TOOLS, **SAID)


def test_what_cannot_be_taken_back_is_shown_with_the_push_that_gave_it() -> None:
    message = broken(check_tool_parser, Hasty, ONLY, tools=TOOLS, calls=SAID["calls"])
    assert "pushed as ['<', 'call>" in message
    assert "the two part with the push of '<', which gave [Text(text='<')]" in message
    assert "cannot be taken back" in message


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"content": "Let me see."}, "the content"),
        ({"calls": SAID["calls"][:1]}, "the names of the calls"),
        ({"calls": [("weather", {"city": "Oslo"}), ("now", "{}")]}, "the arguments of weather"),
        ({"calls": [("weather", '{"city":"Rome"}'), ("now", "{}")]}, "the arguments of weather, as text"),
    ],
)
def test_what_is_not_in_the_text_is_named(said: dict[str, Any], what: str) -> None:
    message = broken(check_tool_parser, Good, TEXT, tools=TOOLS, **SAID | said)
    assert f"finds in the text what is in it; here: {what}\n" in message
    assert "expected: " in message and "found:    " in message


def test_arguments_that_are_no_json_are_named() -> None:
    message = broken(check_tool_parser, Good, "<call>now:{</call>", tools=TOOLS, calls=[("now", {})])
    assert "the arguments of a whole call are JSON" in message


# --- grammars


def test_a_grammar_of_what_the_parser_reads_passes() -> None:
    check_call_grammar(Forced, TOOLS)
    strict = {"type": "function", "function": {"name": "strict", "strict": True, "parameters": CITY}}
    check_call_grammar(Forced, [*TOOLS, strict])


class Plain(Good):
    """Reads ``<call>weather:<city>Rome</city></call>``: an argument as it is, in no quotes."""

    end = "</city>"

    def push(self, text: str) -> Iterator[Any]:
        for event in super().push(text):
            if isinstance(event, CallArguments):
                city = event.fragment.removeprefix("<city>").removesuffix(self.end)
                yield CallArguments(event.index, json.dumps({"city": city}))
            else:
                yield event

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        call = Joined((Fixed("weather:<city>"), Regex("[^<]*"), Fixed(self.end), Marker("</call>")))
        if required:
            return Repeated(Joined((Marker("<call>"), call)), 1, None if parallel else 1)
        return Triggered((Trigger(Marker("<call>"), call),), most=None if parallel else 1)


class InOnePattern(Plain):
    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        pattern = Regex("<call>weather:<city>[^<]*</city></call>")
        if required:
            return Repeated(pattern, 1, None if parallel else 1)
        return super().grammar(required=required, parallel=parallel)


class Endless(Plain):
    """What llguidance reads for its pattern takes the beginning of the end, too."""

    end = "\n</city>"


@pytest.mark.parametrize("parser", [Plain, InOnePattern])
def test_arguments_that_are_free_text_come_to_an_end(parser: Any) -> None:
    check_call_grammar(parser, TOOLS[:1])


class Loose(Forced):
    def call(self, tool: Any, required: bool) -> Grammar:
        return super().call(tool, False)


class Chatty(Forced):
    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        return Joined((Regex("(Ok\\.)?"), super().grammar(required=required, parallel=parallel)))


class Optional(Forced):
    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        return super().grammar(required=False, parallel=parallel)


class Unfree(Forced):
    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        return super().grammar(required=True, parallel=parallel)


class Many(Forced):
    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        return super().grammar(required=required, parallel=True)


class Wrong(Forced):
    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        return Rules("SELECT *")


class Others(Forced):
    def call(self, tool: Any, required: bool) -> Grammar:
        return OneOf((super().call(tool, required), Fixed("launch:{}")))


class Unread(Forced):
    """Its grammar writes a space that its parser does not know."""

    def call(self, tool: Any, required: bool) -> Grammar:
        return Joined((Fixed(" "), super().call(tool, required)))


@pytest.mark.parametrize(
    ("parser", "rule"),
    [
        (Good, "has a method grammar(*, required, parallel)"),
        (Loose, "a grammar allows the arguments that the tool's schema allows"),
        (Chatty, "grammar(required=True) allows nothing but what the parser reads as calls"),
        (Optional, "grammar(required=True) allows nothing but calls"),
        (Unfree, "grammar(required=False) allows any text"),
        (Many, "grammar(parallel=False) allows one call at most"),
        (Wrong, "a parser's grammar compiles with llguidance"),
        (Endless, "wherever a grammar leads, the texts and characters it names lead to its end"),
        (Others, "a grammar allows calls to the parser's tools only"),
        (Unread, "grammar(required=True) allows nothing but what the parser reads as calls"),
    ],
)
def test_a_grammar_that_breaks_a_rule_is_told_which(parser: Any, rule: str) -> None:
    assert rule in broken(check_call_grammar, parser, TOOLS)


def test_a_text_of_calls_is_one_that_the_grammar_allows() -> None:
    message = broken(check_tool_parser, Unread, ONLY, tools=TOOLS, calls=SAID["calls"])
    assert "a parser's grammar allows what the parser reads (grammar=False: not this text)" in message
    check_tool_parser(Unread, ONLY, tools=TOOLS, calls=SAID["calls"], grammar=False)
    # what its schema forbids, the grammar need not allow
    check_tool_parser(Forced, "<call>weather:{}</call>", tools=TOOLS, calls=[("weather", {})])


# --- reasoning


class Thinks:
    """Thought up to ``</t>``, unless the prompt ends it."""

    def __init__(self, prompt: str) -> None:
        self.thinks = not prompt.endswith("</t>")
        self.rest = ""

    def push(self, text: str) -> Iterator[Any]:
        self.rest += text
        if self.thinks and "</t>" in self.rest:
            thought, _, self.rest = self.rest.partition("</t>")
            yield Reasoning(thought)
            self.thinks = False
        held = self.held() if self.thinks else 0
        whole, self.rest = self.rest[: len(self.rest) - held], self.rest[len(self.rest) - held :]
        yield Reasoning(whole) if self.thinks else Text(whole)

    def held(self) -> int:
        return max((n for n in range(1, 4) if self.rest.endswith("</t>"[:n])), default=0)

    def close(self) -> list[Any]:
        return [Reasoning(self.rest) if self.thinks else Text(self.rest)]

    def grammar(self, answer: Grammar) -> Grammar:
        return Triggered((Trigger(Marker("</t>"), answer),), least=1, most=1) if self.thinks else answer


class Impatient(Thinks):
    def held(self) -> int:
        return 0


class Calling(Thinks):
    def close(self) -> list[Any]:
        return [CallStart(0, "f")]


class Thoughtless(Thinks):
    def grammar(self, answer: Grammar) -> Grammar:
        return answer


THOUGHT = "a < b </t>Yes </t>"


def test_a_reasoning_parser_that_obeys_passes() -> None:
    check_reasoning_parser(Thinks, THOUGHT, reasoning="a < b ", content="Yes </t>")
    check_reasoning_parser(Thinks, "Yes", prompt="Hm.</t>", content="Yes")
    check_reasoning_parser(Thinks, "Hm. </", reasoning="Hm. </")


@pytest.mark.parametrize(
    ("parser", "rule"),
    [
        (Impatient, "every way of cutting the text gives the same events when joined"),
        (Calling, "are of the types Text, Reasoning"),
        (Thoughtless, "a parser's grammar allows what the parser reads"),
    ],
)
def test_a_reasoning_parser_that_breaks_a_rule_is_told_which(parser: Any, rule: str) -> None:
    assert rule in broken(check_reasoning_parser, parser, THOUGHT, reasoning="a < b ", content="Yes </t>")


def test_a_wrong_split_is_named() -> None:
    assert "here: the reasoning" in broken(check_reasoning_parser, Thinks, THOUGHT, reasoning="a", content="Yes </t>")
