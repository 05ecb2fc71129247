"""Checkpoints of the real models' shapes with random weights: speed does not depend on what a model knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightllm.testing import byte_tokenizer

COMMON = {
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    # config.json of meta-llama/Meta-Llama-3-8B
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 16_384,  # 8,192 in the original, which leaves no room for an answer to 8k
        "rope_theta": 500_000.0,
    },
    # Qwen/Qwen2.5-7B
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
    },
    # mistralai/Mistral-7B-v0.3
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32_768,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
    },
    # to try the benchmark itself, on any machine
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
    },
}


def tensors(config: dict[str, Any], layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "lm_head.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        for name, out in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{at}.self_attn.{name}_proj.weight", (out, hidden)
            if config["model_type"] == "qwen2":
                yield f"{at}.self_attn.{name}_proj.bias", (out,)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{at}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)


def write(folder: Path, shape: str, device: str, layers: int | None = None) -> Path:
    """bfloat16, in files of about 2 GB, drawn on the device: a CPU would take minutes. ``layers``: fewer than all."""
    config = COMMON | SHAPES[shape]
    config["num_hidden_layers"] = layers = layers or config["num_hidden_layers"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    generator = torch.Generator(device).manual_seed(0)
    held: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}  # tensor -> the file it is in
    number = 0
    for name, size in [*tensors(config, layers), ("", ())]:
        if held and (not name or sum(t.nbytes for t in held.values()) > 2e9):
            file = f"model-{number:05}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(held, file)
            held, number = {}, number + 1
        if name.endswith("norm.weight"):
            held[name] = torch.ones(size, dtype=torch.bfloat16)
        elif name:
            drawn = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
            held[name] = drawn.cpu()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder
