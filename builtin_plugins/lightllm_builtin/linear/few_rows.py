"""Products with few rows on a CUDA device: by PyTorch's library or by a kernel, whichever the device does faster.

A step of few sequences is over when all weights have been read. How near to the memory's rate a library comes with one
row differs from size to size, so each size of layer is timed once when a model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench_cudagraph

from lightllm_builtin.linear import kernels

log = logging.getLogger("lightllm.linear")

ROWS = 1, 16
"""What is timed: each stands for the numbers of rows up to it. A matrix product has 16 rows at least, used or not."""

GAIN = 1.03
"""How much faster than the library a kernel must be. Less could be chance, and then answers would be rounded in another
way after each start."""

READ_BYTES, MOST_WEIGHTS = 200 << 20, 32
"""Of weights that are read in turn while timing: more than a device keeps in its cache. Small ones it may keep."""

MILLISECONDS = 2


@dataclass(frozen=True)
class Tiles:
    """Outputs of a program, and the inputs that it reads at a time."""

    outputs: int
    inputs: int
    warps: int
    stages: int


CANDIDATES = (
    Tiles(outputs=16, inputs=256, warps=4, stages=4),
    Tiles(outputs=16, inputs=512, warps=4, stages=3),
    Tiles(outputs=32, inputs=256, warps=4, stages=4),
)
"""Each keeps tens of kilobytes of a multiprocessor's reads under way, and gives every one several programs."""


class Product:
    """x W^T + b as `torch.nn.functional.linear` has it. ``tiles``: of each of `ROWS`, None where PyTorch's library is
    to do it."""

    def __init__(self, tiles: Mapping[int, Tiles | None]) -> None:
        self.tiles = tiles

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        outputs, inputs = weight.shape
        count = x.numel() // inputs
        tiles = next((self.tiles[rows] for rows in ROWS if count <= rows), None)
        if tiles is None or count == 0:
            return F.linear(x, weight, bias)
        rows = x.reshape(count, inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
        kernels.multiply[(triton.cdiv(outputs, tiles.outputs),)](
            rows, weight, out if bias is None else bias, out, count, outputs, inputs, rows.stride(0),
            BM=ROWS[-1], BN=tiles.outputs, BK=tiles.inputs, BIAS=bias is not None,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return out


@cache
def fastest(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Product:
    """For a layer of this size, on this device: PyTorch's where there is no memory to try."""
    try:
        tiles = _fastest(outputs, inputs, dtype, device)
    except torch.OutOfMemoryError:
        tiles = dict.fromkeys(ROWS)
    torch.cuda.empty_cache()  # what is free afterwards is what the KV cache gets
    return Product(tiles)


def _fastest(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> dict[int, Tiles | None]:
    count = min(-(-READ_BYTES // (outputs * inputs * dtype.itemsize)), MOST_WEIGHTS)
    weights = [torch.randn(outputs, inputs, dtype=dtype, device=device) for _ in range(count)]
    found: dict[int, Tiles | None] = {}
    for rows in ROWS:
        x = torch.randn(rows, inputs, dtype=dtype, device=device)
        library = _milliseconds(F.linear, x, weights)
        taken = {tiles: _milliseconds(Product(dict.fromkeys(ROWS, tiles)), x, weights) for tiles in CANDIDATES}
        best = min(CANDIDATES, key=taken.__getitem__)
        gain = library / taken[best]
        log.debug("%d -> %d, up to %d rows: %s, %.2f times as fast as the library", inputs, outputs, rows, best, gain)
        found[rows] = best if gain > GAIN else None
    return found


def _milliseconds(product: Callable[[Tensor, Tensor, None], Tensor], x: Tensor, weights: Sequence[Tensor]) -> float:
    def each() -> None:
        for weight in weights:
            product(x, weight, None)

    try:
        return float(do_bench_cudagraph(each, rep=MILLISECONDS, return_mode="median"))
    except OutOfResources:
        return float("inf")
