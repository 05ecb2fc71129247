import pytest
from lightllm.testing import check_grammar_backend, check_plugin, serve

import example_plugin
from example_plugin.backend import ExamplePluginBackend


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_it_holds_answers_to_grammars() -> None:
    check_grammar_backend(ExamplePluginBackend, without=("Rules", "Triggered"))


def test_a_server_holds_its_answers_to_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["S", "M"]}},
        "required": ["size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    with serve([example_plugin.__name__], options=["--grammar-backend", "example-plugin"]) as server:
        answer = server.chat("Which size?", says='{"size":"M"}', response_format=form)
        assert answer["choices"][0]["message"]["content"] == '{"size":"M"}'

        answer = server.chat("Which size?", says='I think it is { "size": "M" }', response_format=form)
        assert answer["choices"][0]["message"]["content"] in ('{"size":"S"}', '{"size":"M"}')

        with pytest.raises(AssertionError, match="knows no Rules"):
            server.chat("Which size?", guided_grammar='start: "S" | "M"')
