"""Tiny random checkpoints, written by transformers, that between them use every field of config.json we read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
BASE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# name -> (family, config fields, fields of config.json to write by hand, as older checkpoints do)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-gqa": ("llama", {}, {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}, {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}, {}),
    "llama-head-dim": ("llama", {"head_dim": 20}, {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-eos-list": ("llama", {"eos_token_id": [2, 7]}, {}),
    "llama-theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-5},
        {},
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}, {}),
    "llama-llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, {}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}, {}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.9, **YARN}},
        {},
    ),
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 48, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        {},
    ),
    "llama-linear-old": ("llama", {}, {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-llama3-old": ("llama", {}, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "qwen2-yarn-old": ("qwen2", {}, {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}}),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "mistral-window": ("mistral", {"sliding_window": 11, "head_dim": 16}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, {}),
}


BYTES = ("llama", {"vocab_size": 261}, {})
"""Room for 256 bytes and a few special tokens."""


def write_tokenizer(folder: Path, size: int = BASE["vocab_size"]) -> None:
    """A tokenizer.json of ``size`` words: w0, w1, ..."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_checkpoint(folder: Path, case: str, **save: Any) -> Any:
    """Write case ``case`` to ``folder``; returns the transformers model, reloaded from it, in float32."""
    family, fields, by_hand = BYTES if case == "llama-bytes" else CASES[case]
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(sum(case.encode()))
    model = model_class(config_class(**BASE | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **save)
    if by_hand:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.pop("rope_parameters", None)
        path.write_text(json.dumps(config | by_hand))
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
