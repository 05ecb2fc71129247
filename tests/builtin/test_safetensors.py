"""Hugging Face folders: what they say of themselves, and their tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from lightllm import ModelInfo, UserError
from lightllm_builtin.gguf import matches as gguf_matches
from lightllm_builtin.safetensors import matches
from lightllm_builtin.safetensors.checkpoint import FolderCheckpoint
from lightllm_builtin.safetensors.weights import SafetensorsWeights


def write(folder: Path, **files: Any) -> Path:
    """JSON files by their name without suffix; ``config`` has what every checkpoint must have."""
    files["config"] = {"architectures": ["LlamaForCausalLM"]} | files.get("config", {})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    info = ModelInfo(path=str(folder), architecture="LlamaForCausalLM", config={})
    return dict(SafetensorsWeights(folder, info).tensors(()))


@pytest.mark.parametrize("size", ["10GB", "20KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_those_transformers_saved(tmp_path: Path, size: str, dtype: torch.dtype) -> None:
    model = write_checkpoint(tmp_path, "llama-biases").to(dtype)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    assert matches(tmp_path) is None
    tensors, expected = read(tmp_path), model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == dtype and torch.equal(tensors[name], expected[name]) for name in expected)


def test_the_size_is_that_of_the_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path, ModelInfo(path="", architecture="", config={}))
    assert weights.nbytes() == (tmp_path / "model.safetensors").stat().st_size


def test_without_an_index_every_file_counts_under_any_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "two.safetensors")
    assert read(tmp_path).keys() == {"a", "b"}


def test_a_second_copy_of_the_weights_beside_the_index_is_left_alone(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"tok_embeddings": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read(tmp_path).keys() == {"a"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-gqa", max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        read(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 60, -1], ids=["empty", "in the length", "in the header", "in the data"])
def test_a_file_cut_off_anywhere_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(100), "bias": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors.*is it complete"):
        read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json|its index names"):
        read(tmp_path)


def test_only_folders_with_config_and_safetensors_match(tmp_path: Path) -> None:
    assert matches(tmp_path / "absent") == "not a folder"
    assert matches(tmp_path) == "no config.json"
    write(tmp_path)
    assert matches(tmp_path) == "no *.safetensors"
    (tmp_path / "pytorch_model.bin").touch()
    assert "convert it to safetensors" in (matches(tmp_path) or "")
    (tmp_path / "model.safetensors").touch()
    assert matches(tmp_path) is None


def test_a_folder_of_both_formats_is_read_as_safetensors(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.safetensors").touch()
    assert matches(tmp_path) is None and gguf_matches(tmp_path) is not None


def test_what_the_folder_says_of_itself(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        config={"hidden_size": 48, "eos_token_id": 2},
        generation_config={"temperature": 0.6, "eos_token_id": [2, 7]},
        tokenizer_config={"chat_template": "{{ messages }}", "bos_token": "<s>", "eos_token": {"content": "</s>"}},
    )
    info = FolderCheckpoint(folder).info()
    assert (info.path, info.architecture) == (str(folder), "LlamaForCausalLM")
    assert info.config["hidden_size"] == 48
    assert info.generation["temperature"] == 0.6
    assert info.eos_token_ids() == (2, 7)
    assert (info.chat_template, info.bos_token, info.eos_token) == ("{{ messages }}", "<s>", "</s>")


def test_config_json_alone_is_enough(tmp_path: Path) -> None:
    info = FolderCheckpoint(write(tmp_path)).info()
    assert info.generation == {}
    assert info.chat_template is info.bos_token is info.eos_token is None


def test_older_checkpoints_name_their_special_tokens_in_a_file_of_its_own(tmp_path: Path) -> None:
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    folder = write(tmp_path, special_tokens_map=special, tokenizer_config={"eos_token": "<end>"})
    info = FolderCheckpoint(folder).info()
    assert (info.bos_token, info.eos_token) == ("<s>", "<end>")


def test_the_template_file_goes_before_tokenizer_config(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_config={"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("new ✓", encoding="utf-8")
    assert FolderCheckpoint(folder).info().chat_template == "new ✓"


def test_of_several_templates_the_default_one_is_used(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert FolderCheckpoint(write(tmp_path, tokenizer_config={"chat_template": named})).info().chat_template == "d"
    assert FolderCheckpoint(write(tmp_path, tokenizer_config={"chat_template": named[:1]})).info().chat_template == "r"


@pytest.mark.parametrize("content", ["{", "[]", "\ud800"], ids=["cut off", "no object", "no UTF-8"])
def test_a_bad_config_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"config\.json"):
        FolderCheckpoint(tmp_path).info()


@pytest.mark.parametrize("architectures", [[], None])
def test_a_config_without_architecture_is_said_to_be_so(tmp_path: Path, architectures: list[str] | None) -> None:
    with pytest.raises(UserError, match="names no architecture"):
        FolderCheckpoint(write(tmp_path, config={"architectures": architectures})).info()


def test_the_tokenizer_is_the_folders_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert FolderCheckpoint(tmp_path).tokenizer().encode("world hello").ids == [1, 0]


def test_a_sentencepiece_model_is_converted(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    text = tmp_path / "corpus.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=310, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    write(tmp_path, config={"model_type": "llama"}, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    reference = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = FolderCheckpoint(tmp_path).tokenizer()
    said = "the lazy fox"
    assert tokenizer.encode(said, add_special_tokens=False).ids == reference.encode(said)


def test_a_sentencepiece_model_says_what_reading_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        FolderCheckpoint(tmp_path).tokenizer()


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        FolderCheckpoint(write(tmp_path)).tokenizer()


def test_a_broken_tokenizer_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        FolderCheckpoint(tmp_path).tokenizer()


def test_files_are_closed_when_the_tensors_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, tmp_path / "model.safetensors")
    tensors = read(tmp_path)
    shutil.rmtree(tmp_path)
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4]
