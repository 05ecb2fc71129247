from pathlib import Path

import pytest
from lightllm.testing import check_operators, check_plugin, serve

import example_plugin
from example_plugin.operators import ExamplePluginOperators


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes(dtype: str) -> None:
    check_operators(ExamplePluginOperators, dtype=dtype)


def test_a_server_answers_nearly_as_with_its_own(tiny_llama: Path) -> None:
    def answer(*options: str) -> list[float]:
        with serve([example_plugin.__name__], model=tiny_llama, options=options) as server:
            assert ("operator: example-plugin/" in server.log) == bool(options)
            asked = {"max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
            choice = server.complete("An answer that goes on", **asked)["choices"][0]
            return list(choice["logprobs"]["token_logprobs"])

    assert answer("--operators", "example-plugin") == pytest.approx(answer(), abs=1e-3)
