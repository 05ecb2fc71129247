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

from lightllm import ModelInfo, ModelRecord, UserError, WeightFormatRecord, hookimpl
from lightllm.assemble import build_engine, open_checkpoint
from lightllm.checks import Wrong
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.plugins import Plugins, Recipe


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


def test_a_weight_format_that_fails_to_look_at_a_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(path: Path) -> str | None:
        raise IndexError("too short")

    record = WeightFormatRecord(name="frail", target="a:B", checkpoint="a:C", matches=fails)
    plugin = ModuleType("mine")
    vars(plugin)["lightllm_weight_formats"] = hookimpl(specname="lightllm_weight_formats")(lambda: [record])
    plugins = Plugins.discover(extra=[("mine", plugin)])
    with pytest.raises(UserError, match=r"no model .*frail: .*IndexError: too short"):
        open_checkpoint(plugins, tmp_path)
    assert "mine/frail (extra) is passed over: IndexError: too short" in caplog.text
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 7}))
    save_file({}, tmp_path / "model.safetensors")
    assert open_checkpoint(plugins, tmp_path)[0].address == "safetensors/safetensors"
    strict = Recipe(strict=True, blocked=tuple(r.name for r in plugins.report() if r.status != "ok"))
    with pytest.raises(Wrong, match=r"mine/frail \(extra\) failed: IndexError: too short"):
        open_checkpoint(Plugins.discover(strict, extra=[("mine", plugin)]), tmp_path / "nothing")
