"""A decoder of layers ``x + attention(norm(x)) + feed_forward(norm(x))``.

It is built by ``make``, which decides dtype, device, quantization and what of it this process holds. The tensors of a
step belong to many requests, laid end to end: [tokens, ...], without a batch dimension. Which of them see each other is
the attention's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightllm import ModelInfo
from lightllm.nn.batch import Batch
from lightllm.nn.layers import Make
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, info: ModelInfo, make: Make) -> None:
        super().__init__()
        hidden, heads = info.config["hidden_size"], info.config["num_attention_heads"]
        inner, kv_heads = info.config["intermediate_size"], info.get("num_key_value_heads", heads)
        self.head_dim = hidden // heads
        self.norm = make.norm(hidden, info.get("rms_norm_eps", 1e-6))
        # "columns" and "rows": how tensor-parallel ranks divide the weight among them
        q, kv = heads * self.head_dim, kv_heads * self.head_dim
        self.qkv = make.linear(hidden, (q, kv, kv), split="columns")
        self.attention = make.attention(heads, kv_heads, self.head_dim)
        self.out = make.linear(q, hidden, split="rows")
        self.up = make.linear(hidden, inner, split="columns")
        self.down = make.linear(inner, hidden, split="rows")
        self.rotate = make.operators.rotate

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        y, _ = self.norm(x)
        # of this rank's heads only, so their number is the attention's to say
        heads, kv_heads = self.attention.spec.heads, self.attention.spec.kv_heads
        q, k, v = self.qkv(y).unflatten(-1, (-1, self.head_dim)).split([heads, kv_heads, kv_heads], dim=1)
        attended = self.out(self.attention(self.rotate(q, cos_sin), self.rotate(k, cos_sin), v, batch))
        result: Tensor = x + attended + self.down(F.gelu(self.up(y)))
        return result


class ExamplePluginModel(nn.Module):
    """`lightllm.Model`. The checkpoint names its tensors as this module does: ``layers.0.norm.weight``."""

    # but for those that are packed: the checkpoint's q, k and v become one layer
    weights: ClassVar[Mapping[str, tuple[str, ...]]] = {"qkv": ("q", "k", "v")}

    def __init__(self, info: ModelInfo, make: Make) -> None:
        super().__init__()
        hidden = info.config["hidden_size"]
        self.embed = make.embedding(info.config["vocab_size"], hidden)
        self.rope = make.rope(info, hidden // info.config["num_attention_heads"])
        self.layers = nn.ModuleList(Layer(info, make) for _ in range(info.config["num_hidden_layers"]))
        self.norm = make.norm(hidden, info.get("rms_norm_eps", 1e-6))
        self.head = make.head(self.embed, tied=False)

    def forward(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        x: Tensor = self.embed(tokens)
        cos_sin = self.rope(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos_sin, batch)
        hidden: Tensor = self.norm(x)[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits
