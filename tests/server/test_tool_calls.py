"""Tool calls and reasoning through the official client, with the built-in parsers, against a scripted engine."""

import json

import msgspec
import pytest

from lightllm_builtin.reasoning.think import Qwen3Parser
from lightllm_builtin.tool_parsers.qwen25 import Qwen25Parser

WEATHER = {"type": "function", "function": {"name": "get_current_weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "get_current_weather", "arguments": {"city": "北京", "n": [1, "}"]}}\n</tool_call>'
ARGUMENTS = {"city": "北京", "n": [1, "}"]}


@pytest.fixture(scope="module")
def _tooled(kit):
    with kit.running(tool_parser=Qwen25Parser, reasoning_parser=Qwen3Parser) as server:
        yield server


@pytest.fixture
def tooled(_tooled):
    _tooled.engine.__init__()
    _tooled.engine.ready = msgspec.structs.replace(_tooled.engine.ready, max_model_len=2000)
    return _tooled


def test_calls_come_apart_from_the_content(tooled, kit):
    tooled.engine.script = kit.says(f"Let me see. {CALL}\n{CALL}")
    choice = tooled.chat(tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert [call.type for call in choice.message.tool_calls] == ["function"] * 2
    assert [call.function.name for call in choice.message.tool_calls] == ["get_current_weather"] * 2
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [ARGUMENTS] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_a_call_without_text_has_null_content(tooled, kit):
    tooled.engine.script = kit.says(CALL)
    assert tooled.post(tools=[WEATHER]).json()["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_streamed_calls_are_numbered_and_every_delta_has_a_name_field(tooled, kit, size):
    tooled.engine.script = kit.says(f"{CALL}{CALL}", size=size)
    chunks = [json.loads(event) for event in tooled.events(tools=[WEATHER])[:-1]]
    deltas = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", ())]
    for index in (0, 1):
        first, *rest = [delta for delta in deltas if delta["index"] == index]
        assert first["type"] == "function" and first["id"]
        assert first["function"] == {"name": "get_current_weather", "arguments": ""}
        assert rest and all(delta["function"]["name"] is None and "id" not in delta for delta in rest)
        assert json.loads("".join(delta["function"]["arguments"] for delta in rest)) == ARGUMENTS
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_first_arguments_leave_while_the_call_is_being_written(tooled, kit):
    tooled.engine.script = kit.says(CALL)
    fragments = [
        call.function.arguments
        for chunk in tooled.chat(tools=[WEATHER], stream=True)
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert len([f for f in fragments if f]) > 3


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_a_call_is_content(tooled, kit, fields):
    tooled.engine.script = kit.says(CALL)
    choice = tooled.chat(**fields).choices[0]
    assert choice.message.content == CALL
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


def test_one_call_at_most_when_calls_may_not_be_parallel(tooled, kit):
    tooled.engine.script = kit.says(f"{CALL}{CALL}")
    assert len(tooled.chat(tools=[WEATHER], parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_a_call_that_is_cut_off_says_so(tooled, kit):
    tooled.engine.script = kit.says(CALL)
    choice = tooled.chat(tools=[WEATHER], max_tokens=70).choices[0]
    assert choice.finish_reason == "length"
    assert CALL.encode()[:70].decode(errors="ignore").endswith(choice.message.tool_calls[0].function.arguments)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_apart_and_before_tool_calls(tooled, kit, stream):
    tooled.engine.script = kit.says(f"<think>\nIs {CALL} right?\n</think>\n\nYes. {CALL}")
    reply = tooled.chat(tools=[WEATHER], stream=stream)
    parts = [chunk.choices[0].delta for chunk in reply] if stream else [reply.choices[0].message]
    assert "".join(getattr(p, "reasoning_content", None) or "" for p in parts) == f"Is {CALL} right?"
    assert "".join(p.content or "" for p in parts) == "Yes."
    arguments = "".join(call.function.arguments for p in parts for call in p.tool_calls or ())
    assert json.loads(arguments) == ARGUMENTS


def test_two_tools_of_one_name_are_refused(tooled):
    error = tooled.post(tools=[WEATHER, WEATHER])
    assert error.status_code == 400
    assert error.json()["error"]["param"] == "tools[1].function.name"
    assert "get_current_weather" in error.json()["error"]["message"]
