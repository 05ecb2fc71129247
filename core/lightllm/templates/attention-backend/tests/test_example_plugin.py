from pathlib import Path

import pytest
from lightllm.testing import check_attention_backend, check_plugin, serve

import example_plugin
from example_plugin.backend import ExamplePluginAttention


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_attention(dtype: str) -> None:
    check_attention_backend(ExamplePluginAttention, dtype=dtype)


def test_a_server_answers_as_with_its_own(tiny_llama: Path) -> None:
    def answer(*options: str) -> list[float]:
        with serve([example_plugin.__name__], model=tiny_llama, options=options) as server:
            asked = {"max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
            choice = server.complete("An answer that goes on", **asked)["choices"][0]
            assert ("attention backend: example-plugin/" in server.log) == bool(options)
            return list(choice["logprobs"]["token_logprobs"])

    assert answer("--attention-backend", "example-plugin") == pytest.approx(answer(), abs=1e-3)
