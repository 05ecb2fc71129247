"""The Gemma 3 decoder (Gemma Team, 2025). Reads config.json as `config.complete` leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightllm import ModelInfo
from lightllm.nn.batch import Batch
from lightllm.nn.layers import Make, RMSNorm
from lightllm_gemma3.config import SLIDING

CosSin = tuple[Tensor, Tensor]


def make_norm(make: Make, size: int, config: Mapping[str, Any]) -> RMSNorm:
    return make.norm(size, config["rms_norm_eps"], offset=1.0)


class Attention(nn.Module):
    """Grouped-query self-attention with normed queries and keys, over a window in layers that slide."""

    def __init__(self, config: Mapping[str, Any], kind: str, make: Make) -> None:
        super().__init__()
        hidden, head_dim, bias = config["hidden_size"], config["head_dim"], config["attention_bias"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        q, kv = heads * head_dim, kv_heads * head_dim
        self.qkv_proj = make.linear(hidden, (q, kv, kv), bias=bias, split="columns")
        self.q_norm, self.k_norm = make_norm(make, head_dim, config), make_norm(make, head_dim, config)
        self.attention = make.attention(
            heads,
            kv_heads,
            head_dim,
            window=config["sliding_window"] if kind == SLIDING else None,
            scale=config["query_pre_attn_scalar"] ** -0.5,
            softcap=config["attn_logit_softcapping"],
        )
        self.o_proj = make.linear(q, hidden, bias=bias, split="rows")
        self.operators = make.operators

    def forward(self, x: Tensor, cos_sin: CosSin, batch: Batch) -> Tensor:
        spec = self.attention.spec
        q, k, v = (
            self.qkv_proj(x).unflatten(-1, (-1, spec.head_dim)).split((spec.heads, spec.kv_heads, spec.kv_heads), 1)
        )
        rotate = self.operators.rotate
        q, k = rotate(self.q_norm(q)[0], cos_sin), rotate(self.k_norm(k)[0], cos_sin)
        y: Tensor = self.o_proj(self.attention(q, k, v, batch))
        return y


class MLP(nn.Module):
    """GeGLU (Shazeer, 2020)."""

    def __init__(self, config: Mapping[str, Any], make: Make) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_up_proj = make.linear(hidden, (inner, inner), split="columns")
        self.down_proj = make.linear(inner, hidden, split="rows")
        self.operators = make.operators

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.operators.gelu_mul(self.gate_up_proj(x)))
        return y


class Layer(nn.Module):
    """Attention and MLP, a norm before and after each."""

    def __init__(self, config: Mapping[str, Any], kind: str, make: Make) -> None:
        super().__init__()
        hidden, self.kind = config["hidden_size"], kind
        self.input_layernorm = make_norm(make, hidden, config)
        self.self_attn = Attention(config, kind, make)
        self.post_attention_layernorm = make_norm(make, hidden, config)
        self.pre_feedforward_layernorm = make_norm(make, hidden, config)
        self.mlp = MLP(config, make)
        self.post_feedforward_layernorm = make_norm(make, hidden, config)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos_sin: Mapping[str, CosSin], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x, _ = self.post_attention_layernorm(self.self_attn(x, cos_sin[self.kind], batch))
        x, residual = self.pre_feedforward_layernorm(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x))[0], residual


class Decoder(nn.Module):
    def __init__(self, info: ModelInfo, make: Make) -> None:
        super().__init__()
        config = info.config
        hidden, kinds = config["hidden_size"], config["layer_types"]
        self.embed_tokens = make.embedding(config["vocab_size"], hidden)
        # rounded as transformers does it: in bfloat16 the square root of 2560 is 50.5
        self.scale = torch.tensor(hidden**0.5, dtype=make.dtype).item()
        self.layers = nn.ModuleList(Layer(config, kind, make) for kind in kinds)
        self.norm = make_norm(make, hidden, config)
        parameters = config["rope_parameters"]
        self.ropes = nn.ModuleDict(
            {k: make.rope(info, config["head_dim"], **parameters[k]) for k in sorted(set(kinds))}
        )

    def forward(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        x, residual = self.embed_tokens(tokens) * self.scale, None
        cos_sin = {kind: rope(positions, x.dtype) for kind, rope in self.ropes.items()}
        for layer in self.layers:
            x, residual = layer(x, residual, cos_sin, batch)
        return self.norm(x, residual)[0]


class Gemma3(nn.Module):
    """`lightllm.Model`. Of Gemma3ForConditionalGeneration what it needs for text; the vision tower is left on disk."""

    weights: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, info: ModelInfo, make: Make) -> None:
        super().__init__()
        tied = info.config["tie_word_embeddings"]
        self.model = Decoder(info, make)
        self.lm_head = make.head(self.model.embed_tokens, tied=tied)
        self.softcap: float | None = info.config["final_logit_softcapping"]
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        if info.architecture == "Gemma3ForConditionalGeneration":
            # as transformers writes them since 5 and 4.52, and wrote them before
            self.prefixes = {
                "model.language_model.": "model.",
                "language_model.model.": "model.",
                "language_model.lm_head.": "lm_head.",
            }
            self.ignored = ("*vision_tower.*", "*multi_modal_projector.*")

    def forward(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        hidden: Tensor = self.model(tokens, positions, batch)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
