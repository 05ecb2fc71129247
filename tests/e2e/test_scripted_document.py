"""LightLLM's own document where the model does call: the four examples, unchanged, with each of the three parsers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from e2e.document import PARSERS, PORT, run_example, serve
from e2e.scripted import PLUGIN, Scripted

from lightllm.testing import Server
from lightllm.testing.scripted.checkpoint import ANSWER, SCRIPT

CALLS = {
    "qwen25": '<tool_call>\n{"name": "{{ name }}", "arguments": {{ arguments }}}\n</tool_call>',
    "llama3": '{"name": "{{ name }}", "parameters": {{ arguments }}}',
    "mistral": '[TOOL_CALLS][{"name": "{{ name }}", "arguments": {{ arguments }}}]',
}
ARGUMENTS = {
    "get_current_weather": '{"city": "北京", "unit": "celsius"}',
    "calculate": '{"expression": "25 * 4 + 10"}',
}


def template(parser: str) -> str:
    """Asked with a tool, the model calls it; without one, or told what came of the call, it repeats what it is told."""
    return f"""
{{%- for message in messages %}}{{{{ message.role }}}}: {{{{ message.content or message.tool_calls }}}}{{% endfor -%}}
{{%- set last = messages[-1] %}}
{SCRIPT}
{{%- if tools and last.role == 'user' %}}
{{%- set name = tools[0].function.name %}}
{{%- set arguments = {ARGUMENTS}[name] %}}
{CALLS[parser]}
{{%- else -%}}
{{{{ last.role }}}}: {{{{ last.content }}}}
{{%- endif %}}
{ANSWER}"""


@pytest.fixture(scope="module", params=PARSERS)
def server(
    request: pytest.FixtureRequest, scripted: Scripted, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    file: Path = tmp_path_factory.mktemp("template") / "template.jinja"
    file.write_text(template(request.param), encoding="utf-8")
    options = ("--chat_template", str(file), *PLUGIN)
    python = str(scripted.environment.python)
    with serve(1, model=str(scripted.folder), parser=request.param, more=options, python=python) as running:
        assert running.url.endswith(f":{PORT}")
        yield running


def test_a_question_is_answered(server: Server) -> None:
    assert run_example(0) == "回复: user: 你好,请介绍一下你自己\n"


def test_a_question_is_answered_in_a_stream(server: Server) -> None:
    assert run_example(1) == "user: 请写一个关于人工智能的短文"


def test_the_function_is_called(server: Server) -> None:
    called = ARGUMENTS["get_current_weather"]
    assert run_example(2) == f"模型决定调用函数:\n函数名: get_current_weather\n参数: {called}\n"


def test_the_function_is_called_in_a_stream(server: Server) -> None:
    first, *deltas = run_example(3).split("\n[函数调用: ")
    assert first == ""
    names, fragments = zip(
        *[re.fullmatch(r"(.*)\]\n(?:参数: (.*)\n)?", delta).groups() for delta in deltas], strict=True
    )
    assert names == ("calculate",) + ("None",) * (len(deltas) - 1)
    assert fragments[0] is None
    assert "".join(fragments[1:]) == ARGUMENTS["calculate"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_came_of_the_call_is_answered_in_text(server: Server, stream: bool) -> None:
    messages = [{"role": "user", "content": "北京今天天气怎么样?"}]
    tool = {"type": "function", "function": {"name": "get_current_weather"}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        called = api.chat.completions.create(model="m", messages=messages, tools=[tool]).choices[0].message
        (call,) = called.tool_calls
        assert json.loads(call.function.arguments)["city"] == "北京"
        messages += [called, {"role": "tool", "tool_call_id": call.id, "content": "晴,25°C"}]
        reply = api.chat.completions.create(model="m", messages=messages, tools=[tool], stream=stream)
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    parts = [choice.delta if stream else choice.message for choice in choices]
    assert "".join(part.content or "" for part in parts) == "tool: 晴,25°C"
    assert not any(part.tool_calls for part in parts)
    assert choices[-1].finish_reason == "stop"
