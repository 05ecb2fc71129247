"""Triton attention: a kernel that writes keys and values, one for decodes, one for prefills."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import triton
from torch import Tensor

from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm.nn.transfer import send
from lightllm_builtin.triton_attention import kernels
from lightllm_builtin.triton_attention.tiles import padded, tiles_for

PROGRAMS = 1024
"""Decodes are cut into parts until there are at most so many programs: some for each of an H100's 132 multiprocessors,
so that they end at about the same time. To be measured, as is the next."""

SMALLEST_PART = 64
"""Keys of a part: fewer, and writing and combining partial results costs more than it brings."""

MOST_PARTS = 64

EVERYTHING = 1 << 30
"""The window of layers that have none."""


@dataclass(frozen=True)
class Plan:
    """Of each decode, its row in q, its row in the batch's table and its tokens; ``blocks``: see `kernels.prefill`."""

    queries: Tensor
    rows: Tensor
    lengths: Tensor
    blocks: Tensor | None


class TritonAttention:
    """`lightllm.AttentionBackend`, and `lightllm.PackedAttention`.

    How many programs a decode takes, and into how many parts its keys are cut, follows from the batch's size alone, so
    that it can be captured: a program finds by the length that it is given whether there is a part for it.
    """

    capturable: ClassVar[bool] = True

    def __init__(self, job: AttentionJob, pool: KVPool) -> None:
        self.pool = pool
        itemsize = getattr(torch, job.dtype).itemsize
        largest = itemsize * max(padded(layer.head_dim) for layer in job.layers)
        self.tiles = tiles_for(largest, job.device)

    def plan(self, batch: Batch) -> Plan:
        device, size = batch.slots.device, self.tiles.queries
        decodes = [i for i, new in enumerate(batch.query_lengths) if new == 1]
        if len(decodes) == len(batch.query_lengths):
            queries = torch.arange(len(decodes), device=device)
            return Plan(queries, batch.device_rows, batch.device_context_lengths, None)
        starts = [0, *accumulate(batch.query_lengths)]
        blocks = [
            number
            for start, new, length, row in zip(
                starts, batch.query_lengths, batch.context_lengths, batch.rows, strict=False
            )
            if new > 1
            for at in range(0, new, size)
            for number in (start + at, min(size, new - at), length - new + at, row)
        ]
        which = send([*decodes, *(starts[i] for i in decodes)], torch.int64, device).view(2, -1)
        return Plan(
            queries=which[1],
            rows=batch.device_rows[which[0]],
            lengths=batch.device_context_lengths[which[0]],
            blocks=send(blocks, torch.int32, device).view(-1, 4),
        )

    def attend(self, layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        pool_k, pool_v = self.pool.k[layer.layer], self.pool.v[layer.layer]
        size = layer.kv_heads * layer.head_dim
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        kernels.write_slots[(len(k),)](
            k, v, pool_k, pool_v, batch.slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            SIZE=size, D=layer.head_dim, B=min(1024, triton.next_power_of_2(size)),
        )  # fmt: skip
        return self._attend(layer, q, batch)

    def attend_packed(self, layer: AttentionSpec, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        dim = layer.head_dim
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        cos, sin = (x.contiguous() for x in cos_sin)
        q = torch.empty(len(qkv), layer.heads, dim, dtype=qkv.dtype, device=qkv.device)
        kernels.rotate_and_write[(len(qkv), layer.heads + 2 * layer.kv_heads)](
            qkv, cos, sin, q, self.pool.k[layer.layer], self.pool.v[layer.layer], batch.slots,
            qkv.stride(0), qkv.stride(1),
            HEADS=layer.heads, KV_HEADS=layer.kv_heads, D=dim, BD=triton.next_power_of_2(dim),
            ROTATED=cos.shape[-1], num_warps=1,
        )  # fmt: skip
        return self._attend(layer, q, batch)

    def _attend(self, layer: AttentionSpec, q: Tensor, batch: Batch) -> Tensor:
        plan: Plan = batch.plan
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(plan.queries):
            self._decode(layer, q, batch.table, plan, out)
        if plan.blocks is not None:
            self._prefill(layer, q, batch.table, plan.blocks, out)
        return out

    def _decode(self, layer: AttentionSpec, q: Tensor, table: Tensor, plan: Plan, out: Tensor) -> None:
        count, heads, dim, tiles = len(plan.queries), layer.heads, layer.head_dim, self.tiles
        window = layer.window or EVERYTHING
        parts = self.parts(count * layer.kv_heads, min(table.shape[1], window))
        partial = torch.empty(count, heads, parts, dim, dtype=torch.float32, device=q.device)
        logsum = torch.empty(count, heads, parts, dtype=torch.float32, device=q.device)
        least = max(SMALLEST_PART, tiles.decode_keys)
        kernels.decode[(count, layer.kv_heads, parts)](
            q, self.pool.k[layer.layer], self.pool.v[layer.layer], table, plan.queries, plan.rows, plan.lengths,
            out, partial, logsum, q.stride(0), q.stride(1), table.stride(0), layer.scale, window,
            HEADS=heads, KV_HEADS=layer.kv_heads, D=dim, BD=padded(dim),
            BH=padded(heads // layer.kv_heads), BN=tiles.decode_keys,
            PARTS=parts, LEAST=least, SOFTCAP=layer.softcap or 0.0,
            num_warps=tiles.decode_warps, num_stages=tiles.decode_stages,
        )  # fmt: skip
        if parts > 1:
            kernels.combine[(count, heads)](
                partial, logsum, plan.queries, plan.lengths, out, window,
                HEADS=heads, D=dim, BD=padded(dim), BN=tiles.decode_keys, PARTS=parts, LEAST=least,
            )  # fmt: skip

    def _prefill(self, layer: AttentionSpec, q: Tensor, table: Tensor, blocks: Tensor, out: Tensor) -> None:
        kernels.prefill[(len(blocks), layer.heads)](
            q, self.pool.k[layer.layer], self.pool.v[layer.layer], table, blocks, out,
            q.stride(0), q.stride(1), table.stride(0), layer.scale, layer.window or EVERYTHING,
            HEADS=layer.heads, KV_HEADS=layer.kv_heads, D=layer.head_dim,
            BD=padded(layer.head_dim), BM=self.tiles.queries, BN=self.tiles.keys,
            SOFTCAP=layer.softcap or 0.0, WINDOWED=layer.window is not None,
            num_warps=self.tiles.warps, num_stages=self.tiles.stages,
        )  # fmt: skip

    @staticmethod
    def parts(programs: int, keys: int) -> int:
        """How many parts the keys of a decode, ``keys`` at most, are cut into. A power of two: every other number is
        compiled anew."""
        wanted = min(PROGRAMS // programs, keys // SMALLEST_PART, MOST_PARTS)
        return 1 << max(wanted, 1).bit_length() - 1
