"""What a request says of its answer's form: which grammar reaches the engine, and what is refused, by which name."""

import json

import msgspec
import pytest

from lightllm import Text
from lightllm import grammar as g
from lightllm_builtin.reasoning.think import DeepSeekR1Parser, Qwen3Parser
from lightllm_builtin.tool_parsers.mistral import MistralParser
from lightllm_builtin.tool_parsers.qwen25 import Qwen25Parser

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
ANY_OBJECT = g.json({"type": "object"})


def tool(name="f", strict=None, **parameters):
    function = {"name": name, "parameters": parameters or SCHEMA}
    return {"type": "function", "function": function if strict is None else {**function, "strict": strict}}


def allowed(mode, *names):
    """OpenAI's choice of several."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def _tooled(kit):
    with kit.running(tool_parser=Qwen25Parser) as server:
        yield server


@pytest.fixture
def tooled(_tooled):
    _tooled.engine.__init__()
    return roomy(_tooled)


def grammar_of(server, path="/v1/chat/completions", **fields):
    """What reached the engine."""
    response = server.post(path, **fields)
    assert response.status_code == 200, response.text
    return server.engine.last.params.grammar


def refused(server, param, *words, path="/v1/chat/completions", **fields):
    response = server.post(path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for word in words:
        assert word in error["message"], error["message"]
    assert not server.engine.generations


# --- the answer's text

FORMS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
    ({"response_format": JSON_SCHEMA}, g.json(SCHEMA)),
    ({"guided_json": SCHEMA}, g.json(SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, g.json(SCHEMA)),
    ({"guided_regex": "[0-9]+"}, g.Regex("[0-9]+")),
    ({"guided_choice": ["yes", "no"]}, g.OneOf((g.Fixed("yes"), g.Fixed("no")))),
    ({"guided_grammar": 'root ::= "a"+'}, g.Rules('root ::= "a"+')),
    ({"structured_outputs": {"json": SCHEMA}}, g.json(SCHEMA)),
    ({"structured_outputs": {"regex": "[0-9]+"}}, g.Regex("[0-9]+")),
    ({"structured_outputs": {"choice": ["yes"]}}, g.OneOf((g.Fixed("yes"),))),
    ({"structured_outputs": {"grammar": 'start: "a"+'}}, g.Rules('start: "a"+')),
    ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
    ({"structured_outputs": {"json_object": False}}, None),
    ({"structured_outputs": None, "guided_json": None, "response_format": None}, None),
]


@pytest.mark.parametrize(("fields", "grammar"), FORMS, ids=[json.dumps(f)[:60] for f, _ in FORMS])
def test_every_way_to_say_it_reaches_the_engine(server, fields, grammar):
    assert grammar_of(server, **fields) == grammar
    assert grammar_of(server, "/v1/completions", prompt="hi", **fields) == grammar


def test_schemas_may_name_their_draft(server):
    for uri in ("http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema", "http://x"):
        assert grammar_of(server, guided_json={"$schema": uri, "type": "null"}) is not None


def test_properties_may_be_called_as_keywords_are(server):
    names = ("minItems", "minLength", "pattern", "title", "format", "const", "enum")
    properties = {name: {"type": "null"} for name in names}
    assert grammar_of(server, guided_json={"type": "object", "properties": properties}) is not None


def nested(levels):
    schema = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


UNFIT = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema",
        "required",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
        "response_format.json_schema.schema",
        "object",
    ),
    ({"response_format": {"type": "yaml"}}, "response_format", "'yaml'"),
    ({"guided_json": {"type": "strnig"}}, "guided_json", "no JSON Schema"),
    ({"guided_json": {"type": "object", "required": True}}, "guided_json", "/required"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
    ({"guided_json": {"properties": {"a": {"not": {}}}}}, "guided_json", "not"),
    ({"guided_json": {"$ref": "https://example.com/schema"}}, "guided_json", "example.com"),
    ({"guided_json": False}, "guided_json", "nothing"),
    (
        {"guided_json": {"type": "number", "exclusiveMinimum": 98, "exclusiveMaximum": 98.5}},
        "guided_json",
        "exclusive bound",
    ),
    ({"guided_json": nested(101)}, "guided_json", "100 deep"),
    ({"guided_json": {"enum": ["x" * 300_000]}}, "guided_json", "262,144"),
    ({"guided_regex": "(["}, "guided_regex", "regex"),
    ({"guided_json": {"$ref": "#"}}, "guided_json", "nothing can match"),
    ({"guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}}, "guided_json", "items"),
    ({"guided_regex": "a(?=b)"}, "guided_regex", "look"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "262,144"),
    ({"guided_grammar": "what?"}, "guided_grammar", "neither Lark, with a rule start"),
    ({"guided_choice": []}, "guided_choice", "at least one"),
    ({"guided_choice": [1]}, "guided_choice[0]", "str"),
    ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice", "Only one of guided_regex and guided_choice"),
    ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json", "Only one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "Only one of"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "not supported"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "without whitespace"),
]


@pytest.mark.parametrize(("fields", "param", "word"), UNFIT, ids=[json.dumps(f)[:60] for f, _, _ in UNFIT])
def test_what_cannot_be_is_refused_by_name(server, fields, param, word):
    refused(server, param, word, **fields)
    refused(server, param, word, path="/v1/completions", prompt="hi", **fields)


def test_a_hundred_deep_is_not_too_deep(server):
    assert grammar_of(server, guided_json=nested(99)) is not None


# --- tools


def test_forced_calls_come_in_the_models_own_format(tooled):
    tools = [tool("f"), tool("g", type="object")]
    assert grammar_of(tooled, tools=tools) is None
    assert grammar_of(tooled, tools=tools, tool_choice="auto") is None
    assert grammar_of(tooled, tools=tools, tool_choice="none") is None
    forced = Qwen25Parser(tools).grammar(required=True, parallel=True)
    assert grammar_of(tooled, tools=tools, tool_choice="required") == forced
    one = Qwen25Parser(tools).grammar(required=True, parallel=False)
    assert grammar_of(tooled, tools=tools, tool_choice="required", parallel_tool_calls=False) == one
    only_f = Qwen25Parser(tools[:1]).grammar(required=True, parallel=False)
    assert grammar_of(tooled, tools=tools, tool_choice=NAMED) == only_f
    assert grammar_of(tooled, tools=tools, tool_choice=allowed("auto", "f")) is None
    assert grammar_of(tooled, tools=tools, tool_choice=allowed("required", "g", "f")) == forced
    several = Qwen25Parser(tools[:1]).grammar(required=True, parallel=True)
    assert grammar_of(tooled, tools=tools, tool_choice=allowed("required", "f")) == several


def test_strict_tools_are_held_to_their_schemas_once_a_call_begins(tooled):
    tools = [tool("f", strict=True), tool("g", strict=False)]
    assert grammar_of(tooled, tools=tools) == Qwen25Parser(tools).grammar(required=False, parallel=True)
    assert grammar_of(tooled, tools=tools, tool_choice="none") is None


def test_with_a_format_and_tools_an_answer_is_one_or_the_other(tooled):
    tools = [tool("f")]
    calls = Qwen25Parser(tools).grammar(required=True, parallel=True)
    assert grammar_of(tooled, tools=tools, response_format=JSON_SCHEMA) == g.OneOf((g.json(SCHEMA), calls))
    assert grammar_of(tooled, tools=tools, response_format=JSON_SCHEMA, tool_choice="required") == calls
    assert grammar_of(tooled, tools=tools, response_format=JSON_SCHEMA, tool_choice="none") == g.json(SCHEMA)


def test_the_template_is_shown_all_tools_when_one_is_forced(tooled):
    tooled.post(tools=[tool("f"), tool("other")], tool_choice=NAMED)
    assert b'"other"' in bytes(tooled.engine.last.prompt)


UNIQUE = {"type": "array", "uniqueItems": True}
CHOICES = [
    ({"tool_choice": "required"}, "tool_choice", "only be used with tools"),
    ({"tool_choice": NAMED}, "tool_choice", "only be used with tools"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "only be used with tools"),
    ({"tool_choice": NAMED, "tools": [tool("g")]}, "tool_choice", "'f'"),
    ({"tool_choice": allowed("auto", "g"), "tools": [tool("f")]}, "tool_choice", "'g'"),
    ({"tool_choice": allowed("auto"), "tools": [tool("f")]}, "tool_choice.allowed_tools.tools", ">= 1"),
    ({"tool_choice": allowed("none", "f"), "tools": [tool("f")]}, "tool_choice.allowed_tools.mode", "none"),
    ({"tool_choice": "always", "tools": [tool()]}, "tool_choice", "none, auto, required"),
    ({"tool_choice": {"type": "function"}, "tools": [tool()]}, "tool_choice.function", "required"),
    ({"tool_choice": {"type": "custom", "function": {"name": "f"}}, "tools": [tool()]}, "tool_choice", "'custom'"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name", "two tools"),
    ({"tools": [tool(type="strnig")]}, "tools[0].function.parameters", "no JSON Schema"),
    ({"tools": [tool(type="strnig")], "tool_choice": "none"}, "tools[0].function.parameters", "no JSON Schema"),
    ({"tools": [tool("a"), tool(**UNIQUE)], "tool_choice": "required"}, "tools[1].function.parameters", "uniqueItems"),
    ({"tools": [tool("a"), tool(**UNIQUE)], "tool_choice": NAMED}, "tools[1].function.parameters", "uniqueItems"),
    ({"tools": [tool("a"), tool(strict=True, **UNIQUE)]}, "tools[1].function.parameters", "uniqueItems"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "word"), CHOICES, ids=[json.dumps(f)[:60] for f, _, _ in CHOICES])
def test_choices_that_cannot_be_made_are_refused_by_name(tooled, fields, param, word):
    refused(tooled, param, word, **fields)


def test_a_schema_that_cannot_be_enforced_does_no_harm_where_it_need_not_be(tooled):
    assert grammar_of(tooled, tools=[tool(**UNIQUE)]) is None


def roomy(server):
    server.engine.ready = msgspec.structs.replace(server.engine.ready, max_model_len=5000)
    return server


def test_calls_cannot_be_forced_without_a_parser_that_can(server, kit):
    roomy(server)
    refused(server, "tool_choice", "--tool-call-parser", tools=[tool()], tool_choice="required")
    refused(server, "tools", "--tool-call-parser", tools=[tool(strict=True)])

    class Plain(Qwen25Parser):
        grammar = None

    with kit.running(tool_parser=Plain) as other:
        refused(roomy(other), "tool_choice", "cannot write a grammar", tools=[tool()], tool_choice="required")


def test_ids_have_the_form_that_the_parser_wants(tooled, kit):
    tooled.engine.script = kit.says('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')
    assert tooled.chat(tools=[tool()]).choices[0].message.tool_calls[0].id.startswith("call_")
    with kit.running(tool_parser=MistralParser) as other:
        roomy(other).engine.script = kit.says('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]')
        id = other.chat(tools=[tool()]).choices[0].message.tool_calls[0].id
        assert len(id) == 9 and id.isalnum() and id.isascii()
        streamed = [
            c for chunk in other.chat(tools=[tool()], stream=True) for c in chunk.choices[0].delta.tool_calls or ()
        ]
        assert len(streamed[0].id) == 9


# --- reasoning


@pytest.mark.parametrize("parser", [DeepSeekR1Parser, Qwen3Parser])
def test_the_thought_comes_before_the_grammar(kit, parser):
    with kit.running(reasoning_parser=parser) as server:
        assert grammar_of(server, response_format=JSON_SCHEMA) == parser("").grammar(g.json(SCHEMA))


def test_a_reasoning_parser_without_a_grammar_cannot_be_combined_with_one(kit):
    class Plain:
        def __init__(self, prompt):
            pass

        def push(self, text):
            return [Text(text)]

        def close(self):
            return []

    with kit.running(reasoning_parser=Plain) as server:
        refused(server, "guided_regex", "reasoning parser", guided_regex="a")
        assert server.chat().choices[0].message.content == "Hello!"


# --- what the engine finds out later


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_engine_refuses_is_the_clients_fault(server, kit, stream):
    def script(prompt, params, index):
        yield dict(tokens=[72])
        yield dict(tokens=[], finish="refused", error="lexer error: too many states")

    server.engine.script = script
    if stream:
        *_, last = server.events()
        error = json.loads(last)["error"]
    else:
        response = server.post()
        assert response.status_code == 400
        error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "too many states" in error["message"]
