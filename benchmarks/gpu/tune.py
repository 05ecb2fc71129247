"""Find the attention kernels' fastest tiles on this device, and write them where they are shipped.

    python benchmarks/gpu/tune.py                     # heads of 64, 128 and 256 in bfloat16, some minutes each
    python benchmarks/gpu/tune.py --head-dims 128

Every combination is compiled and timed: prefills of 8,192 tokens, decodes of 64 sequences of 8,192 tokens, 32 heads
that share 8 kv heads. What does not fit into the device's shared memory is passed over. The result goes into
builtin_plugins/lightllm_builtin/triton_attention/measured.json, under the device's compute capability.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parent))

from run import repeated_seconds

from lightllm.interfaces import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm_builtin.triton_attention import backend, tiles

HEADS, KV_HEADS = 32, 8
SIZES = {"cuda": (64, 8192), "cpu": (2, 40)}
"""Sequences of a decode, context. On a CPU only to try this script."""


def prefills(plain: tiles.Tiles) -> Iterator[tiles.Tiles]:
    for queries, keys, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        yield dataclasses.replace(plain, queries=queries, keys=keys, warps=warps, stages=stages)


def decodes(plain: tiles.Tiles) -> Iterator[tiles.Tiles]:
    for keys, warps, stages in itertools.product((16, 32, 64, 128), (2, 4, 8), (2, 3, 4)):
        yield dataclasses.replace(plain, decode_keys=keys, decode_warps=warps, decode_stages=stages)


class Bench:
    def __init__(self, head_dim: int, dtype: torch.dtype, device: str, sequences: int, context: int) -> None:
        spec = AttentionSpec(layer=0, heads=HEADS, kv_heads=KV_HEADS, head_dim=head_dim, scale=head_dim**-0.5)
        name = str(dtype).removeprefix("torch.")
        job = AttentionJob(layers=(spec,), device=device, dtype=name, max_model_len=context)
        pool = KVPool([spec], sequences * context, dtype, device)
        self.spec, self.device, self.dtype = spec, device, dtype
        self.slots = list(torch.arange(sequences * context, device=device).view(sequences, context))
        self.backend = backend.TritonAttention(job, pool)

    def seconds(self, found: tiles.Tiles, new: int) -> float:
        """Of ``new`` 1 a decode of all sequences, else the prefill of one; infinite where it does not fit."""
        self.backend.tiles = found
        tables = self.slots if new == 1 else self.slots[:1]
        batch = Batch.of(tables, [new] * len(tables), self.backend)
        batch.plan = self.backend.plan(batch)
        q, k, v = (
            torch.randn(len(batch.slots), heads, self.spec.head_dim, device=self.device).to(self.dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        try:
            return repeated_seconds(self.device, lambda: self.backend.attend(self.spec, q, k, v, batch))
        except OutOfResources:
            return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--output", type=Path, help="default: where they are shipped")
    given = parser.parse_args()
    if given.output is None:
        if given.device == "cpu":
            parser.error("what a CPU takes is not shipped: give an --output")
        given.output = tiles.MEASURED
    measured = json.loads(given.output.read_text()) if given.output.exists() else {}
    device = measured.setdefault(tiles.capability() if given.device == "cuda" else "cpu", {})
    sequences, context = SIZES[given.device]
    for head_dim in given.head_dims:
        bench = Bench(head_dim, torch.bfloat16, given.device, sequences, context)
        size = next(size for size in tiles.USUAL if size >= 2 * tiles.padded(head_dim))
        best = tiles.USUAL[size]
        with torch.inference_mode():
            for candidates, new in ((prefills, context), (decodes, 1)):
                before = bench.seconds(best, new)
                taken = {found: bench.seconds(found, new) for found in candidates(best)}
                best = min(taken, key=lambda found: taken[found])
                what = f"a prefill of {context}" if new > 1 else f"a decode of {sequences} x {context}"
                sys.stdout.write(f"head {head_dim}, {what}: {before * 1e3:.3f} -> {taken[best] * 1e3:.3f} ms, {best}\n")
        device[str(size)] = dataclasses.asdict(best)
        given.output.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
