"""The built-in tool-call parsers: a table of hard answers, and properties that hold for any text and any cutting."""

from __future__ import annotations

import ast
import importlib
import json
import warnings
from contextlib import suppress
from itertools import accumulate

import pytest
from builtin.tool_cases import CASES, DECLARED, PARIS, Case
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightllm import CallArguments, CallStart, Event, Text
from lightllm.chat import merged
from lightllm.testing import check_tool_parser
from lightllm.testing.parsers import calls_of, joined, pieces_at
from lightllm_builtin.tool_parsers import lightllm_tool_parsers
from lightllm_builtin.tool_parsers.llama3 import Llama3Parser
from lightllm_builtin.tool_parsers.mistral import MistralParser
from lightllm_builtin.tool_parsers.pythonic import PythonicParser
from lightllm_builtin.tool_parsers.qwen25 import Qwen25Parser

PARSERS = {"qwen25": Qwen25Parser, "llama3": Llama3Parser, "mistral": MistralParser, "pythonic": PythonicParser}
TOOLS = [{"type": "function", "function": {"name": name}} for name in DECLARED]

formats = pytest.mark.parametrize("format", PARSERS)
deep = settings(max_examples=150, deadline=None)


def parse(format: str, pieces: list[str]) -> list[Event]:
    return joined(lambda: PARSERS[format](TOOLS), (Text, CallStart, CallArguments), pieces)


def cut(text: str, sizes: list[int]) -> list[str]:
    """The text in pieces of these sizes, the last one as long as it takes."""
    return pieces_at(text, [min(end, len(text)) for end in accumulate(sizes)])


def content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


# --- the table


@pytest.mark.parametrize(
    ("format", "case"),
    [pytest.param(format, case, id=f"{format}: {case.why}") for format, cases in CASES.items() for case in cases],
)
def test_hard_answers(format: str, case: Case) -> None:
    # models write what no grammar would let them
    said = {"content": case.content, "calls": case.calls}
    check_tool_parser(PARSERS[format], case.text, tools=TOOLS, **said, grammar=False)
    for _, arguments in case.calls:
        with suppress(ValueError, RecursionError):  # a malformed call's, a deep one's
            assert isinstance(json.loads(arguments, strict=False), dict)


@pytest.mark.parametrize("format", CASES)
def test_no_hard_answer_is_there_twice(format: str) -> None:
    texts = [case.text for case in CASES[format]]
    assert len(set(texts)) == len(texts)


# --- any text

JSON_BITS = [
    *'{}[]",:;\\ \n<',
    '{"name": "search", "arguments": {"q": "x"}}',
    '{"name": "launch", "parameters": {"q": 1}}',
    '{"name":',
    '"search"',
    '"launch"',
    '"arguments":',
    '"parameters":',
    '"id": 1',
    "null",
    '\\"',
    '"{\\"a\\": 1}"',
    "天气",
    "😀",
    "a",
    "-1.5",
    "\t",
    "\r",
]
MARKERS = {
    "qwen25": ["<tool_call>", "</tool_call>", "<tool_", "call>"],
    "llama3": ["<|python_tag|>", "<|python_", "tag|>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL_", "CALLS]", "search", "launch"],
    "pythonic": [
        *("[search(", "[launch(", "search(", "q='x'", "=", "(", ")", "'", "<|python_start|>", "<|python_end|>"),
        *("'''", '"""', "r'", "+", "#"),
    ],
}


def texts(format: str) -> st.SearchStrategy[str]:
    bits = st.sampled_from(MARKERS[format]) | st.sampled_from(JSON_BITS)
    return st.lists(bits, max_size=40).map("".join)


@formats
@deep
@given(data=st.data())
def test_every_cutting_gives_the_same_events(format: str, data: st.DataObject) -> None:
    text = data.draw(texts(format))
    sizes = data.draw(st.lists(st.integers(0, 12), max_size=60))
    assert parse(format, cut(text, sizes)) == parse(format, [text]) == parse(format, list(text))


@formats
@deep
@given(data=st.data())
def test_without_a_call_the_content_is_the_text(format: str, data: st.DataObject) -> None:
    text = data.draw(texts(format) | st.text(max_size=60))
    events = parse(format, [text])
    if not calls_of(events):
        assert events == ([Text(text)] if text else [])


@formats
@deep
@given(data=st.data())
def test_content_comes_out_in_order_and_unchanged(format: str, data: st.DataObject) -> None:
    text = data.draw(texts(format))
    position = 0
    for event in parse(format, [text]):
        if isinstance(event, Text):
            position = text.index(event.text, position) + len(event.text)


@formats
@deep
@given(data=st.data())
def test_without_tools_all_is_content(format: str, data: st.DataObject) -> None:
    text = data.draw(texts(format))
    parser = PARSERS[format]([])
    assert merged([*parser.push(text), *parser.close()]) == ([Text(text)] if text else [])


# --- any well-formed answer

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(DECLARED)
spaces = st.text(" \n\t\r", max_size=3)
words = st.text("ab .,:天😀\n", min_size=1, max_size=8).map(str.strip).filter(bool)


@st.composite
def json_calls(draw: st.DrawFn, arguments_key: str) -> tuple[str, str, str]:
    """(a call's object, its name, its arguments as written)."""
    name = draw(names)
    options = {"ensure_ascii": draw(st.booleans()), "indent": draw(st.sampled_from([None, 0, 2]))}
    arguments = json.dumps(draw(st.dictionaries(st.text(max_size=5), values, max_size=3)), **options)
    others = draw(st.dictionaries(st.text(max_size=5).map("x".__add__), values, max_size=2))
    members = [f'"name":{draw(spaces)}{json.dumps(name)}', f'"{arguments_key}":{draw(spaces)}{arguments}']
    members += [f"{json.dumps(key)}: {json.dumps(value, **options)}" for key, value in others.items()]
    inner = f"{draw(spaces)},{draw(spaces)}".join(draw(st.permutations(members)))
    return f"{{{draw(spaces)}{inner}{draw(spaces)}}}", name, arguments


@st.composite
def answers(draw: st.DrawFn, format: str) -> tuple[str, str, list[tuple[str, str]]]:
    """(an answer, its content, its calls)."""
    text = kept = ""
    expected = []
    after_call = False
    for _ in range(draw(st.integers(1, 5))):
        space = draw(spaces)
        if draw(st.booleans()):
            written = draw(words)
            kept += space + written
            after_call = False
        elif format == "mistral" and draw(st.booleans()):
            name = draw(names)
            arguments = json.dumps(draw(st.dictionaries(st.text(max_size=5), values, max_size=3)))
            marker = draw(st.sampled_from(["", "[ARGS]", "[CALL_ID]a1B2c3D4e[ARGS]"]))
            written = f"[TOOL_CALLS]{name}{marker}{arguments}"
            expected.append((name, arguments))
            after_call = True
        else:
            several = draw(
                st.lists(
                    json_calls("parameters" if format == "llama3" else "arguments"),
                    min_size=1,
                    max_size=1 if format == "qwen25" else 3,
                )
            )
            expected += [(name, arguments) for _, name, arguments in several]
            objects = [written for written, _, _ in several]
            if format == "qwen25":
                written = f"<tool_call>{draw(spaces)}{objects[0]}{draw(spaces)}</tool_call>"
            elif format == "llama3":
                written = draw(st.sampled_from(["", "<|python_tag|>"])) + draw(st.sampled_from(";\n")).join(objects)
            else:
                written = f"[TOOL_CALLS]{draw(spaces)}[{f'{draw(spaces)},{draw(spaces)}'.join(objects)}]"
            after_call = True
        text += space + written
    end = draw(spaces)
    return text + end, kept if after_call else kept + end, expected


@pytest.mark.parametrize("format", ["qwen25", "llama3", "mistral"])
@deep
@given(data=st.data())
def test_calls_and_content_of_well_formed_answers(format: str, data: st.DataObject) -> None:
    text, kept, expected = data.draw(answers(format))
    events = parse(format, cut(text, data.draw(st.lists(st.integers(1, 12), max_size=30))))
    assert calls_of(events) == expected
    assert content(events) == kept


@deep
@given(
    several=st.lists(
        st.tuples(names, st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), values, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    sizes=st.lists(st.integers(1, 12), max_size=30),
)
def test_python_literals_become_the_same_json(several: list[tuple[str, dict[str, object]]], sizes: list[int]) -> None:
    written = [f"{name}({', '.join(f'{key}={value!r}' for key, value in kw.items())})" for name, kw in several]
    events = parse("pythonic", cut(f"Ok [{', '.join(written)}]", sizes))
    assert content(events) == "Ok"
    assert [(name, json.loads(arguments)) for name, arguments in calls_of(events)] == several


WRITTEN = ["", "r", "R", "u", "b", "f", "rb"], ["'", '"', "'''", '"""'], [
    *"'\"a1,)](#é\n\r/", "\\\\", "\\'", '\\"', "\\n", "\\d", "\\/", "\\x41", "\\ud83d"
]  # fmt: skip
strings = st.tuples(*map(st.sampled_from, WRITTEN[:2]), st.lists(st.sampled_from(WRITTEN[2]), max_size=5).map("".join))
others = [
    *("1", "1e400", "-0", "0x1f", "1_000", "+3", "(1, 2)", "{'a': [None]}", "{1}", "[1e999]", "open('x')"),
    *(" + ", "%", " if 1 else ", "x", " ", "\n", ".y", "[0]", "()", "not ", "-", "r"),
]
written = st.lists(
    strings.map(lambda parts: f"{parts[0]}{parts[1]}{parts[2]}{parts[1]}") | st.sampled_from(others),
    min_size=1,
    max_size=4,
).map("".join)


def is_json(text: str) -> bool:
    with suppress(ValueError):
        json.loads(text)
        return True
    return False


@settings(max_examples=1000, deadline=None)
@given(value=written, before=st.sampled_from(["", "a=1, "]), sizes=st.lists(st.integers(1, 12), max_size=20))
@example('"""print("hi")\nx=1"""', "", [])
@example("'a'\n r'\\d' \"b\"", "a=1, ", [])
@example("'it''s'", "", [])
@example("None if 1 else 2", "", [])
@example("2 + 3", "a=1, ", [])
@example("- 1", "", [])
@example("1e4_00", "", [])
@example('"\\/"', "", [])
def test_a_value_is_what_python_says_or_none(value: str, before: str, sizes: list[int]) -> None:
    text = f"[search({before}q={value})]"
    events = parse("pythonic", cut(text, sizes))
    assert events == parse("pythonic", [text])
    for _, arguments in calls_of(events):
        json.loads(arguments if arguments.endswith("}") else arguments + "}")
    with warnings.catch_warnings(), suppress(SyntaxError):
        warnings.simplefilter("ignore")
        tree = ast.parse(text, mode="eval").body
        try:
            expected = {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.elts[0].keywords}
            # infinity is nothing that JSON could say, unless as a number too large: 1e400
            made = [("search", json.loads(json.dumps(expected, allow_nan=is_json(value))))]
        except (ValueError, TypeError):
            assert calls_of(events) == ([("search", '{"a": 1')] if before else [])
        else:
            assert [(name, json.loads(arguments)) for name, arguments in calls_of(events)] == made


# --- when events leave

BEGINNINGS = {
    "qwen25": '<tool_call>\n{"name": "search", "arguments": {"q": "',
    "llama3": '{"name": "search", "parameters": {"q": "',
    "mistral": '[TOOL_CALLS] [{"name": "search", "arguments": {"q": "',
}


@pytest.mark.parametrize(("format", "beginning"), [*BEGINNINGS.items(), ("mistral", '[TOOL_CALLS]search{"q": "')])
def test_arguments_leave_while_they_are_written(format: str, beginning: str) -> None:
    parser = PARSERS[format](TOOLS)
    assert merged(parser.push(beginning)) == [CallStart(0, "search"), CallArguments(0, '{"q": "')]
    for piece in ["a", "\\", '"', "} </tool_", "天", " \n"]:
        assert parser.push(piece) == [CallArguments(0, piece)]


def test_python_arguments_leave_value_by_value() -> None:
    parser = PythonicParser(TOOLS)
    assert parser.push("[search(q='x'") == []  # it may be an expression
    assert parser.push(",") == [CallStart(0, "search"), CallArguments(0, '{"q": "x"')]
    assert parser.push(" n=[1, 2] ") == []
    assert parser.push(")") == [CallArguments(0, ', "n": [1, 2]}')]


@formats
def test_text_leaves_at_once_but_what_may_belong_to_a_call(format: str) -> None:
    parser = PARSERS[format](TOOLS)
    assert parser.push("Hello") == [Text("Hello")]
    assert parser.push(" ") == []
    assert parser.push("you\n") == [Text(" you")]
    marker = {"qwen25": "<tool_cal", "llama3": "<|pyth", "mistral": "[TOOL_CALLS", "pythonic": "<|py"}[format]
    assert parser.push(marker) == []
    assert parser.push("!") == [Text(f"\n{marker}!")]


@pytest.mark.parametrize("format", ["qwen25", "llama3", "mistral"])
def test_one_push_gives_one_piece_of_each(format: str) -> None:
    """However many strings and brackets there are: the server merges and sends event by event."""
    arguments = json.dumps({str(i): [i, {"a": "b"}] for i in range(100)})
    text = BEGINNINGS[format].removesuffix('{"q": "') + arguments
    assert PARSERS[format](TOOLS).push("{ x { y " * 50 + "z" + text) == [
        Text("{ x { y " * 50 + "z"),
        CallStart(0, "search"),
        CallArguments(0, arguments),
    ]


def test_events_come_in_the_order_of_the_text() -> None:
    call = f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>'
    assert parse("qwen25", [f"a {call} b {call}{call} c"]) == [
        Text("a"),
        CallStart(0, "get_weather"),
        CallArguments(0, PARIS),
        Text(" b"),
        CallStart(1, "get_weather"),
        CallArguments(1, PARIS),
        CallStart(2, "get_weather"),
        CallArguments(2, PARIS),
        Text(" c"),
    ]


# --- the declaration


def test_each_name_leads_to_its_parser() -> None:
    found = {}
    for record in lightllm_tool_parsers():
        module, _, attribute = record.target.partition(":")
        found[record.name] = getattr(importlib.import_module(module), attribute)
    assert found == {**PARSERS, "hermes": Qwen25Parser}
