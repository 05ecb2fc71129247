"""Structured output and forced tool calls by the demo model over real sockets: what was asked for is what comes.

The reference is the jsonschema package. The demo model is small and says nothing sensible: only form is looked at.
"""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from e2e.schemas import Schema, faults, random_schema, read_json

from lightllm.testing import Server

ASKED = 200
AT_ONCE = 16
KINDS = ["response_format", "required", "named"]

PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
LONG: Schema = {"type": "string", "minLength": 100, "maxLength": 200}


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


@dataclass
class Said:
    """One choice: what a whole answer says, or the deltas of a streamed one together. ``calls``: name, arguments."""

    content: str = ""
    calls: list[list[str]] = field(default_factory=list)
    finish: str | None = None


def ask(api: openai.OpenAI, *, stream: bool = False, **fields: Any) -> list[Said]:
    """The choices. ``fields`` that are vLLM's own go into ``extra_body``."""
    fields = {"model": "demo", "messages": question("Invent some data."), "max_tokens": 300} | fields
    if not stream:
        reply = api.chat.completions.create(**fields)
        return [
            Said(
                choice.message.content or "",
                [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()],
                choice.finish_reason,
            )
            for choice in reply.choices
        ]
    said: dict[int, Said] = {}
    for chunk in api.chat.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            one = said.setdefault(choice.index, Said())
            one.content += choice.delta.content or ""
            one.finish = choice.finish_reason or one.finish
            for call in choice.delta.tool_calls or ():
                if call.index == len(one.calls):
                    one.calls.append([call.function.name, ""])
                one.calls[call.index][1] += call.function.arguments or ""
    return [said[index] for index in sorted(said)]


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def json_schema(schema: Schema) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def tool(name: str, schema: Schema | None = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name} | ({} if schema is None else {"parameters": schema}) | fields
    return {"type": "function", "function": function}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


# ---------------------------------------------------------------------------------------------------------------------
# Random schemas


def random_request(number: int, kind: str) -> tuple[dict[str, Any], dict[str, Schema]]:
    """The fields, and the schema of every tool that may be called; "": of the content."""
    fields: dict[str, Any] = {
        "messages": question(f"Invent some data, example {number}."),
        "temperature": 1,
        "seed": number,
        "stream": number % 2 == 1,
    }
    if kind == "response_format":
        schema = random_schema(number)
        return fields | {"response_format": json_schema(schema)}, {"": schema}
    schemas = {name: random_schema(2 * number + i, top="object") for i, name in enumerate(["f", "look_up"])}
    fields |= {
        "tools": [tool(name, schema, strict=number % 3 == 0) for name, schema in schemas.items()],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    if kind == "named":
        fields["tool_choice"] = named("look_up")
        del schemas["f"]
    return fields, schemas


def wrong_with(said: Said, schemas: dict[str, Schema], most: int | None = None) -> str:
    """Why this is no answer to such a request; "" when it is one. Of an answer cut off, what it has begun is let be.

    ``most``: of calls.
    """
    cut = said.finish == "length"
    if "" in schemas:
        if said.calls or said.finish not in ("stop", "length"):
            return f"it is no text: {said}"
        return "" if cut else faults(said.content, schemas[""])
    if said.finish not in ("tool_calls", "length") or (not cut and (said.content or not said.calls)):
        return f"it is no call: {said}"
    if most is not None and len(said.calls) > most:
        return f"it has too many calls: {said}"
    for name, arguments in said.calls[:-1] if cut else said.calls:
        if name not in schemas:
            return f"{name} is not to be called"
        if fault := faults(arguments, schemas[name]):
            return f"{fault} in {arguments}"
    return ""


@pytest.mark.timeout(1800)  # a minute where nothing else runs
def test_200_random_schemas_16_at_a_time_all_hold(
    demo: Server, api: openai.OpenAI, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(number: int) -> tuple[bool, str]:
        if number % 25 == 24:  # nobody else's grammar holds for who asked for none
            (free,) = ask(api, messages=question(f"Tell me story {number}."), max_tokens=40, seed=number)
            assert free.finish in ("stop", "length")
            assert free.content
        fields, schemas = random_request(number, KINDS[number % 3])
        (said,) = ask(api, **fields)
        wrong = wrong_with(said, schemas, most=1)
        return said.finish != "length", wrong and f"seed {number}, {fields}: {wrong}, {said}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(one, range(ASKED)))
    assert [wrong for _, wrong in results if wrong] == []
    completed = sum(done for done, _ in results)
    record_property("completed", completed)
    with capsys.disabled():
        print(f" {completed} of {ASKED} completed", end=" ")  # noqa: T201
    assert completed >= 0.9 * ASKED
    assert "Traceback" not in demo.log


@pytest.mark.parametrize("parser", ["llama3", "mistral"])
def test_calls_are_forced_in_every_models_own_format(parser: str) -> None:
    def one(number: int) -> str:
        fields, schemas = random_request(number, KINDS[1 + number // 2 % 2])
        (said,) = ask(api, **fields)
        wrong = wrong_with(said, schemas, most=1)
        return wrong and f"seed {number}, {fields}: {wrong}, {said}"

    with Server("--model", "demo", "--tool-call-parser", parser) as server:
        with client(server) as api, ThreadPoolExecutor(AT_ONCE) as pool:
            assert [wrong for wrong in pool.map(one, range(1000, 1012)) if wrong] == []
        assert "Traceback" not in server.log


# ---------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"guided_regex": r"[a-c]{2,4}-\d{3}"}, r"[a-c]{2,4}-\d{3}"),
        ({"guided_choice": ["yes", "no", "not at all", "北京"]}, "yes|no|not at all|北京"),
        ({"guided_grammar": 'root ::= ("ab" | "cd"){1,3} "!"'}, "(ab|cd){1,3}!"),
        ({"guided_grammar": 'start: "x" NUMBER ("," NUMBER)?\nNUMBER: /[0-9]{1,3}/'}, r"x\d{1,3}(,\d{1,3})?"),
        ({"structured_outputs": {"regex": r"(0|1){5}"}}, "[01]{5}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"grammar": 'root ::= "(" root ")" | "."'}}, r"\(*\.\)*"),
        ({"structured_outputs": {"json": {"enum": ["a", 1, None]}}}, '"a"|1|null'),
        ({"guided_json": {"type": "array", "items": {"const": 0}, "maxItems": 2}}, r"\[(0(,0)?)?\]"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ],
)
def test_vllms_fields_hold_the_text(api: openai.OpenAI, extra: dict[str, Any], expected: str, stream: bool) -> None:
    choices = ask(api, stream=stream, extra_body=extra, n=2, max_tokens=24, temperature=1, seed=3)
    assert len(choices) == 2
    for said in choices:
        assert said.calls == []
        if said.finish == "length":  # only a recursive rule may go on so long
            assert set(said.content) == {"("}
        else:
            assert said.finish == "stop"
            assert re.fullmatch(expected, said.content), said


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"json_object": True}}},
        {"extra_body": {"guided_json": {"type": "object"}}},
    ],
    ids=["response_format", "structured_outputs", "guided_json"],
)
def test_a_json_object_is_one(api: openai.OpenAI, fields: dict[str, Any]) -> None:
    for said in ask(api, n=4, temperature=1, seed=5, max_tokens=100, **fields):
        assert said.content.startswith("{")
        if said.finish == "stop":
            assert isinstance(read_json(said.content), dict)
        else:
            assert said.finish == "length"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_every_one_of_several_choices_holds(api: openai.OpenAI, stream: bool) -> None:
    choices = ask(api, stream=stream, n=3, temperature=1.5, seed=11, response_format=json_schema(PERSON))
    assert [wrong_with(said, {"": PERSON}) for said in choices] == ["", "", ""]
    assert len({said.content for said in choices}) > 1


def test_whole_and_streamed_answers_are_the_same(api: openai.OpenAI) -> None:
    fields = {"temperature": 0, "response_format": json_schema(PERSON)}
    assert ask(api, **fields) == ask(api, stream=True, **fields)


def test_log_probabilities_are_those_of_the_answers_tokens(demo: Server) -> None:
    body = {
        "model": "demo",
        "messages": question("Invent some data."),
        "temperature": 1,
        "seed": 2,
        "max_tokens": 100,
        "logprobs": True,
        "top_logprobs": 5,
        "response_format": json_schema(PERSON),
    }
    reply = httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=600)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert faults(choice["message"]["content"], PERSON) == ""
    entries = choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"]
    for entry in entries:
        alternatives = entry["top_logprobs"]
        assert len(alternatives) <= 5
        for logprob in [entry["logprob"], *(other["logprob"] for other in alternatives)]:
            assert isinstance(logprob, (int, float))
            assert -math.inf < logprob <= 0.001
        assert [other["logprob"] for other in alternatives] == sorted(
            (other["logprob"] for other in alternatives), reverse=True
        )


def test_stop_strings_end_json_too(api: openai.OpenAI) -> None:
    (said,) = ask(api, stop=['"age"'], temperature=0, response_format=json_schema(PERSON))
    assert said.finish == "stop"
    assert re.fullmatch(r'\{"name":".{0,12}",', said.content), said


@pytest.mark.parametrize(("digits", "least"), [(40, 10), (3, 3)], ids=["within the grammar", "beyond the grammar"])
def test_min_tokens_keep_an_answer_going_as_long_as_the_grammar_lets_it(
    api: openai.OpenAI, digits: int, least: int
) -> None:
    """The demo model's tokens hold one digit each."""
    reply = api.chat.completions.create(
        model="demo",
        messages=question("How old are you?"),
        temperature=0,
        max_tokens=120,
        extra_body={"guided_regex": rf"\d{{1,{digits}}}", "min_tokens": 10},
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content is not None and choice.message.content.isdigit()
    assert least <= len(choice.message.content) <= digits
    assert reply.usage is not None and reply.usage.completion_tokens >= least


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_max_tokens_cut_json_off_and_say_so(api: openai.OpenAI, stream: bool) -> None:
    (said,) = ask(api, stream=stream, max_tokens=8, response_format=json_schema(LONG))
    assert said.finish == "length"
    assert said.content.startswith('"') and not said.content.endswith('"')


ENDLESS: Schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}


@pytest.mark.parametrize("logprobs", [False, True], ids=["without logprobs", "with logprobs"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "schema", [ENDLESS, {"anyOf": [{"type": "boolean"}, ENDLESS]}], ids=["seen at once", "seen on the way"]
)
def test_an_answer_that_can_never_end_is_told_of_and_harms_nobody(
    demo: Server, api: openai.OpenAI, schema: Schema, stream: bool, logprobs: bool
) -> None:
    beginnings = [word[:size] for word in ("true", "false") for size in range(1, 6)]
    tokens = [httpx.post(f"{demo.url}/tokenize", json={"prompt": text}).json()["tokens"] for text in beginnings]
    fields = {
        "stream": stream,
        "logprobs": logprobs,
        "max_tokens": 20,
        "response_format": json_schema(schema | {"$defs": {"a": ENDLESS | {"additionalProperties": False}}}),
        "logit_bias": {str(ids[0]): -100 for ids in tokens if len(ids) == 1},  # so it goes the endless way
    }
    try:
        (said,) = ask(api, **fields)
        assert said.finish == "length"
    except openai.APIError as error:
        assert error.type == "invalid_request_error"
    assert "Traceback" not in demo.log
    assert [wrong_with(said, {"": PERSON}) for said in ask(api, response_format=json_schema(PERSON))] == [""]


# ---------------------------------------------------------------------------------------------------------------------
# Tools

CITY: Schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def shown_how(cities: list[str]) -> list[dict[str, Any]]:
    """A conversation in which the assistant always calls: even the demo model goes on like this."""
    messages = []
    for city in cities:
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>' % city  # noqa: UP031
        messages += [*question(f"weather in {city}"), {"role": "assistant", "content": call}]
    return messages + question("weather in Madrid")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_a_call_of_the_models_own_accord_is_held_to_the_schema_if_strict(
    api: openai.OpenAI, strict: bool, stream: bool
) -> None:
    (said,) = ask(
        api,
        stream=stream,
        messages=shown_how(["Paris", "London", "Berlin"]),
        tools=[tool("weather", CITY, strict=strict)],
        temperature=0,
        max_tokens=60,
    )
    assert said.finish == "tool_calls"
    for name, arguments in said.calls:
        assert name == "weather"
        assert isinstance(json.loads(arguments), dict)
        assert not strict or faults(arguments, CITY) == ""


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_who_may_answer_in_text_can_do_so_also_with_strict_tools(api: openai.OpenAI, choice: str) -> None:
    fields = {"temperature": 0, "max_tokens": 20, "messages": question("What is the capital of France?")}
    (free,) = ask(api, **fields)
    (said,) = ask(api, tools=[tool("weather", CITY, strict=True)], tool_choice=choice, **fields)
    assert said.calls == []
    assert said.content == free.content  # its template shows no tools


def test_a_format_for_the_text_lets_tools_be_called_too(api: openai.OpenAI) -> None:
    fields = {"tools": [tool("weather", CITY)], "response_format": json_schema(PERSON), "temperature": 1, "seed": 1}
    for said in ask(api, n=4, max_tokens=100, **fields):
        assert wrong_with(said, {"weather": CITY} if said.calls else {"": PERSON}) == ""
    (said,) = ask(api, tool_choice="none", **fields)
    assert wrong_with(said, {"": PERSON}) == ""


@pytest.mark.parametrize("parallel", [False, True], ids=["one call", "several calls"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_required_calls_are_as_many_as_allowed_and_all_hold(api: openai.OpenAI, parallel: bool, stream: bool) -> None:
    tools = [tool("weather", CITY), tool("remember", PERSON)]
    choices = ask(
        api,
        stream=stream,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=parallel,
        n=2,
        temperature=1,
        seed=4,
        max_tokens=90,
    )
    schemas = {"weather": CITY, "remember": PERSON}
    assert [wrong_with(said, schemas, None if parallel else 1) for said in choices] == [""] * 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_named_tool_is_called_exactly_once(api: openai.OpenAI, stream: bool) -> None:
    """OpenAI's function calling guide: a forced function is "exactly one", required is "one or more"."""
    tools = [tool("weather", CITY), tool("remember", PERSON)]
    for said in ask(api, stream=stream, tools=tools, tool_choice=named("weather"), n=2, temperature=1, max_tokens=60):
        assert said.finish == "tool_calls"
        assert wrong_with(said, {"weather": CITY}, most=1) == ""


def test_a_tool_without_parameters_is_called_with_an_object(api: openai.OpenAI) -> None:
    (said,) = ask(api, tools=[tool("now")], tool_choice=named("now"), max_tokens=100, parallel_tool_calls=False)
    assert [name for name, _ in said.calls] == ["now"]
    if said.finish != "length":
        assert isinstance(json.loads(said.calls[0][1]), dict)


def test_max_tokens_cut_a_call_off_and_say_so(api: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"text": LONG}, "required": ["text"], "additionalProperties": False}
    (said,) = ask(api, tools=[tool("note", schema)], tool_choice="required", max_tokens=30)
    assert said.finish == "length"
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(said.calls[0][1] if said.calls else "")


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    "keyword",
    [
        {"not": {"type": "null"}},
        {"type": "array", "uniqueItems": True},
        {"if": {"type": "null"}, "then": True},
        {"type": "array", "contains": {"type": "null"}},
        {"type": "strin"},
        {"type": "string", "pattern": "(?=a)b"},
        {"$ref": "https://example.com/schema.json"},
    ],
    ids=lambda schema: next(reversed(schema)),
)
def test_a_schema_that_no_grammar_can_say_is_refused_by_its_field(api: openai.OpenAI, keyword: Schema) -> None:
    parameters = {"type": "object", "properties": {"x": keyword}, "required": ["x"]}
    for fields, param in [
        ({"response_format": json_schema(keyword)}, "response_format.json_schema.schema"),
        ({"extra_body": {"guided_json": keyword}}, "guided_json"),
        ({"extra_body": {"structured_outputs": {"json": keyword}}}, "structured_outputs.json"),
        (
            {"tools": [tool("a", CITY), tool("b", parameters)], "tool_choice": "required"},
            "tools[1].function.parameters",
        ),
        ({"tools": [tool("b", parameters, strict=True)]}, "tools[0].function.parameters"),
    ]:
        with pytest.raises(openai.BadRequestError) as found:
            ask(api, **fields)
        assert found.value.param == param
        assert found.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"guided_grammar": "neither this nor that"}}, "guided_grammar"),
        ({"extra_body": {"guided_json": "{"}}, "guided_json"),
        ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs.regex"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "guided_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tools": [tool("a")], "tool_choice": named("b")}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(api: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        ask(api, **fields)
    assert found.value.param == param


def test_a_tool_that_nothing_forces_may_have_any_schema(api: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    (said,) = ask(api, tools=[tool("a", schema)], max_tokens=5)
    assert said.finish in ("stop", "length", "tool_calls")
