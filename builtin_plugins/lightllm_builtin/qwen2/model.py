"""Qwen2 and Qwen2.5: the Llama decoder with biases on q, k, v and an optional sliding window on the upper layers."""

from __future__ import annotations

from dataclasses import replace

from lightllm import ModelInfo
from lightllm_builtin.llama.model import Llama, Shape


class Qwen2(Llama):
    """`lightllm.Model`: Qwen2ForCausalLM."""

    @staticmethod
    def shape(info: ModelInfo) -> Shape:
        shape = Shape.read(info)
        window = info.get("sliding_window", 4096) if info.get("use_sliding_window", False) else None
        first = info.get("max_window_layers", 28)
        kinds = info.get("layer_types") or [
            "sliding_attention" if i >= first else "full_attention" for i in range(len(shape.windows))
        ]
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return replace(shape, qkv_bias=True, windows=windows)
