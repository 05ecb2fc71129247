"""The kernels, called."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lightllm_builtin.int4 import kernels
from lightllm_builtin.int4.formats import Weights

PROGRAMS = 264
"""Enough to keep an H100's 132 multiprocessors busy: for few rows, the inputs are cut into parts until there are about
as many."""

SMALLEST_PART = 512
"""Inputs of a part: fewer, and writing and adding partial sums costs more than it brings."""

SUMMED = 1024
"""Outputs whose partial sums a program adds."""


@dataclass(frozen=True)
class Tiles:
    """How much a program multiplies at a time, of up to ``most`` rows of x: ``rows`` by ``inputs`` by ``outputs``.

    ``inputs`` are fewer where a group is smaller. Usual sizes for such kernels, which fit into 99 KiB of shared memory
    in 16 bits (a test compiles them). Nobody has measured them: on a device, time `Product` for 1, 16, 64 and 4096 rows
    over ``outputs`` in 32, 64, 128, ``inputs`` in 32, 64, 128, ``warps`` in 4, 8 and ``stages`` in 2, 3, 4.
    """

    most: float
    rows: int
    inputs: int
    outputs: int
    warps: int
    stages: int


TILES = (
    Tiles(most=16, rows=16, inputs=128, outputs=64, warps=4, stages=3),
    Tiles(most=32, rows=32, inputs=128, outputs=64, warps=4, stages=3),
    Tiles(most=256, rows=64, inputs=64, outputs=64, warps=4, stages=3),
    Tiles(most=math.inf, rows=128, inputs=64, outputs=128, warps=8, stages=3),
)


class Product:
    """x W^T + b from packed weights."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        regular, self.group, self.order = weights.regular()
        self.words, self.zeros, self.bits = regular.words, regular.zeros, regular.bits
        narrow = regular.scales.to(dtype)
        # in bfloat16 those of a checkpoint in float16 would be rounded
        self.scales = narrow if torch.equal(narrow.float(), regular.scales) else regular.scales
        self.inputs = len(weights.groups) if self.order is None else len(self.order)
        self.outputs = self.words.shape[1]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., inputs] -> [..., outputs] in x's dtype; sums are float32."""
        rows = x.reshape(-1, x.shape[-1])
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        elif rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty(len(rows), self.outputs, dtype=x.dtype, device=x.device)
        if len(rows):
            self._multiply(rows, bias, out)
        return out.view(*x.shape[:-1], self.outputs)

    def _multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        tiles = next(tiles for tiles in TILES if tiles.most >= len(x))
        several = self.scales.shape[0] > 1
        inputs = math.gcd(tiles.inputs, self.group) if several else tiles.inputs
        grid = triton.cdiv(len(x), tiles.rows), triton.cdiv(self.outputs, tiles.outputs)
        parts = self.parts(grid[0] * grid[1])
        part = triton.cdiv(triton.cdiv(self.inputs, inputs), parts) * inputs
        partial = torch.empty(parts, len(x), self.outputs, dtype=torch.float32, device=x.device) if parts > 1 else out
        b = out if bias is None else bias
        kernels.multiply[grid[0], grid[1], parts](
            x, self.words, self.scales, self.zeros, b, partial, len(x), self.outputs, self.inputs, x.stride(0), part,
            self.group if several else self.inputs,
            BITS=self.bits, BM=tiles.rows, BN=tiles.outputs, BK=inputs,
            BIAS=bias is not None and parts == 1, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if parts > 1:
            kernels.add[(len(x), triton.cdiv(self.outputs, SUMMED))](
                partial, b, out, len(x), self.outputs, PARTS=parts, B=SUMMED, BIAS=bias is not None
            )

    def parts(self, programs: int) -> int:
        """How many parts the inputs are cut into. A power of two: every other number is compiled anew."""
        wanted = min(PROGRAMS // programs, self.inputs // SMALLEST_PART)
        return 1 << max(wanted, 1).bit_length() - 1
