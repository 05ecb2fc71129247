"""DeepSeek V3.1's calls, as its chat template writes them, in every cutting and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest

import lightllm_parser_example
from lightllm import ModelInfo
from lightllm.testing import (
    Server,
    TextMatcher,
    check_call_grammar,
    check_plugin,
    check_tool_parser,
    serve,
    write_scripted,
)
from lightllm_parser_example.parser import ARGUMENTS, BEGIN, CALL, CALL_END, END, MARKS, DeepSeekV31Parser

# The part of deepseek-ai/DeepSeek-V3.1's chat template that writes calls, shortened.
TEMPLATE = """{{ content }}{%- for tool in calls -%}
{%- if loop.first -%}{{ '<｜tool▁calls▁begin｜>' }}{%- endif -%}
{{ '<｜tool▁call▁begin｜>' + tool.name + '<｜tool▁sep｜>' + tool.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor -%}{{ '<｜tool▁calls▁end｜>' if calls }}"""
V3_TEMPLATE = "{{ '<｜tool▁sep｜>' + name + '\\n```json\\n' + arguments + '\\n```<｜tool▁call▁end｜>' }}"


def tool(name: str, strict: bool = False, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TOOLS = [tool("get_weather", city={"type": "string"}), tool("get", strict=True, n={"type": "integer"}), tool("now")]
LOOSE = [tool("get_weather", city={"type": "string"}), tool("get", n={"type": "integer", "minimum": 0, "maximum": 999})]
PARIS, SEVEN = '{"city":"Paris"}', '{"n":7}'
WEATHER = ("get_weather", PARIS)


def written(*calls: tuple[str, str], content: str = "") -> str:
    given = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return jinja2.Template(TEMPLATE).render(content=content, calls=given)


def check(text: str, content: str, *calls: tuple[str, str], **options: Any) -> None:
    check_tool_parser(DeepSeekV31Parser, text, tools=TOOLS, content=content, calls=calls, **options)


def test_the_plugin_is_valid() -> None:
    check_plugin(lightllm_parser_example)


@pytest.mark.parametrize(
    ("content", "calls"),
    [
        ("Hello there.", []),
        ("", [WEATHER]),
        ("Let me look.\n", [WEATHER]),
        ("", [WEATHER, ("get", SEVEN), ("now", "{}")]),
        ("", [("get_weather", '{"city":"<｜tool▁ 天气 \\"<｜\\""}')]),
    ],
)
def test_what_the_template_writes_is_read(content: str, calls: list[tuple[str, str]]) -> None:
    check(written(*calls, content=content), content, *calls)


@pytest.mark.parametrize(
    "text",
    [
        "a < b <｜ <｜tool▁ <｜tool▁call▁begin",
        f"{BEGIN}{CALL}launch{ARGUMENTS}{{}}{CALL_END}{END}",
        f"{BEGIN}{CALL}get_weather",
        f"{BEGIN}{CALL}get_weather{CALL_END}",
        f"{BEGIN}Hello{END}",
        f"{CALL}{CALL}{BEGIN}{BEGIN}{ARGUMENTS}{END}",
        f"{CALL}{ARGUMENTS}{{}}",
    ],
)
def test_what_is_no_call_to_a_declared_tool_is_content_as_it_was_written(text: str) -> None:
    check(text, text)


def test_after_what_is_no_call_comes_a_call() -> None:
    no_call = f"{BEGIN}{CALL}launch{ARGUMENTS}{{}}{CALL_END}"
    check(f"{no_call}{CALL}{WEATHER[0]}{ARGUMENTS}{PARIS}{CALL_END}{END}", no_call, WEATHER)


def test_marks_inside_of_arguments_stay() -> None:
    arguments = f'{{"city":"{ARGUMENTS}{BEGIN}{END}{CALL}"}}'
    check(written(("get_weather", arguments)), "", ("get_weather", arguments), grammar=False)


def test_the_outer_marks_may_be_missing() -> None:
    check(f"{CALL}get{ARGUMENTS}{SEVEN}{CALL_END}", "", ("get", SEVEN), grammar=False)


def test_arguments_leave_as_they_come() -> None:
    parser = DeepSeekV31Parser(TOOLS)
    for mark in (BEGIN, CALL, "get", ARGUMENTS):
        parser.push(mark)
    assert "".join(event.fragment for piece in '{"n": 7' for event in parser.push(piece)) == '{"n": 7'


def test_what_the_grammar_allows_is_read_as_calls() -> None:
    check_call_grammar(DeepSeekV31Parser, TOOLS)


@pytest.mark.parametrize(("parameters", "any_object"), [(None, False), ({}, True), ({"type": "object"}, True)])
def test_a_tool_without_parameters_takes_no_arguments(parameters: dict[str, Any] | None, any_object: bool) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    grammar = DeepSeekV31Parser(tools).grammar(required=True, parallel=False)
    held = TextMatcher(special=MARKS)
    assert held.fits(grammar, written(("f", "{}")))
    assert held.fits(grammar, written(("f", '{"a":1}'))) == any_object


@pytest.mark.parametrize(
    ("template", "tokens", "why_not"),
    [
        (TEMPLATE, MARKS, None),
        (TEMPLATE, ["<tool_call>"], "the tokenizer does not know"),
        (V3_TEMPLATE, MARKS, "```json"),
    ],
)
def test_the_model_s_own_files_tell_its_format(template: str, tokens: list[str], why_not: str | None) -> None:
    (record,) = lightllm_parser_example.lightllm_tool_parsers()
    info = ModelInfo(path="/m", architecture="A", config={}, chat_template=template)
    found = record.matches(info, tokens)
    assert found is None if why_not is None else why_not in found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its model has the format's marks as special tokens, so that the parser is chosen by itself."""
    folder = tmp_path_factory.mktemp("deepseek") / "model"
    write_scripted(folder, special=MARKS)
    with serve("lightllm_parser_example", model=folder) as server:
        yield server


def test_a_call_comes_whole_and_streamed(server: Server) -> None:
    assert "tool parser: parser-example/deepseekv31" in server.log
    text = written(WEATHER, ("get", SEVEN), content="One moment.")
    (choice,) = server.chat("?", says=text, tools=LOOSE)["choices"]
    assert choice["message"]["content"] == "One moment."
    assert choice["finish_reason"] == "tool_calls"
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"]["tool_calls"]]
    assert calls == [WEATHER, ("get", SEVEN)]
    deltas = [chunk["choices"][0]["delta"] for chunk in server.stream("?", says=text, tools=LOOSE)]
    assert "".join(delta.get("content") or "" for delta in deltas) == "One moment."
    streamed = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert [function["name"] for function in streamed if function.get("name")] == ["get_weather", "get"]
    assert "".join(function["arguments"] for function in streamed) == PARIS + SEVEN


def test_a_call_can_be_forced(server: Server) -> None:
    """The model would rather say something else."""
    choice = {"type": "function", "function": {"name": "get"}}
    answer = server.chat("?", says="No, thank you.", tools=LOOSE, tool_choice=choice, max_tokens=60)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get"
    assert isinstance(json.loads(call["function"]["arguments"])["n"], int)


def test_without_its_marks_in_the_tokenizer_it_is_chosen_by_name() -> None:
    with serve("lightllm_parser_example", options=["--tool-call-parser", "deepseekv31"]) as server:
        answer = server.chat("?", says=written(WEATHER), tools=LOOSE)
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == PARIS
