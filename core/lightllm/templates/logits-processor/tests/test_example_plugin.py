import pytest
from lightllm.testing import check_logits_processor, check_plugin, serve

import example_plugin
from example_plugin.processor import ExamplePluginProcessor


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_changes_only_its_own_rows(size: int) -> None:
    check_logits_processor(ExamplePluginProcessor, extra={"no_repeat_ngram_size": size})


def test_a_server_does_not_repeat_itself() -> None:
    said = "tralala lala lala"
    with serve([example_plugin.__name__]) as server:

        def answer(**fields: object) -> str:
            choice = server.chat("Sing!", says=said, max_tokens=len(said), **fields)["choices"][0]
            return str(choice["message"]["content"])

        assert answer() == said
        # a letter is a token; another "ala" must not follow
        text = answer(no_repeat_ngram_size=3)
        assert text.startswith("tralal") and not text.startswith("tralala")

        with pytest.raises(AssertionError, match="no_repeat_ngram_size must be a whole number from 1 on"):
            answer(no_repeat_ngram_size=0)
