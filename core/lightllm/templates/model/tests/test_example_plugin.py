import shutil
from pathlib import Path

import pytest
from lightllm.testing import check_model, check_plugin, serve
from reference import logits, write_checkpoint

import example_plugin

VOCABULARY = 320
"""Enough for every token of the tokenizer that is borrowed here."""


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    return tmp_path


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_it_computes_what_the_reference_does(folder: Path) -> None:
    """However its work is batched, cached or interrupted."""
    tensors = write_checkpoint(folder, VOCABULARY)
    check_model(folder, lambda tokens: logits(tensors, tokens), plugins=[example_plugin.__name__])


def test_a_server_answers_with_it(folder: Path) -> None:
    tensors = write_checkpoint(folder, VOCABULARY)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    with serve([example_plugin.__name__], model=folder) as server:
        answer = server.complete(prompt, max_tokens=1, temperature=0, logprobs=0, ignore_eos=True)
    (found,) = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert found == pytest.approx(logits(tensors, prompt)[-1].log_softmax(-1).max().item(), abs=1e-3)
