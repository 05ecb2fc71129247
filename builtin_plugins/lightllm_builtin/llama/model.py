"""The Llama decoder. Qwen2 and Mistral are this decoder with another `shape`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightllm import ModelInfo, UserError
from lightllm.nn.batch import Batch
from lightllm.nn.layers import Make


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, in config.json's names; ``windows[i]``: layer i's sliding window, or None."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tied: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def read(cls, info: ModelInfo) -> Shape:
        """The fields every family shares, with transformers' defaults where config.json is silent."""
        try:
            hidden, heads = info.config["hidden_size"], info.config["num_attention_heads"]
            shape = cls(
                vocab_size=info.config["vocab_size"],
                hidden_size=hidden,
                intermediate_size=info.config["intermediate_size"],
                heads=heads,
                kv_heads=info.get("num_key_value_heads", heads),
                head_dim=info.get("head_dim", hidden // heads),
                rms_norm_eps=info.get("rms_norm_eps", 1e-6),
                tied=info.get("tie_word_embeddings", False),
                windows=(None,) * info.config["num_hidden_layers"],
            )
        except KeyError as missing:
            raise UserError(f"{info.path}: its config has no {missing}") from None
        if shape.heads % shape.kv_heads:
            raise UserError(f"{info.path}: {shape.heads} attention heads do not divide by {shape.kv_heads} kv heads")
        activation = info.get("hidden_act", "silu")
        if activation != "silu":
            raise UserError(f"{info.path}: hidden_act {activation!r} is not supported by {info.architecture} (silu is)")
        return shape


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, shape: Shape, layer: int, make: Make) -> None:
        super().__init__()
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.qkv_proj = make.linear(shape.hidden_size, (q, kv, kv), bias=shape.qkv_bias, split="columns")
        self.o_proj = make.linear(q, shape.hidden_size, bias=shape.out_bias, split="rows")
        self.attention = make.attention(shape.heads, shape.kv_heads, shape.head_dim, window=shape.windows[layer])
        self.head_dim = shape.head_dim

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        y: Tensor = self.o_proj(self.attention.packed(qkv, cos_sin, batch))
        return y


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, shape: Shape, make: Make) -> None:
        super().__init__()
        inner = shape.intermediate_size
        self.gate_up_proj = make.linear(shape.hidden_size, (inner, inner), bias=shape.mlp_bias, split="columns")
        self.down_proj = make.linear(inner, shape.hidden_size, bias=shape.mlp_bias, split="rows")
        self.operators = make.operators

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.operators.silu_mul(self.gate_up_proj(x)))
        return y


class Layer(nn.Module):
    def __init__(self, shape: Shape, layer: int, make: Make) -> None:
        super().__init__()
        self.input_layernorm = make.norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer, make)
        self.post_attention_layernorm = make.norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape, make)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos_sin: tuple[Tensor, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, cos_sin, batch)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    def __init__(self, info: ModelInfo, shape: Shape, make: Make) -> None:
        super().__init__()
        self.embed_tokens = make.embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, i, make) for i in range(len(shape.windows)))
        self.norm = make.norm(shape.hidden_size, shape.rms_norm_eps)
        self.rope = make.rope(info, shape.head_dim)

    def forward(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        x, residual = self.embed_tokens(tokens), None
        cos_sin = self.rope(positions, x.dtype)
        for layer in self.layers:
            x, residual = layer(x, residual, cos_sin, batch)
        return self.norm(x, residual)[0]


class Llama(nn.Module):
    """`lightllm.Model`: LlamaForCausalLM."""

    weights: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, info: ModelInfo, make: Make) -> None:
        super().__init__()
        shape = self.shape(info)
        self.model = Decoder(info, shape, make)
        self.lm_head = make.head(self.model.embed_tokens, tied=shape.tied)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if shape.tied else {}

    @staticmethod
    def shape(info: ModelInfo) -> Shape:
        """What config.json says. The point where the families differ."""
        shape = Shape.read(info)
        bias = bool(info.get("attention_bias", False))
        return replace(shape, qkv_bias=bias, out_bias=bias, mlp_bias=bool(info.get("mlp_bias", False)))

    def forward(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        hidden: Tensor = self.model(tokens, positions, batch)
        return hidden

    def logits(self, hidden: torch.Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits
