"""How much the attention kernels' programs hold: plain data, never searched for when a server starts.

``measured.json`` beside this module has what `benchmarks/gpu/tune.py` found fastest: compute capability -> bytes of a
head -> tiles. Devices and heads that nobody measured get ``USUAL``: FlashAttention-2's sizes, cut down until they fit
into 99 KiB of shared memory, what devices from compute capability 8.0 on have at least (a test compiles them).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

MEASURED = Path(__file__).parent / "measured.json"


@dataclass(frozen=True)
class Tiles:
    """``queries``, ``keys``, ``warps`` and ``stages`` of a prefill, and those of a decode, whose queries are the heads
    that share a kv head."""

    queries: int
    keys: int
    warps: int
    stages: int
    decode_keys: int
    decode_warps: int
    decode_stages: int


USUAL = {
    128: Tiles(queries=128, keys=64, warps=4, stages=3, decode_keys=128, decode_warps=4, decode_stages=3),
    256: Tiles(queries=128, keys=64, warps=8, stages=3, decode_keys=64, decode_warps=4, decode_stages=3),
    512: Tiles(queries=64, keys=32, warps=8, stages=2, decode_keys=32, decode_warps=4, decode_stages=2),
    1024: Tiles(queries=32, keys=16, warps=4, stages=2, decode_keys=16, decode_warps=4, decode_stages=2),
}
"""Bytes of a head -> its tiles."""


def padded(size: int) -> int:
    """What a kernel holds it in: a power of two, and a matrix product has 16 of everything at least."""
    return max(16, int(triton.next_power_of_2(size)))


def tiles_for(head_bytes: int, device: str) -> Tiles:
    """``head_bytes``: of the largest head, its size padded."""
    size = next(size for size in USUAL if size >= head_bytes)
    if device == "cuda":
        measured = json.loads(MEASURED.read_text()).get(capability(), {}).get(str(size))
        if measured is not None:
            return Tiles(**measured)
    return USUAL[size]


def capability() -> str:
    return ".".join(map(str, torch.cuda.get_device_capability()))
