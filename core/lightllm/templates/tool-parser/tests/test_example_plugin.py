import json

import pytest
from lightllm.testing import check_call_grammar, check_plugin, check_tool_parser, serve

import example_plugin
from example_plugin.parser import ExamplePluginParser

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just text.", "Just text.", []),
        ("<<now {}>>", "", [("now", {})]),
        ('It is <<weather {"city": "Rome"}>> there.', "It is  there.", [("weather", {"city": "Rome"})]),
        ('<<weather {"city": "Bonn"}>><<now {}>>', "", [("weather", {"city": "Bonn"}), ("now", {})]),
        ('<<weather {"city": "{\\">>"}>>', "", [("weather", {"city": '{">>'})]),
        ('<<weather {"city": "R', "", [("weather", '{"city": "R')]),
        ("<<now {} and more", " and more", [("now", {})]),
        ("<<now {}> >>", "> >>", [("now", {})]),
        ("1 <<<now {}>>>", "1 <>", [("now", {})]),
        ("1 << 2, <<no {}>>, <<now", "1 << 2, <<no {}>>, <<now", []),
    ],
)
def test_it_reads(text: str, content: str, calls: list[tuple[str, dict[str, str] | str]]) -> None:
    check_tool_parser(ExamplePluginParser, text, tools=TOOLS, content=content, calls=calls)


def test_its_grammar_writes_what_it_reads() -> None:
    check_call_grammar(ExamplePluginParser, TOOLS)


def test_a_server_answers_with_calls() -> None:
    with serve([example_plugin.__name__], options=["--tool-call-parser", "example-plugin"]) as server:
        answer = server.chat("What is it like?", says='Wait. <<weather {"city": "Rome"}>>', tools=TOOLS)
        message = answer["choices"][0]["message"]
        assert message["content"] == "Wait. "
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}

        # whatever the model would say, it has to call now
        named = {"type": "function", "function": {"name": "now"}}
        answer = server.chat("What time is it?", says="I do not know.", tools=TOOLS, tool_choice=named)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"}
