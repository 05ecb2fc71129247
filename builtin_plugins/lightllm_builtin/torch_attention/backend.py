"""Attention over the token-granular KV pool with `scaled_dot_product_attention`.

Prompts (several new tokens) are done one by one, reading slots that follow each other in place. Decodes (one new
token) are gathered in groups of similar length, padded: one call keeps all cores busy, which outweighs the copy (32
sequences of 272 tokens, SmolLM2, a step on 2 cores: 38 against 52 ms). Query heads that share a kv head become rows of
one query matrix, so that keys and values are never repeated in memory. Scores that are capped, which that function
cannot do, are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool

Buffers = dict[tuple[int, ...], tuple[Tensor, Tensor]]
"""Shape -> memory for gathered keys and values, shared by all layers of a step: fresh pages cost more than the copy."""


@dataclass
class Prompt:
    """Tokens ``start:end`` of the step, the last of a context whose slots are ``keys``."""

    start: int
    end: int
    keys: Tensor | slice
    mask: Tensor | None
    """[new, context], added to the scores: 0 where a query may look, else -inf; None: causal over the new."""
    buffers: Buffers = field(default_factory=dict)


@dataclass
class Decodes:
    """``count`` single tokens at ``rows`` of the step; their slots are ``keys`` [rows * longest], or one slice."""

    count: int
    rows: Tensor | slice
    keys: Tensor | slice
    mask: Tensor | None
    """[rows, 1, 1, longest], to be added to the scores; None: all are seen."""
    buffers: Buffers = field(default_factory=dict)


@dataclass
class Plan:
    prompts: list[Prompt] = field(default_factory=list)
    decodes: list[Decodes] = field(default_factory=list)


class TorchAttention:
    """`lightllm.AttentionBackend`."""

    capturable: ClassVar[bool] = False

    def __init__(self, job: AttentionJob, pool: KVPool) -> None:
        self.pool = pool
        self.windows = {layer.window for layer in job.layers}
        self.device, self.dtype = torch.device(job.device), getattr(torch, job.dtype)

    def plan(self, batch: Batch) -> dict[int | None, Plan]:
        """One plan per sliding window in use: each sees another part of the context."""
        return {window: self._plan(batch, window) for window in self.windows}

    def _plan(self, batch: Batch, window: int | None) -> Plan:
        plan, start = Plan(), 0
        decodes: list[tuple[int, Tensor]] = []
        for new, context, table in zip(batch.query_lengths, batch.context_lengths, batch.tables, strict=True):
            if new == 1:
                decodes.append((start, table if window is None else table[-window:]))
            else:
                plan.prompts.append(self._prompt(start, new, context, table, window))
            start += new
        # Those of at least half the longest's length go together: padding at most doubles a row.
        while decodes:
            longest = max(len(table) for _, table in decodes)
            together = [d for d in decodes if 2 * len(d[1]) + 64 >= longest]
            plan.decodes.append(self._decodes(together, longest))
            decodes = [d for d in decodes if 2 * len(d[1]) + 64 < longest]
        return plan

    def _prompt(self, start: int, new: int, context: int, table: Tensor, window: int | None) -> Prompt:
        # the oldest key any of the new tokens can see
        first = 0 if window is None else max(0, context - new - window + 1)
        keys, mask = _run(table[first:]), None
        if context > new or (window is not None and window < context):
            query = torch.arange(context - new, context, device=self.device)[:, None]
            key = torch.arange(first, context, device=self.device)
            mask = key <= query
            if window is not None:
                mask &= key > query - window
            mask = self._additive(mask)
        return Prompt(start, start + new, keys, mask)

    def _decodes(self, group: Sequence[tuple[int, Tensor]], longest: int) -> Decodes:
        first, last = group[0][0], group[-1][0]
        if len(group) == 1:
            return Decodes(1, slice(first, first + 1), _run(group[0][1]), None)
        rows: Tensor | slice = slice(first, last + 1)
        if last - first >= len(group):
            rows = torch.tensor([row for row, _ in group], device=self.device)
        tables = [table for _, table in group]
        keys = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=self.pool.slots)
        mask = None
        if any(len(table) < longest for table in tables):
            lengths = torch.tensor([len(table) for table in tables], device=self.device)
            mask = self._additive(torch.arange(longest, device=self.device) < lengths[:, None])[:, None, None]
        return Decodes(len(group), rows, keys.flatten(), mask)

    def _additive(self, mask: Tensor) -> Tensor:
        """Made once a step: of a bool mask every layer would make it anew."""
        return torch.zeros(mask.shape, dtype=self.dtype, device=self.device).masked_fill_(~mask, float("-inf"))

    def attend(self, layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        pool_k, pool_v = self.pool.k[layer.layer], self.pool.v[layer.layer]
        pool_k.index_copy_(0, batch.slots, k)
        pool_v.index_copy_(0, batch.slots, v)
        out = torch.empty_like(q)
        group = layer.heads // layer.kv_heads
        plan: Plan = batch.plan[layer.window]
        for p in plan.prompts:
            # kv heads as the batch, their query heads as heads; keys are broadcast over these, not copied
            queries = q[p.start : p.end].unflatten(1, (layer.kv_heads, group)).permute(1, 2, 0, 3)
            keys, values = _read(pool_k, pool_v, p.keys, p.buffers)
            keys = keys.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
            values = values.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
            y = _attention(layer, queries, keys, values, p.mask, causal=p.mask is None)
            out[p.start : p.end] = y.permute(2, 0, 1, 3).flatten(1, 2)
        for d in plan.decodes:
            # with one query token, a kv head's query heads are its query rows
            queries = q[d.rows].unflatten(1, (layer.kv_heads, group))
            keys, values = _read(pool_k, pool_v, d.keys, d.buffers)
            shape = (d.count, -1, layer.kv_heads, layer.head_dim)
            keys, values = keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)
            y = _attention(layer, queries, keys, values, d.mask)
            out[d.rows] = y.flatten(1, 2)
        return out


def _attention(
    layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """q [batch, heads, new, head_dim] over k, v [batch, heads, keys, head_dim]; ``mask`` is added to the scores.
    ``causal``: there are as many keys as new tokens, and each sees those up to its own."""
    if layer.softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=layer.scale)
    scores = (q @ k.transpose(-1, -2)).float().mul_(layer.scale / layer.softcap).tanh_().mul_(layer.softcap)
    if mask is not None:
        scores += mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(later, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def _read(pool_k: Tensor, pool_v: Tensor, keys: Tensor | slice, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """The keys and values of ``keys``, [keys, kv_heads, head_dim] each: views where they lie together."""
    if isinstance(keys, slice):
        return pool_k[keys], pool_v[keys]
    shape = (len(keys), *pool_k.shape[1:])
    if shape not in buffers:
        buffers[shape] = (pool_k.new_empty(shape), pool_v.new_empty(shape))
    k, v = buffers[shape]
    return torch.index_select(pool_k, 0, keys, out=k), torch.index_select(pool_v, 0, keys, out=v)


def _run(table: Tensor) -> Tensor | slice:
    """A slice where the slots are consecutive (then reading them is a view, not a copy), else the table itself."""
    if table.device.type == "cpu":  # elsewhere the test would wait for the device
        first, last = int(table[0]), int(table[-1])
        if last - first == len(table) - 1 and bool((table.diff() == 1).all()):
            return slice(first, last + 1)
    return table
