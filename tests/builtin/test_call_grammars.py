"""The grammars of tool calls and of thoughts, with the parsers that read what was written by them.

Walks: any way through a grammar, token by token, must be what the same parser takes for calls, thought and content.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from builtin.test_grammar import bug
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from lightllm import CallArguments, CallGrammar, CallIds, CallStart, Event, Reasoning, ReasoningGrammar, Text
from lightllm import grammar as g
from lightllm.chat import merged
from lightllm.grammar import Fixed, Grammar, OneOf, Regex
from lightllm.testing import TextMatcher, check_call_grammar
from lightllm_builtin.reasoning.think import DeepSeekR1Parser, Qwen3Parser, ThinkParser
from lightllm_builtin.tool_parsers.calls import CallParser
from lightllm_builtin.tool_parsers.llama3 import Llama3Parser
from lightllm_builtin.tool_parsers.mistral import MistralParser
from lightllm_builtin.tool_parsers.pythonic import PythonicParser
from lightllm_builtin.tool_parsers.qwen25 import Qwen25Parser

PARSERS = {"qwen25": Qwen25Parser, "llama3": Llama3Parser, "mistral": MistralParser}
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
TOKENIZERS = {
    "tokens": TextMatcher(special=("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"), added=ADDED),
    "text": TextMatcher(),
}
"""Markers are tokens, or text like all other."""

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 20}, "maxItems": 3},
        "unit": {"enum": ["°C", '"F"', None]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {"at": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}, "w": WEATHER},
    "required": ["at"],
}
ODD = '天气.v2+(b|"c")\\'


def tool(name: str, parameters: Any = None, *, strict: bool = False) -> dict[str, Any]:
    function = {"name": name, "strict": strict} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


TOOLS = [tool("weather", WEATHER, strict=True), tool(ODD, NESTED, strict=True), tool("loose", WEATHER), tool("now")]

formats = pytest.mark.parametrize("format", PARSERS)
tokenizers = pytest.mark.parametrize("held", TOKENIZERS.values(), ids=TOKENIZERS)
free = pytest.mark.parametrize("parallel", [True, False])
walks = settings(max_examples=20, deadline=None)


def grammar_of(format: str, tools: Sequence[Any] = TOOLS, *, required: bool = True, parallel: bool = True) -> Grammar:
    parser: CallParser = PARSERS[format](tools)
    assert isinstance(parser, CallGrammar)
    return parser.grammar(required=required, parallel=parallel)


def parse(parser: CallParser | ThinkParser, pieces: Sequence[str]) -> list[Event]:
    return merged([*(event for piece in pieces for event in parser.push(piece)), *parser.close()])


def content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def calls(events: list[Event]) -> list[tuple[str, Any]]:
    names = [event.name for event in events if isinstance(event, CallStart)]
    parts = [[e.fragment for e in events if isinstance(e, CallArguments) and e.index == i] for i in range(len(names))]
    return [(name, json.loads("".join(arguments))) for name, arguments in zip(names, parts, strict=True)]


# --- how the models' own templates write calls


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def answer(format: str, *several: tuple[str, Any]) -> str:
    key = "parameters" if format == "llama3" else "arguments"
    objects = [f'{{"name": {compact(name)}, "{key}": {compact(arguments)}}}' for name, arguments in several]
    if format == "qwen25":
        return "\n".join(f"<tool_call>\n{written}\n</tool_call>" for written in objects)
    return "; ".join(objects) if format == "llama3" else f"[TOOL_CALLS] [{', '.join(objects)}]"


def named(_: str, *several: tuple[str, Any]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{compact(arguments)}" for name, arguments in several)


GOOD = [
    ("weather", {"city": ""}),
    ("weather", {"city": '天"\n\\', "days": [0, 20], "unit": "°C"}),
    (ODD, {"at": {"x": -1.5, "more": [{}]}, "w": {"city": "a"}, "z": None}),
    ("loose", {"city": "}]"}),
    ("now", {}),
]
BAD = [
    ("weathe", {"city": ""}),
    ("weather2", {"city": ""}),
    ("weather", {}),
    ("weather", {"city": 1}),
    ("weather", {"city": "", "days": [21]}),
    ("weather", {"city": "", "more": 1}),
    (ODD, {"at": {}}),
    (ODD.replace(".", "x"), {"at": {"x": 1}}),
    ("now", {"x": 1}),
    ("now", [1]),
    ("now", "{}"),
]
FORMS = [(format, answer) for format in PARSERS] + [("mistral", named)]
forms = pytest.mark.parametrize(("format", "write"), FORMS, ids=[*PARSERS, "mistral, named"])


@tokenizers
@forms
def test_forced_calls(format: str, write: Any, held: TextMatcher) -> None:
    many, single = grammar_of(format), grammar_of(format, parallel=False)
    for call in GOOD:
        text = write(format, call)
        assert held.fits(many, text) and held.fits(single, text), text
        assert calls(parse(PARSERS[format](TOOLS), [text])) == [call]
    for call in BAD:
        assert not held.fits(many, write(format, call)), call
    for several in (GOOD[:2], GOOD[::-1]):
        text = write(format, *several)
        assert held.fits(many, text) and not held.fits(single, text)
        assert calls(parse(PARSERS[format](TOOLS), [text])) == several
    text = write(format, GOOD[0])
    around = ["Ok. " + text, text + " Ok.", text[:-1], "\n" + text, "", "Ok.", "{}", "[]"]
    assert not any(held.fits(many, wrong) for wrong in [*around, write(format, GOOD[0], BAD[0])])


@tokenizers
@forms
def test_calls_that_a_model_is_free_to_make(format: str, write: Any, held: TextMatcher) -> None:
    grammar = grammar_of(format, required=False)
    loose = [("loose", {}), ("loose", {"city": [None], "x": 1}), ("now", {"any": {}})]
    for call in GOOD + loose:
        text = write(format, call)
        for around in (text, f"Let me see.\n{text} Ok?{text}c"):
            assert held.fits(grammar, around), around
    for call in [call for call in BAD[2:] if call[0] in ("weather", ODD)] + [("loose", [1]), ("now", [1])]:
        assert not held.fits(grammar, f"Ok. {write(format, call)}"), call


TEXTS = [
    "",
    "Hi 天\n",
    "{",
    '{"a": 1}',
    '{"name": "other", "parameters": {}}',
    '{"name": "weath',
    "[TOOL_CALLS",
    "[1, {}]",
]
TEXTS += ["<tool_call", "<tool", "<|python_", "a <b> {c} [d]", '"weather"', '{"name"', '{"name": 1}', "{}; {}"]


@tokenizers
@formats
@free
def test_text_without_a_call_is_free(format: str, held: TextMatcher, parallel: bool) -> None:
    grammar = grammar_of(format, required=False, parallel=parallel)
    assert [text for text in TEXTS if not held.fits(grammar, text)] == []
    assert all(parse(PARSERS[format](TOOLS), [text]) == ([Text(text)] if text else []) for text in TEXTS)
    twice = answer(format, GOOD[0]) + answer(format, GOOD[1])
    assert held.fits(grammar, twice) == parallel


@pytest.mark.parametrize(
    ("format", "text", "spelled"),
    [
        bug("llama3", '{"type": 1, "name": "weather", "parameters": {}}', False, why="only where the name is first"),
        bug("llama3", '{"parameters": {}, "name": "weather"}', False, why="the same"),
        ("qwen25", answer("qwen25", ("weather", {})), True),
        ("mistral", named("", ("weather", {})), True),
    ],
)
def test_what_the_parser_takes_for_a_strict_call_is_held_to_its_schema(format: str, text: str, spelled: bool) -> None:
    assert calls(parse(PARSERS[format](TOOLS), [text])) == [("weather", {})]
    assert not TOKENIZERS["tokens"].fits(grammar_of(format, required=False), text, spelled=spelled)


SAID = "parallel_calls", "f-2.0", "^$.*&~#", "天气\\"
HARD = "two words", "[a]{b}"


@pytest.mark.parametrize(
    ("format", "write", "name"),
    [
        *((format, write, name) for format, write in FORMS for name in SAID),
        *((format, answer, name) for format in PARSERS for name in HARD),
        *(bug("mistral", named, name, why="such a name can be written but not read") for name in HARD),
    ],
)
def test_every_name_can_be_called(format: str, write: Any, name: str) -> None:
    for call in ((name, {}), (name, {"a": 1})):
        tools = [tool(name, {"type": "object"})]
        assert TOKENIZERS["tokens"].fits(grammar_of(format, tools), write(format, call))
        assert calls(parse(PARSERS[format](tools), [write(format, call)])) == [call]


KINDS = [
    ({}, 5),
    ({"properties": {"a": {}}}, [1]),
    ({"type": ["object", "array"]}, [1]),
]


@forms
@pytest.mark.parametrize(("parameters", "arguments"), KINDS)
def test_arguments_are_always_an_object(format: str, write: Any, parameters: Any, arguments: Any) -> None:
    grammar = grammar_of(format, [tool("f", parameters)])
    assert TOKENIZERS["tokens"].fits(grammar, write(format, ("f", {})))
    assert not TOKENIZERS["tokens"].fits(grammar, write(format, ("f", arguments)))


# --- keywords of Python

NUMBER, TREE = {"type": "integer"}, {"n": {"type": "integer"}, "c": {"type": "array", "items": {"$ref": "#"}}}
PYTHON = [
    ({"additionalProperties": False}, ["", "x=1"]),
    ({"additionalProperties": NUMBER}, ["", "x=1", 'x="a"', 'x=1, y="a"', "x=1, y=2"]),
    ({"additionalProperties": {"$ref": "#"}, "description": "a tree"}, ["x={}", 'x={"y":{}}', "x=1", 'x={"y":1}']),
    ({"properties": {"a": NUMBER, "b": False}}, ["", "a=1", 'a="x"', "b=1", "a=1, b=1"]),
    ({"properties": {"b": False, "a b": False}}, ["", "b=1"]),
    ({"properties": TREE, "required": ["n"], "additionalProperties": False},
     ['n=1, c=[{"n":1}]', 'n=1, c=[{"n":1,"c":[{"n":2}]}]', "n=1, c=[[]]", "n=1, c=[{}]", 'n=1, c=[{"n":1,"d":1}]']),
    ({"properties": {"a": NUMBER, "b": {"$ref": "#/properties/a"}}, "required": ["b"]}, ["b=1", 'b="a"', "b=1, a=2"]),
    ({"properties": {"a": {"$ref": "#/$defs/s"}}, "$defs": {"s": {"$ref": "#/$defs/n"}, "n": NUMBER}, "$id": "http://a/b"},
     ["a=1", 'a="x"']),
    ({"properties": {"a": {"$ref": "#/properties/a/$defs/s", "$defs": {"s": NUMBER}}}}, ["a=1", 'a="x"']),
    ({"properties": {"a": {"enum": [{"$ref": "#/x"}]}, "enum": {"$ref": "#/properties/a"}}},
     ['a={"$ref":"#/x"}', 'a={"$ref":"#/$defs/arguments/x"}', 'enum={"$ref":"#/x"}', "enum={}"]),
    ({"properties": {"a": {"properties": {"$ref": NUMBER}, "additionalProperties": {"$ref": "#/$defs/s"}}},
      "$defs": {"s": {"type": "string"}}}, ['a={"$ref":1,"x":""}', 'a={"$ref":""}', 'a={"x":1}']),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": {"type": "array", "items": [NUMBER]}}},
     ["a=[1]", 'a=["x"]']),
    ({"required": ["a"]}, None),
    ({"properties": {"a": NUMBER}, "required": ["a", "b"]}, None),
    ({"properties": {"a": NUMBER}, "dependentRequired": {"a": ["b"]}}, None),
    ({"properties": {"a": NUMBER}, "dependentSchemas": {"a": {"required": ["b"]}}}, None),
    ({"properties": {"a": NUMBER}, "dependencies": {"a": ["b"]}}, None),
    ({"properties": {"a": NUMBER}, "propertyNames": {"pattern": "^x"}}, None),
    ({"properties": {"a": NUMBER}, "unevaluatedProperties": NUMBER}, None),
    ({"propertyNames": {"maxLength": 1}}, None),
    ({"maxProperties": 1}, None),
]  # fmt: skip
"""What a schema says beside its type, and keyword arguments; None where the schema cannot be kept to."""


@pytest.mark.parametrize(("schema", "several"), PYTHON, ids=lambda value: json.dumps(value)[:80])
def test_python_calls_keep_to_their_schema(schema: dict[str, Any], several: list[str] | None) -> None:
    schema = {"type": "object", **schema}
    parser = PythonicParser([tool("f", schema)])
    if several is None:
        with pytest.raises(g.GrammarError, match=r"^f: "):
            parser.grammar(required=True, parallel=False)
        return
    grammar = parser.grammar(required=True, parallel=False)
    valid = validator_for(schema, Draft202012Validator)(schema).is_valid
    for written in several:
        call = ast.parse(f"f({written})", mode="eval").body
        assert isinstance(call, ast.Call)
        instance = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert TOKENIZERS["text"].fits(grammar, f"[f({written})]") == valid(instance), written


def test_mistrals_ids_are_nine_letters_and_digits() -> None:
    parser = MistralParser(TOOLS)
    assert isinstance(parser, CallIds)
    ids = {parser.call_id() for _ in range(50)}
    assert len(ids) == 50 and all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)


# --- walks


def walk(data: st.DataObject, held: TextMatcher, grammar: Grammar, hints: Sequence[str] = ()) -> str:
    return held.walk(grammar, data.draw(st.randoms(use_true_random=True)), hints=hints)


def read(data: st.DataObject, format: str, text: str) -> list[Event]:
    """What the parser makes of it, in whatever pieces it comes."""
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    events = parse(PARSERS[format](TOOLS), [text])
    assert parse(PARSERS[format](TOOLS), pieces) == parse(PARSERS[format](TOOLS), list(text)) == events
    return events


def check_strict_calls(events: list[Event]) -> int:
    """How many there are, each of a strict tool being as its schema says."""
    declared = {tool["function"]["name"]: tool["function"] for tool in TOOLS}
    for name, arguments in calls(events):
        assert isinstance(arguments, dict)
        if declared[name]["strict"]:
            Draft202012Validator(declared[name].get("parameters", {"maxProperties": 0})).validate(arguments)
    return len(calls(events))


@formats
def test_whatever_is_written_when_calls_are_forced_is_calls_that_are_read(format: str) -> None:
    check_call_grammar(PARSERS[format], TOOLS)


@tokenizers
@formats
@free
@walks
@given(data=st.data())
def test_whatever_is_written_freely_is_text_and_calls_that_keep_to_strict_schemas(
    format: str, held: TextMatcher, parallel: bool, data: st.DataObject
) -> None:
    begun = [answer(format, (name, {})).partition(": {}")[0] + ": " for name in ("weather", ODD, "loose")]
    begun += ["[TOOL_CALLS]now[ARGS]{", "Hi", *TEXTS[2:8]]
    text = walk(data, held, grammar_of(format, required=False, parallel=parallel), begun)
    events = read(data, format, text)
    made = check_strict_calls(events)
    assert parallel or made <= 1
    if not made:
        assert content(events) == text


# --- thoughts

OPEN, TAKEN, FREE = ["assistant\n<think>\n", "<｜Assistant｜><think>\nSo"], "<｜Assistant｜>", "assistant\n"
SKIPPED = ["assistant\n<think>\n\n</think>\n\n", "<｜Assistant｜></think>"]
ANSWERED = ["assistant\n<think>\nHm.\n</think>\nWell, ", "<｜Assistant｜></think>Well, "]
THOUGHT = ["Hm.\n</think>\n\n", "</think>", "a <think </thin b\n\n\n</think>\n", " 天 yes {} </think>"]
BOTH = [*(f"<think>{thought}" for thought in THOUGHT), ""]
PROMPTS = [
    *((Qwen3Parser, prompt, THOUGHT, BOTH) for prompt in OPEN),
    *((DeepSeekR1Parser, prompt, THOUGHT, BOTH) for prompt in (*OPEN, TAKEN)),
    *((Qwen3Parser, prompt, BOTH, THOUGHT) for prompt in (FREE, *SKIPPED)),
    (DeepSeekR1Parser, SKIPPED[1], BOTH, THOUGHT),
    *((kind, prompt, [""], THOUGHT + BOTH[:-1]) for kind in (Qwen3Parser, DeepSeekR1Parser) for prompt in ANSWERED),
]
ANSWERS = [(OneOf((Fixed("yes"), Fixed("no"))), "yes"), (g.json(WEATHER), '{"city":"</t"}'), (Regex("a+\\s"), "aa\n")]


@tokenizers
@pytest.mark.parametrize(("kind", "prompt", "good", "bad"), PROMPTS)
def test_thoughts_and_answers(
    kind: type[ThinkParser], prompt: str, good: list[str], bad: list[str], held: TextMatcher
) -> None:
    for grammar, text in ANSWERS:
        parser = kind(prompt)
        assert isinstance(parser, ReasoningGrammar)
        whole = parser.grammar(grammar)
        for thought in good:
            assert held.fits(whole, thought + text), thought
            assert not any(held.fits(whole, wrong) for wrong in (thought, f"{thought}x{text}."))
            assert content(parse(kind(prompt), [thought + text])) == text
        if prompt == TAKEN:
            continue  # it may be opened all the same
        # where markers are text, a second <think> is thought, too
        assert not any(
            held.fits(whole, thought + text) for thought in bad if held is TOKENIZERS["tokens"] or not thought
        )


@pytest.mark.parametrize("held", TOKENIZERS.values())
def test_a_thought_taken_for_granted_may_still_be_opened(held: TextMatcher) -> None:
    assert held.fits(DeepSeekR1Parser(TAKEN).grammar(Fixed("yes")), "<think>\nHm.\n</think>\n\nyes")


bits = st.sampled_from(["<think", "</think", "</", "<", "a", "天", " ", "\n", "{", "\t", "yes"])


@tokenizers
@walks
@given(data=st.data(), thought=st.lists(bits, max_size=12).map("".join), breaks=st.integers(0, 2))
def test_any_thought_may_come_before_any_answer(
    held: TextMatcher, data: st.DataObject, thought: str, breaks: int
) -> None:
    kind, prompt, good, _ = data.draw(st.sampled_from([case for case in PROMPTS if case[2] != [""]]))
    calling = grammar_of("qwen25", TOOLS[:2])
    text = walk(data, held, calling)
    opened = "" if good is THOUGHT else "<think>"
    whole = f"{opened}{thought}</think>{breaks * chr(10)}{text}"
    assert held.fits(kind(prompt).grammar(calling), whole)
    events = parse(kind(prompt), list(whole))
    assert content(events) == text
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    assert reasoning.strip() == thought.strip()
