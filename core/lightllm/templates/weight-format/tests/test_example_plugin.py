import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightllm.testing import check_plugin, check_weight_format, serve
from safetensors.torch import load_file

import example_plugin


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """The tiny Llama in this format."""
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(tiny_llama / name, tmp_path)
    tensors = load_file(tiny_llama / "model.safetensors")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    return tmp_path


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_it_gives_every_tensor(folder: Path, tiny_llama: Path) -> None:
    (record,) = example_plugin.lightllm_weight_formats()
    check_weight_format(record, folder, load_file(tiny_llama / "model.safetensors"))


def test_it_says_what_is_wrong_with_a_file(folder: Path) -> None:
    file = folder / "weights.npz"
    file.write_bytes(file.read_bytes()[:1000])
    said = r"weights\.npz cannot be read .* is it complete\?"
    with pytest.raises(AssertionError, match=said), serve([example_plugin.__name__], model=folder):
        pass


def test_a_server_answers_as_with_the_original(folder: Path, tiny_llama: Path) -> None:
    def answer(model: Path) -> list[float]:
        with serve([example_plugin.__name__], model=model) as server:
            choice = server.complete("Go on", max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)["choices"][0]
            return list(choice["logprobs"]["token_logprobs"])

    assert answer(folder) == answer(tiny_llama)
