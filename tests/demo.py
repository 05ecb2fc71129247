"""The demo model written out as a Hugging Face folder of any of the three families."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lightllm.assemble import open_checkpoint
from lightllm.config import Config
from lightllm.plugins import Plugins
from lightllm.selection import adapters

NAMES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}


def export_demo(folder: Path, architecture: str = "LlamaForCausalLM", dtype: torch.dtype = torch.float32) -> None:
    """Write the demo model to ``folder`` as ``architecture``; Qwen2 gets the biases it must have, all zero."""
    plugins = Plugins.discover()
    path = plugins.resolve_model("demo", None, Config())
    format_, checkpoint, info = open_checkpoint(plugins, path)
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(**info.config)).state_dict().keys()
    tensors = {
        name: t.to(dtype)
        for name, t in plugins.load(format_)(path, info, adapters(plugins, format_)).tensors(list(names))
    }
    config = dict(info.config) | {"architectures": [architecture], "model_type": NAMES[architecture]}
    if architecture == "MistralForCausalLM":
        config["sliding_window"] = None
    if architecture == "Qwen2ForCausalLM":
        for name in [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            tensors[name.replace("weight", "bias")] = torch.zeros(tensors[name].shape[0], dtype=dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    checkpoint.tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": info.chat_template,
        "bos_token": info.bos_token,
        "eos_token": info.eos_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
