"""What is put together before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from checkpoints import write_checkpoint
from safetensors.torch import save_file

from lightllm import ModelInfo, ModelRecord, UserError, hookimpl
from lightllm.assemble import build_engine, open_checkpoint
from lightllm.checks import Wrong
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.plugins import Plugins


def opened(folder: Path, complete: Any, architecture: str = "NestedForCausalLM") -> ModelInfo:
    """A checkpoint whose config nests its text model's, with a plugin that serves it."""
    config = {"architectures": [architecture], "text_config": {"vocab_size": 7}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    record = ModelRecord(name="nested", target="no:matter", architectures=("NestedForCausalLM",), complete=complete)
    plugin = ModuleType("nested")
    vars(plugin)["lightllm_models"] = hookimpl(specname="lightllm_models")(lambda: [record])
    return open_checkpoint(Plugins.discover(extra=[("nested", plugin)]), folder)[2]


def flat(info: ModelInfo) -> ModelInfo:
    return msgspec.structs.replace(info, config=info.config | info.config["text_config"])


def test_ends_that_the_model_cannot_write_are_none(tmp_path: Path) -> None:
    """Logits have no place for them."""
    write_checkpoint(tmp_path, "llama-gqa")
    vocabulary = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, vocabulary, -1]}))
    engine = build_engine(Config(device="cpu", max_total_tokens=100), Plugins.discover(quiet=True), tmp_path)
    params = SamplingParams(max_tokens=3, min_tokens=2, temperature=0.0)
    (answer,) = engine.generate(Generate(id="", prompt=[1, 2], params=params)).values()
    assert answer.error is None and len(answer.tokens) >= 2
    assert engine.scheduler.eos_token_ids == (7,)


def test_a_model_plugin_completes_what_its_checkpoints_say(tmp_path: Path) -> None:
    assert opened(tmp_path, flat).config["vocab_size"] == 7
    assert "vocab_size" not in opened(tmp_path, None).config
    assert "vocab_size" not in opened(tmp_path, flat, "SomeoneElsesForCausalLM").config


def test_a_completion_that_fails_names_its_plugin(tmp_path: Path) -> None:
    def refuse(info: ModelInfo) -> ModelInfo:
        raise UserError("hidden_act 'relu' is not supported")

    with pytest.raises(UserError, match=r"^hidden_act 'relu' is not supported$"):
        opened(tmp_path, refuse)
    with pytest.raises(Wrong, match=r"nested/nested .*KeyError"):
        opened(tmp_path, lambda info: info.config["absent"])
