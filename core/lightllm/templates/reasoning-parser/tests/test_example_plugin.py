import json

import pytest
from lightllm.testing import check_plugin, check_reasoning_parser, serve

import example_plugin
from example_plugin.parser import ExamplePluginParser


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("Just text.", "", "Just text."),
        ("<<thought>>Well.<<end>>Yes.", "Well.", "Yes."),
        ("<<thought>>1 << 2, <<e", "1 << 2, <<e", ""),
        ("<<thought>><<end>><<thought>>", "", "<<thought>>"),
        ("<<thou", "", "<<thou"),
    ],
)
def test_it_reads(text: str, reasoning: str, content: str) -> None:
    check_reasoning_parser(ExamplePluginParser, text, reasoning=reasoning, content=content)


def test_the_prompt_may_have_begun_the_thought() -> None:
    check_reasoning_parser(
        ExamplePluginParser, "Well.<<end>>Yes.", prompt="Is it?<<thought>>", reasoning="Well.", content="Yes."
    )


def test_a_server_keeps_the_thought_apart() -> None:
    with serve([example_plugin.__name__], options=["--reasoning-parser", "example-plugin"]) as server:
        (choice,) = server.chat("Is it?", says="<<thought>>Well.<<end>>Yes.")["choices"]
        assert choice["message"]["reasoning_content"] == "Well."
        assert choice["message"]["content"] == "Yes."

        # only the answer is held to the form that was asked for
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "boolean"}}}
        (choice,) = server.chat("Is it?", says="<<thought>>Well.<<end>>true", response_format=form)["choices"]
        assert choice["message"]["reasoning_content"] == "Well."
        assert json.loads(choice["message"]["content"]) is True
