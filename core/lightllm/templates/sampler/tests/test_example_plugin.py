from pathlib import Path

from lightllm.testing import check_plugin, check_sampler, serve

import example_plugin
from example_plugin.sampler import ExamplePluginSampler


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_it_samples() -> None:
    check_sampler(ExamplePluginSampler)


def test_a_server_draws_with_it(tiny_llama: Path) -> None:
    with serve([example_plugin.__name__], model=tiny_llama, options=["--sampler", "example-plugin"]) as server:
        assert "sampler: example-plugin/example-plugin" in server.log

        def answers(**fields: object) -> list[str]:
            choices = server.complete("Say anything", max_tokens=16, ignore_eos=True, **fields)["choices"]
            return [choice["text"] for choice in choices]

        assert answers(temperature=0) == answers(temperature=1, top_k=1)
        assert answers(seed=1, n=3) == answers(seed=1, n=3) != answers(seed=2, n=3)
        assert len(set(answers(seed=1, n=3))) == 3
