"""The llguidance backend: which texts each kind of grammar lets through, whatever tokens they come in.

JSON Schema is compared with jsonschema, regular expressions with `re`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator, Draft202012Validator

from lightllm import grammar as g
from lightllm.grammar import Fixed, Grammar, Joined, Marker, OneOf, Regex, Repeated, Rules, Trigger, Triggered
from lightllm.testing import TextMatcher, check_grammar_backend
from lightllm.testing.grammars import bits
from lightllm_builtin.grammar.backend import Llguidance
from lightllm_builtin.grammar.lark import modest

deep = settings(max_examples=25, deadline=None)


HELD = TextMatcher(special=("[TOOL_CALLS]", "[ARGS]"), added=("<tool_call>",))
SERVER = Llguidance(None, HELD.size, [HELD.eos])

fits, compile = HELD.fits, HELD.compile


def refusal(grammar: Grammar, backend: Llguidance = SERVER) -> str:
    with pytest.raises(g.GrammarError) as refused:
        backend.compile(grammar)
    return str(refused.value)


def bug(*values: Any, why: str) -> Any:
    """A case that shows a bug not yet mended."""
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=f"BUG: {why}"))


def named(value: Any) -> str:
    return str(value)[:60] if isinstance(value, Grammar) else ""


def test_it_keeps_the_rules_of_grammar_backends() -> None:
    check_grammar_backend(Llguidance)


# --- every kind of grammar: what fits, and what does not

GBNF = 'root ::= "a" item+ | "b"\nitem ::= [0-9] | "(" item ")" # nested'
LARK = '// a comment\nstart: "a" item+ | "b"\nitem: /[0-9]/ | "(" item ")"'
ITEMS = ["a1", "a(1)", "a((1))2(3)", "b"], ["a", "a(1", "ab", "a1)", ""]
TYPED = {"type": "object", "properties": {"b": {"type": "string"}}}
SCHEMA = {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"], "additionalProperties": False}

CASES: list[tuple[Grammar, list[str], list[str]]] = [
    (Fixed(""), [""], ["a"]),
    (Fixed('a"\n\\/天😀'), ['a"\n\\/天😀'], ["", 'a"', 'a"\n\\/天😀 ']),
    (Fixed("{%json} | /a/i"), ["{%json} | /a/i"], ["A"]),
    (Marker("[ARGS]"), ["[ARGS]"], ["", "[TOOL_CALLS]"]),
    (Marker("<tool_call>"), ["<tool_call>"], [""]),
    (Marker("</tool.call>"), ["</tool.call>"], ["</tool_call>"]),
    (Joined(()), [""], ["a"]),
    (Joined((Marker("[ARGS]"), Fixed("a"), Regex("b?"))), ["[ARGS]a", "[ARGS]ab"], ["[ARGS]", "a", "[ARGS]a[ARGS]"]),
    (OneOf((Fixed("a"), Fixed("ab"), Fixed("天"))), ["a", "ab", "天"], ["", "b", "天气", "a天"]),
    (Repeated(Fixed("ab")), ["", "ab", "ab" * 9], ["a", "aba"]),
    (Repeated(Fixed("ab"), 0, 1), ["", "ab"], ["abab"]),
    (Repeated(Fixed("ab"), 1, 2), ["ab", "abab"], ["", "ababab"]),
    (Repeated(Fixed("ab"), 2, 2), ["abab"], ["ab", "ababab"]),
    (Repeated(Fixed("ab"), 2), ["abab", "ab" * 9], ["ab"]),
    (Repeated(Regex("a*"), 2, 3), ["", "aaaaa"], ["b"]),
    # JSON is compact, strings are written in UTF-8
    (g.json(True), ["1", "-0.5e+3", '"a"', "null", "[]", '{"a":[1,{"b":true}]}'], ["", "01", "tru", " 1", "1 ", "{ }"]),
    (g.json({}), ['[1,2]"'[:-1], '{"a":1}'], ["[1, 2]", '{"a": 1}', '{"a":1 }', '{\n"a":1}', "[1,]", '{"a":1']),
    (g.json({"type": "string"}), ['"天气😀\u2028"', '"\\"\\\\\\n\\b/"'], ['"\n"', '"\\x"', '"a', "a", '"""']),
    (g.json({"type": "string", "maxLength": 2}), ['""', '"天气"', '"😀\\n"'], ['"abc"', '"天气。"']),
    (g.json({"enum": [1, "天/\n", [1, {"b": 2}]]}), ["1", '"天/\\n"', '[1,{"b":2}]'], ['"天"', '[1, {"b":2}]', "2"]),
    (g.json(SCHEMA), ['{"a":1}', '{"a":1,"b":[]}'], ["{}", '{"b":1,"a":1}', '{"a":1,"c":1}', '{"a":1,"a":1}']),
    (g.json(TYPED), ['{"b":"","c":1}'], ['{"b":1}', '{"\\u0062":1}']),
    (g.json({"type": "array", "x-guidance": {"whitespace_flexible": True}}), ["[]"], ["[ ]"]),
    (g.json({"$schema": "http://json.example/mine", "format": "mine", "type": "string"}), ['"a"'], ["1"]),
    # the whole text must match, anchors or not
    (Regex(""), [""], ["a"]),
    (Regex("^abc$"), ["abc"], ["ab", "xabc", "abcd"]),
    (Regex("a$|^b"), ["a", "b"], ["ab"]),
    (Regex("(^a|b)c"), ["ac", "bc"], ["abc"]),
    (Regex(r"[$^]\$\^"), ["$$^", "^$^"], ["$^"]),
    (Regex("a/b"), ["a/b"], ["ab", "a\\/b"]),
    (Regex(r"/\/\\/i"), ["//\\/i"], ["//\\/I", "///i"]),
    (Regex("[\"'/#]+ {2}"), ["\"'/#  "], ["\"'/# ", ""]),
    (Regex("a\n\tb"), ["a\n\tb"], ["a", "a\n\t"]),
    (Regex(r"\d+"), ["0123"], ["", "٣", "½"]),
    (Regex(r"\w+\W"), ["aZ_9-", "a天"], ["天-", "é-"]),
    (Regex("."), ["a", "天", "😀"], ["\n", ""]),
    (Regex("(?s:.)(?i:ab)"), ["\nAb"], ["\nac"]),
    (Regex("[^a]"), ["天", "\n"], ["a"]),
    # both notations, whatever they are called
    (Rules(GBNF), *ITEMS),
    (Rules(LARK), *ITEMS),
    (Rules('root ::= "\\n" [^\\]/"] | my-n{2,3}\nmy-n ::= "天" | [気-氣]'), ["天天", "気天天", "\n["], ["天", "\n/"]),
    (Rules("start: N\nN: /[0-9]+/"), ["12"], [""]),
    (Rules('start: (" "|/a/i)~2 %json {"type": "integer"}'), [" A12"], [" A", "a1"]),
    (Rules('%import common.INT\nstart: INT ("+" INT)*\n%ignore " "'), ["12", "1+ 2 +3"], ["1+"]),
    (Joined((Rules(GBNF), Fixed("-"), Rules(LARK))), ["b-a1", "a1-b"], ["b", "b-", "b-c"]),
    (Rules('?start: "a" | b\nb: "b"'), ["a", "b"], [""]),
    (
        Rules('root ::= start "b" start- # start\nstart ::= "a" | "start"\nstart- ::= "c"'),
        ["abc", "startbc"],
        ["a", "bc"],
    ),
    (Rules('root ::= "\\u0041\\\\u0041\\U0001F600" [\\u0061-\\u0063\\u5929]'), ["A\\u0041😀b", "A\\u0041😀天"], ["A"]),
    (Rules('root ::= "\\u0022\\u005c" [\\u005d\\u005b\\u002f]'), ['"\\]', '"\\[', '"\\/'], ['"\\x']),
    (Repeated(Fixed("a"), 0, 0), [""], ["a"]),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), CASES, ids=named)
def test_what_fits(grammar: Grammar, good: list[str], bad: list[str]) -> None:
    SERVER.compile(grammar)
    assert [text for text in good if not fits(grammar, text)] == []
    assert [text for text in bad if fits(grammar, text)] == []


def test_a_marker_is_a_token_where_there_is_such_a_token() -> None:
    plain = TextMatcher()
    for text in ("[ARGS]", "<tool_call>"):
        assert plain.fits(Marker(text), text)
        assert not fits(Marker(text), text, spelled=True)
        assert fits(Regex(f"{re.escape(text)}|a"), text, spelled=True)
        assert not fits(Regex("(?s:.)*"), text)
    assert not fits(Triggered((Trigger(Marker("[ARGS]"), Fixed("1")),)), "[ARGS]2", spelled=True)


@pytest.mark.parametrize(
    "grammar",
    [
        Fixed("abc"),
        Fixed("a[ARGS]"),
        g.json({"const": "<tool_call>"}),
    ],
    ids=named,
)
def test_what_is_offered_is_accepted(grammar: Grammar) -> None:
    matcher = compile(grammar)
    while not matcher.finished():
        assert matcher.accept(HELD.allowed(matcher)[0]), matcher.error()


# --- triggers

CALL = (Trigger(Regex("<call>"), Fixed("1;")),)
TWO = (Trigger(Marker("[TOOL_CALLS]"), Fixed("1")), Trigger(Marker("<t>"), Joined((Fixed("2"), Marker("[ARGS]")))))
NONE, ONE, THREE = ["", "hello\n天", "<cal", "<call", "x<<<call"], ["<call>1;", "a<call>1;"], "<call>1;a" * 3
BROKEN = ["<call>", "<call>2", "x<call>1", "<call>1;<call>", "<<call>2", "<call><call>1;"]
TOOL_CALLS = ["<tool_<tool_call>1", "<tool_call", "x<tool_call>1y"]
BOTH = ["a[TOOL_CALLS]1<t>2[ARGS]b", "<t>2[ARGS]<t>2[ARGS][TOOL_CALLS]1"]
ON = ["<call>1;b", "<call>1;<call>1;", "a<call>1;b<call>1;c"]

TRIGGERED: list[tuple[Triggered, list[str], list[str]]] = [
    (Triggered(CALL), [*NONE, *ONE, *ON, THREE], BROKEN),
    (Triggered(CALL, least=1), [*ONE, *ON, THREE], [*NONE, *BROKEN]),
    (Triggered(CALL, least=1, most=1), ONE, [*NONE, *BROKEN, *ON]),
    (Triggered(CALL, most=2), [*NONE, *ONE, *ON[:2]], [*BROKEN, ON[2], THREE]),
    (Triggered(CALL, least=1, most=2), [*ONE, *ON[:2]], [*NONE, *BROKEN, ON[2], THREE]),
    (Triggered(()), ["", "a\n天"], ["[ARGS]"]),
    # text that is cut by other text, and tokens that hold more than the trigger or a part of it
    (Triggered(CALL), ["<ca<call>1;", "<call<call>1;", "l><call>1;l>"], ["<ca<call>", "<call<call>2"]),
    (Triggered((Trigger(Regex("b"), Fixed("c")),)), ["abc", "aabca", "a"], ["ab", "abab", "b"]),
    (Triggered((Trigger(Regex('"a'), Fixed('"}')),)), ['{"a"}', ', "a"}', '{"'], ['{"a":', '{"a']),
    (Triggered((Trigger(Marker("天气"), Fixed("1")),)), ["天天气1", "天", "气天气1气"], ["天气", "天天气"]),
    (Triggered((Trigger(Marker("a.b"), Fixed("1")),)), ["a.b1", "acb"], ["a.b"]),
    (Triggered((Trigger(Regex("a+b$"), Fixed("!")),)), ["aaab!", "ab!ab!", "aaa"], ["aab", "aaab?"]),
    (Triggered((Trigger(Marker("<tool_call>"), Fixed("1")),)), TOOL_CALLS, ["<tool_<tool_call>", "<tool_call>2"]),
    # two of them
    (Triggered(TWO), ["", "<t[TOOL_CALLS]1>", "<t[TOOL_CALLS", *BOTH], ["<t>1", "<t>2", "[TOOL_CALLS]", "[ARGS]"]),
    (Triggered(CALL, most=1), [*NONE, *ONE], [*BROKEN, *ON]),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), TRIGGERED, ids=named)
def test_triggers(grammar: Triggered, good: list[str], bad: list[str]) -> None:
    test_what_fits(grammar, good, bad)


# --- references from elsewhere

SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
    {"type": "number", "multipleOf": 0.5, "maximum": 2},
    {"type": ["string", "null"], "minLength": 1, "maxLength": 2},
    {"type": "string", "pattern": '^[ab"]+\\d?$'},
    {"type": "string", "pattern": "b"},
    {"enum": [0, "a", None, [1], {"a": 1}]},
    {"const": {"a": ["天", 1]}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": {"type": "null"}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"properties": {"a": {"type": "integer"}}, "additionalProperties": False, "required": ["a"]},
    {"type": "object", "patternProperties": {"^[xy]$": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    {"anyOf": [{"type": "integer"}, {"items": {"$ref": "#/$defs/s"}}], "$defs": {"s": {"type": "string"}}},
    {"allOf": [{"type": "number"}, {"minimum": 1}], "oneOf": [{"type": "integer"}, {"type": "string"}]},
    {"type": "object", "properties": {"a": {"items": {"$ref": "#"}}, "b": {"required": ["a"]}, "x": False}},
]

INSTANCES = [1, "b", [1], [1, "a", None], {"a": 1}, {"x": 1}, {"a": ["天", 1]}, {"a": [{"a": [], "b": {"a": 1}}]}]
VALUES = [None, True, 0, 1, -3, -4, 11, 12, 0.5, 1.5, 2.25, "", "a", "b", 'a"b1', "aab", "天", "天气", "\n"]
keys = st.sampled_from("abxyz")
instances = st.recursive(
    st.sampled_from(VALUES), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_schemas_allow_what_jsonschema_allows(schema: dict[str, Any]) -> None:
    verdicts = set()

    @deep
    @given(instances)
    def agrees(instance: Any) -> None:
        # llguidance wants properties in the schema's order, others after them: here, the alphabet's
        text = json.dumps(instance, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        valid = Draft202012Validator(schema).is_valid(instance)
        verdicts.add(valid)
        assert fits(g.json(schema), text) == valid

    for instance in INSTANCES:
        agrees = example(instance)(agrees)
    agrees()
    assert verdicts == {True, False}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("keys", [("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")])
@pytest.mark.parametrize("named", [{}, {"$schema": Draft4Validator.META_SCHEMA["$schema"]}])
def test_bounds_of_draft_4(named: dict[str, str], keys: tuple[str, str], flag: bool) -> None:
    schema = {**named, "items": {"type": "integer", keys[0]: 1, keys[1]: flag}, "type": "array"}
    for number in (0, 1, 2):
        assert fits(g.json(schema), f"[{number}]") == Draft4Validator(schema).is_valid([number])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": r"^[^\x00-\x1f]b[\x01c]\\x01$"},
        {"type": "string", "pattern": "^[]\x01b]b[c\x01]\\\\x01$"},
        {"type": "object", "properties": {"\x01": {"const": {"\x02": "\n"}}}, "required": ["\x01"]},
    ],
)
def test_control_characters_that_need_not_be_written(schema: dict[str, Any]) -> None:
    for instance in ("bbc\\x01", "bc", {"\x01": {"\x02": "\n"}}, {"\x01": {"": "\n"}}, {"": {"\x02": "\n"}}):
        text = json.dumps(instance, separators=(",", ":"))
        assert fits(g.json(schema), text) == Draft202012Validator(schema).is_valid(instance), text


PATTERNS = [
    r"(ab|a)*b?",
    r"[a-c]{2,3}\.?",
    r"\d+(\.\d{1,2})?",
    r"\w+@\w+\.(com|org)",
    r"^(a|b+)?$",
    r"[^ab\n]*",
    r".*a.b",
    r"(?i:yes|no)[!/]*",
    r"\s*\S\s*",
    r"(?:a{2}){1,2}|天+",
    r"\D\W",
    r"[\]\[\\^-]+",
    r"""a*?b+?"'""",
    r"\x41\u5929\n",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@deep
@given(data=st.data())
def test_patterns_match_what_re_matches(pattern: str, data: st.DataObject) -> None:
    texts = st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True).filter(lambda text: len(text) < 30)
    text = data.draw(texts | st.text("ab.天1\n []\\^-/@", max_size=6))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text("ab1.天", max_size=1)) + text[at + 1 :]
    assume(not any(char.isspace() and char > " " for char in text))  # to re.ASCII no whitespace
    assert fits(Regex(pattern), text) == bool(re.fullmatch(pattern, text, re.ASCII))


# --- what cannot be compiled

REFUSED: list[tuple[Grammar, str]] = [
    (g.json({"not": {}}), "not"),
    (g.json({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (g.json(False), "the schema false allows nothing"),
    (g.json({"properties": {"a": False}, "required": ["a"], "type": "object"}), "'a' is unsatisfiable"),
    (g.json({"type": "integer", "minimum": 5, "maximum": 2}), "minimum (5) is greater than maximum (2)"),
    (g.json({"type": "foo"}), "foo"),
    (g.json({"$ref": "#/nope"}), "'/nope' does not exist"),
    (g.json({"$ref": "http://example.org/x"}), "http://example.org/x"),
    (Regex("["), 'invalid regex "[": unclosed character class'),
    (Rules('root ::= "\\ud83d"'), "\\ud83d is no character"),
    (Rules("root ::= [\\U00110000]"), "\\U00110000 is no character"),
    (Regex("a("), 'invalid regex "a(": unclosed group'),
    (Regex("(?=a)a"), "look-ahead"),
    (Regex(r"(a)\1"), "backreferences are not supported"),
    (Regex("\n("), "unclosed group"),
    (Regex(r"\bfoo"), "lookarounds not supported"),
    (Rules("SELECT *"), "it is neither Lark, with a rule start, nor GBNF"),
    (Rules('x ::= "a"'), "No 'root' rule found"),
    (Rules("root ::= x"), "Rule 'x' not found"),
    (Rules("start: x"), 'unknown name: "x"'),
    (Rules("start: /(/"), "unclosed group"),
    (Rules('start: "a"\nstart: "b"'), 'duplicate rule: "start"'),
    (Rules('start: %json {"not": {}}'), "not"),
    (Joined((Fixed("a"), OneOf((g.json({"not": {}}), Fixed("b"))))), "not"),
    (g.json({"type": "string", "pattern": "("}), ": unclosed group"),
    (Regex("a\\"), "ends with a backslash"),
    (g.json(3), "a JSON Schema is an object, true or false"),
    (g.json({"type": "string", "minLength": True}), "got true"),
    (g.json({"const": "a\x01b"}), "const: the control character U+0001 cannot be enforced"),
    (g.json({"properties": {"a": {"enum": [1, [{"b": "\x7f"}]]}}}), "enum: the control character U+007F"),
    *(
        (g.json({"type": "string", "pattern": pattern}), "pattern: the control character U+00")
        for pattern in ("a\x0bb", r"a\x01b", r"^\\\x1B\[", r"\u001f", "a[\x01]", r"[\x7f]b", r"a\vb", r"[ab]\u{1}")
    ),
    (
        g.json({"type": "object", "patternProperties": {"^a\x01$": {}}}),
        "patternProperties: the control character U+0001",
    ),
]


@pytest.mark.parametrize("backend", [SERVER, HELD.backend], ids=["server", "engine"])
@pytest.mark.parametrize(("grammar", "reason"), REFUSED, ids=named)
def test_errors_say_in_one_line_what_is_wrong(grammar: Grammar, reason: str, backend: Llguidance) -> None:
    message = refusal(grammar, backend)
    assert reason in message
    assert "\n" not in message and not re.search(r"\d+\(\d+\)|::(?!=)", message)


COSTLY = Regex("(?:a?){500}a{500}")


def test_rules_that_nothing_can_match_are_refused() -> None:
    assert "nothing can match" in refusal(Rules("root ::= root"))


@pytest.mark.parametrize("backend", [bug(SERVER, why="its walk does not come far enough"), HELD.backend])
def test_what_becomes_too_costly_ends_with_a_reason(backend: Llguidance) -> None:
    if backend is SERVER:
        assert "too many" in refusal(COSTLY)
    else:
        matcher = backend.compile(COSTLY)
        assert not HELD.follow(matcher, b"a" * 1000, own=False)
        assert "too many" in matcher.error()


def test_the_server_checks_without_torch() -> None:
    code = """
import sys
from lightllm import grammar
from lightllm_builtin.grammar.backend import Llguidance
backend = Llguidance(None, 1000, [0])
backend.compile(grammar.Joined((grammar.Marker("<t>"), grammar.json({"type": "object"}), grammar.Regex("a+"))))
try:
    backend.compile(grammar.json({"not": {}}))
except grammar.GrammarError:
    assert "torch" not in sys.modules
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


# --- matchers


def test_matchers_of_one_grammar_go_their_own_ways() -> None:
    grammar = OneOf((Fixed("yes"), Fixed("no")))
    begun, yes, no = (compile(grammar) for _ in range(3))
    before = HELD.allowed(begun)
    assert HELD.follow(yes, b"yes") and HELD.follow(no, b"n", own=False)
    assert yes.finished() and not no.finished()
    assert HELD.allowed(begun) == before
    assert HELD.follow(no, b"o") and no.finished()


def test_a_token_that_does_not_fit_is_not_accepted() -> None:
    matcher = compile(Regex("[a-z]+"))
    assert matcher.accept(ord("a")) and matcher.error() == ""
    assert not matcher.accept(ord("1"))
    assert "1" in matcher.error() and "\n" not in matcher.error()
    assert not matcher.accept(ord("a"))


def test_an_answer_is_finished_when_nothing_can_follow() -> None:
    short, long = (compile(Regex("a{1,2}")) for _ in range(2))
    assert not short.finished() and HELD.eos not in HELD.allowed(short)
    for matcher in (short, long):
        assert matcher.accept(ord("a")) and not matcher.finished() and HELD.eos in HELD.allowed(matcher)
    assert short.accept(HELD.eos) and short.finished()
    assert long.accept(ord("a")) and long.finished() and long.error() == ""


def test_what_must_follow_is_known_in_the_tokenizers_own_cut() -> None:
    matcher = compile(Joined((OneOf((Fixed("a"), Fixed("b"))), Fixed('{"天气": true'))))
    assert matcher.forced() == []
    assert matcher.accept(ord("b"))
    forced = matcher.forced()
    assert forced and forced == HELD.raw.encode('{"天气": true').ids[: len(forced)]
    assert HELD.follow(matcher, forced) and HELD.follow(matcher, matcher.forced()) and matcher.finished()


def test_several_masks_are_filled_at_once() -> None:
    texts = ["", "a", "[1]", "x", "true"] * 7
    matchers = [compile(Joined((Fixed(text), Regex("[a-c]*")))) for text in texts]
    masks = torch.full((len(matchers), -(-HELD.size // 32)), -1, dtype=torch.int32)
    HELD.backend.fill(matchers, masks)
    assert [bits(mask) for mask in masks] == [HELD.allowed(matcher) for matcher in matchers]


@pytest.mark.parametrize("size", [256, HELD.size - 1, HELD.size, HELD.size + 1, 320, 321, 1000])
def test_masks_are_of_the_models_size(size: int) -> None:
    backend = Llguidance(HELD.raw, size, [HELD.eos])
    masks = torch.full((3, -(-size // 32)), -1, dtype=torch.int32)
    grammars = Regex("(?s:.)*"), Triggered(TWO), Regex("x")
    backend.fill([backend.compile(grammar) for grammar in grammars], masks)
    text, triggered, one = (set(bits(mask)) for mask in masks)
    most = min(masks.shape[1] * 32, HELD.size)
    no_character = {*range(0x80, 0xC2), *range(0xF5, 0x100)}
    added = {HELD.id(name) for name in ("<eos>", "[TOOL_CALLS]", "[ARGS]", "<tool_call>")}
    assert one == {ord("x")}
    assert text | no_character == {*range(most)} - added | {HELD.eos} & {*range(most)}
    assert triggered == text | {HELD.id("[TOOL_CALLS]")} & {*range(most)}


def test_every_id_that_ends_an_answer_is_offered() -> None:
    ends = [HELD.eos, HELD.id("[ARGS]")]
    backend = Llguidance(HELD.raw, HELD.size, ends)
    masks = torch.zeros(1, -(-HELD.size // 32), dtype=torch.int32)
    backend.fill([backend.compile(Regex("a?"))], masks)
    assert bits(masks[0]) == [ord("a"), *ends]


def test_threads_may_share_a_backend() -> None:
    def compiled(i: int) -> list[int]:
        return HELD.allowed(HELD.backend.compile(Joined((g.json({"type": "boolean"}), Regex(f"a{{{i}}}")))))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(compiled, range(1, 40))) == [compiled(0)] * 39


LITERAL = "a" * 4000


@pytest.mark.parametrize(
    ("schema", "is_modest"),
    [
        ({"properties": {"title": {"const": "a"}, "minItems": {"type": "string"}}, "title": LITERAL}, True),
        ({"properties": {"title": {"const": LITERAL}}}, False),
        ({"const": {"title": LITERAL}}, False),
        ({"enum": ["a", LITERAL]}, False),
        ({"properties": {LITERAL: {}}}, False),
        ({"items": {"minItems": 1000}}, False),
        ({"pattern": "a{1000}"}, False),
    ],
)
def test_only_grammars_without_long_texts_that_must_come_are_looked_ahead_in(schema: Any, is_modest: bool) -> None:
    assert modest(g.json(schema)) == is_modest
