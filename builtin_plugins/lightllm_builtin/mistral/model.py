"""Mistral: the Llama decoder without biases, with a sliding window on every layer where config.json gives one."""

from __future__ import annotations

from dataclasses import replace

from lightllm import ModelInfo
from lightllm_builtin.llama.model import Llama, Shape


class Mistral(Llama):
    """`lightllm.Model`: MistralForCausalLM."""

    @staticmethod
    def shape(info: ModelInfo) -> Shape:
        shape = Shape.read(info)
        # null means none; an absent key means the 4096 of Mistral 7B v0.1, as transformers reads it
        window = info.config.get("sliding_window", 4096)
        return replace(shape, windows=(window,) * len(shape.windows))
