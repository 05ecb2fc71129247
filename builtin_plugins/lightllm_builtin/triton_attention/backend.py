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
from lightllm_builtin.triton_attention import kernels

PROGRAMS = 264
"""Enough to keep an H100's 132 multiprocessors busy: decodes are cut into parts until there are about as many."""

SMALLEST_PART = 256
"""Keys of a part: fewer, and writing and combining partial results costs more than it brings."""

EVERYTHING = 1 << 30
"""The window of layers that have none."""


@dataclass(frozen=True)
class Tiles:
    """How much a program holds, for heads of up to ``head_bytes``, their size rounded up to a power of two.

    They fit into 99 KiB of shared memory, what devices from compute capability 8.0 on have at least (a test compiles
    them). To be measured: time `attend` on a device for each shape of interest over ``queries`` and ``keys`` in 32, 64,
    128, ``warps`` in 4, 8, ``stages`` in 2, 3, 4. These are FlashAttention-2's usual ones, and nobody has.
    """

    head_bytes: int
    queries: int
    keys: int
    decode_keys: int
    warps: int
    stages: int


TILES = (
    Tiles(head_bytes=128, queries=128, keys=64, decode_keys=128, warps=4, stages=3),
    Tiles(head_bytes=256, queries=128, keys=64, decode_keys=64, warps=8, stages=3),
    Tiles(head_bytes=512, queries=64, keys=32, decode_keys=32, warps=8, stages=2),
    Tiles(head_bytes=1024, queries=32, keys=16, decode_keys=16, warps=4, stages=2),
)


@dataclass(frozen=True)
class Plan:
    """``table``: the slots of all sequences, one after the other, int32. ``rows``, ``starts``, ``lengths``: of each
    decode, its row in q, where its slots begin in the table, its tokens. ``blocks``: see `kernels.prefill`."""

    table: Tensor
    rows: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    blocks: Tensor


def padded(size: int) -> int:
    """What a kernel holds it in: a power of two, and a matrix product has 16 of everything at least."""
    return max(16, int(triton.next_power_of_2(size)))


class TritonAttention:
    """`lightllm.AttentionBackend`.

    Not capturable: a graph would replay the addresses and the numbers of the step it was captured in. For that, `plan`
    would have to fill tensors that stay (the table at its largest size), `attend` to keep its partial results in
    memory that stays, and grid and parts to depend on the padded batch alone, not on the lengths.
    """

    capturable: ClassVar[bool] = False

    def __init__(self, job: AttentionJob, pool: KVPool) -> None:
        self.pool = pool
        itemsize = getattr(torch, job.dtype).itemsize
        largest = itemsize * max(padded(layer.head_dim) for layer in job.layers)
        self.tiles = next(tiles for tiles in TILES if tiles.head_bytes >= largest)

    def plan(self, batch: Batch) -> Plan:
        device = batch.slots.device
        starts = [0, *accumulate(batch.context_lengths)]
        decodes: list[tuple[int, int, int]] = []
        blocks: list[tuple[int, int, int, int]] = []
        row = 0
        for start, new, length in zip(starts, batch.query_lengths, batch.context_lengths, strict=False):
            if new == 1:
                decodes.append((row, start, length))
            else:
                for at in range(0, new, self.tiles.queries):
                    blocks.append((row + at, min(self.tiles.queries, new - at), length - new + at, start))
            row += new
        numbers = torch.tensor(decodes, dtype=torch.int32, device=device).view(-1, 3)
        rows, begins, lengths = numbers.T.contiguous()
        return Plan(
            table=torch.cat(batch.tables).int(),
            rows=rows,
            starts=begins,
            lengths=lengths,
            longest=max((length for _, _, length in decodes), default=0),
            blocks=torch.tensor(blocks, dtype=torch.int32, device=device).view(-1, 4),
        )

    def attend(self, layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        plan: Plan = batch.plan
        pool_k, pool_v = self.pool.k[layer.layer], self.pool.v[layer.layer]
        size = layer.kv_heads * layer.head_dim
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        kernels.write_slots[(len(k),)](
            k, v, pool_k, pool_v, batch.slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            SIZE=size, D=layer.head_dim, B=min(1024, triton.next_power_of_2(size)),
        )  # fmt: skip
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(plan.rows):
            self._decode(layer, q, pool_k, pool_v, plan, out)
        if len(plan.blocks):
            self._prefill(layer, q, pool_k, pool_v, plan, out)
        return out

    def _decode(self, layer: AttentionSpec, q: Tensor, pool_k: Tensor, pool_v: Tensor, plan: Plan, out: Tensor) -> None:
        count, heads, dim, tiles = len(plan.rows), layer.heads, layer.head_dim, self.tiles
        window = layer.window or EVERYTHING
        parts = self.parts(count * layer.kv_heads, min(plan.longest, window))
        partial = torch.empty(count, heads, parts, dim, dtype=torch.float32, device=q.device)
        logsum = torch.empty(count, heads, parts, dtype=torch.float32, device=q.device)
        kernels.decode[(count, layer.kv_heads, parts)](
            q, pool_k, pool_v, plan.table, plan.rows, plan.starts, plan.lengths, out, partial, logsum,
            q.stride(0), q.stride(1), layer.scale, window,
            HEADS=heads, KV_HEADS=layer.kv_heads, D=dim, BD=padded(dim),
            BH=padded(heads // layer.kv_heads), BN=tiles.decode_keys,
            SPLITS=parts, SOFTCAP=layer.softcap or 0.0, num_warps=4, num_stages=tiles.stages,
        )  # fmt: skip
        if parts > 1:
            kernels.combine[(count, heads)](
                partial, logsum, plan.rows, out,
                HEADS=heads, D=dim, BD=padded(dim), SPLITS=parts, BS=triton.next_power_of_2(parts),
            )  # fmt: skip

    def _prefill(
        self, layer: AttentionSpec, q: Tensor, pool_k: Tensor, pool_v: Tensor, plan: Plan, out: Tensor
    ) -> None:
        kernels.prefill[(len(plan.blocks), layer.heads)](
            q, pool_k, pool_v, plan.table, plan.blocks, out,
            q.stride(0), q.stride(1), layer.scale, layer.window or EVERYTHING,
            HEADS=layer.heads, KV_HEADS=layer.kv_heads, D=layer.head_dim,
            BD=padded(layer.head_dim), BM=self.tiles.queries, BN=self.tiles.keys,
            SOFTCAP=layer.softcap or 0.0, num_warps=self.tiles.warps, num_stages=self.tiles.stages,
        )  # fmt: skip

    @staticmethod
    def parts(programs: int, keys: int) -> int:
        """How many parts the keys of a decode are cut into. A power of two: every other number is compiled anew."""
        wanted = min(PROGRAMS // max(programs, 1), keys // SMALLEST_PART)
        return 1 << max(wanted, 1).bit_length() - 1
