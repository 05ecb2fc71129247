"""Attention of each sequence's new tokens over all of its tokens, whose keys and values lie in the pool.

A token's place in the pool is its slot; a sequence's slots may lie anywhere. The new tokens of a step, of all
sequences, are laid end to end: a prompt brings many (or some, when it is cut into chunks), an answer brings one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from torch import Tensor


class ExamplePluginAttention:
    """`lightllm.AttentionBackend`."""

    capturable: ClassVar[bool] = False

    def __init__(self, job: AttentionJob, pool: KVPool) -> None:
        self.pool = pool

    def plan(self, batch: Batch) -> None:
        """Here a kernel would make, once a step, what all layers need: indices, offsets, buffers."""

    def attend(self, layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        pool_k, pool_v = self.pool.k[layer.layer], self.pool.v[layer.layer]
        pool_k[batch.slots], pool_v[batch.slots] = k, v
        out = torch.empty_like(q)
        start = 0
        for new, slots in zip(batch.query_lengths, batch.tables, strict=True):
            end = start + new
            out[start:end] = _attend(layer, q[start:end], pool_k[slots], pool_v[slots])
            start = end
        return out


def _attend(layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [new, heads, head_dim]; k, v: [all, kv_heads, head_dim]. The new tokens are the last of all."""
    # several query heads share one head of keys and values
    k, v = (x.repeat_interleave(layer.heads // layer.kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    position = torch.arange(len(k), device=q.device)
    distance = position[-len(q) :, None] - position
    visible = distance >= 0
    if layer.window is not None:
        visible &= distance < layer.window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)
