from pathlib import Path

import pytest
from lightllm.testing import check_linear_method, check_plugin, serve

import example_plugin
from example_plugin.int8 import ExamplePluginLinear


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_it_multiplies() -> None:
    check_linear_method(ExamplePluginLinear, tolerance=0.02)


def test_a_server_answers_nearly_as_with_whole_weights(tiny_llama: Path) -> None:
    def answer(*options: str) -> list[float]:
        with serve([example_plugin.__name__], model=tiny_llama, options=options) as server:
            asked = {"max_tokens": 1, "temperature": 0, "logprobs": 0, "echo": True}
            choice = server.complete("These tokens are given, so both see the same", **asked)["choices"][0]
            return [value for value in choice["logprobs"]["token_logprobs"] if value is not None]

    whole, rounded = answer(), answer("--quantization", "example-plugin")
    assert rounded == pytest.approx(whole, abs=0.5)
    assert rounded != whole
