"""Steps drawn for attention backends, checked against attention written out in float64, within a bound that is derived.

Stricter than the kit in this: slots that are nobody's, and those of tokens that are yet to be written, hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool


@dataclass(frozen=True)
class Step:
    """``sizes``: (tokens cached before, tokens new) of each sequence. ``scattered``: its slots do not follow each
    other. ``packed``: q, k and v are views of one tensor, as a packed projection leaves them."""

    heads: int
    kv_heads: int
    head_dim: int
    sizes: tuple[tuple[int, int], ...]
    window: int | None = None
    softcap: float | None = None
    dtype: str = "float32"
    scattered: bool = True
    packed: bool = True
    seed: int = 0

    def job(self, device: str) -> AttentionJob:
        spec = AttentionSpec(
            layer=0,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
        )
        return AttentionJob(layers=(spec,), device=device, dtype=self.dtype, max_model_len=1 << 20)


@st.composite
def steps(draw: st.DrawFn, dtypes: tuple[str, ...], longest: int) -> Step:
    """Up to four sequences: decodes and prefills, with up to ``longest`` tokens cached and as many new."""
    kv_heads = draw(st.integers(1, 2))
    new = st.one_of(st.just(1), st.integers(1, longest))
    return Step(
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((16, 20, 32, 64, 80, 96, 128, 256))),
        sizes=tuple(draw(st.lists(st.tuples(st.integers(0, longest), new), min_size=1, max_size=4))),
        window=draw(st.one_of(st.none(), st.integers(1, longest))),
        softcap=draw(st.sampled_from((None, None, 5.0))),
        dtype=draw(st.sampled_from(dtypes)),
        scattered=draw(st.booleans()),
        packed=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised tensors are NaN: an element of the output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Ran:
    """``contexts``: keys and values of each sequence. ``before``: the pool's keys and values before attend."""

    spec: AttentionSpec
    batch: Batch
    pool: KVPool
    before: tuple[Tensor, Tensor]
    contexts: list[tuple[Tensor, Tensor]]
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def run(backend: Any, step: Step, device: str = "cpu") -> Ran:
    job = step.job(device)
    (spec,), dtype = job.layers, getattr(torch, step.dtype)
    generator = torch.Generator().manual_seed(step.seed)

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, spec.head_dim, generator=generator).to(device, dtype)

    lengths = [cached + new for cached, new in step.sizes]
    slots = sum(lengths) + 7  # of which seven are nobody's
    order = torch.randperm(slots, generator=generator) if step.scattered else torch.arange(slots)
    tables = [table.to(device) for table in order[: sum(lengths)].split(lengths)]
    contexts = [(normal(n, spec.kv_heads), normal(n, spec.kv_heads)) for n in lengths]

    q = normal(sum(new for _, new in step.sizes), spec.heads)
    k, v = (torch.cat([c[i][cached:] for (cached, _), c in zip(step.sizes, contexts, strict=True)]) for i in (0, 1))
    if step.packed:
        q, k, v = torch.cat((q, k, v), 1).split((spec.heads, spec.kv_heads, spec.kv_heads), 1)

    pool = KVPool(job.layers, slots, dtype, device)
    for held, i in ((pool.k[0], 0), (pool.v[0], 1)):
        held.fill_(float("nan"))
        for (cached, _), table, context in zip(step.sizes, tables, contexts, strict=True):
            held[table[:cached]] = context[i][:cached]
    before = pool.k[0].clone(), pool.v[0].clone()

    with poisoned_memory(), torch.inference_mode():
        target = backend(job, pool)
        batch = Batch.of(tables, [new for _, new in step.sizes], target)
        batch.plan = target.plan(batch)
        out = target.attend(spec, q, k, v, batch)
    return Ran(spec, batch, pool, before, contexts, q, k, v, out)


def check(backend: Any, step: Step, device: str = "cpu") -> None:
    """attend's output is within `bound` of `attention`, and the pool changes in the new tokens' slots alone."""
    ran = run(backend, step, device)
    assert (ran.out.shape, ran.out.dtype, ran.out.device) == (ran.q.shape, ran.q.dtype, ran.q.device)
    for held, old, written in ((ran.pool.k[0], ran.before[0], ran.k), (ran.pool.v[0], ran.before[1], ran.v)):
        old[ran.batch.slots] = written
        assert torch.equal(bits(held[:-1]), bits(old[:-1]))  # padding may be written to the last
    row = 0
    for (cached, new), (keys, values) in zip(step.sizes, ran.contexts, strict=True):
        q, out = ran.q[row : row + new], ran.out[row : row + new]
        wrong = (out.double() - attention(q.double(), keys.double(), values.double(), cached, ran.spec)).abs()
        limit = bound(q, keys, values, ran.spec)
        assert bool((wrong <= limit).all()), f"off by {wrong.max().item():.3g}, of which rounding explains {limit:.3g}"
        row += new


def attention(q: Tensor, k: Tensor, v: Tensor, cached: int, spec: AttentionSpec) -> Tensor:
    """q [new, heads, head_dim] over k, v [cached + new, kv_heads, head_dim]."""
    k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, 1) for x in (k, v))
    scores = torch.einsum("nhd,chd->hnc", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    position = torch.arange(len(k), device=k.device)
    behind = position[cached:, None] - position
    seen = (behind >= 0) & (behind < (spec.window or len(k)))
    return torch.einsum("hnc,chd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def bound(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> float:
    """How far rounding may take an output that is accumulated in float32, to first order.

    With u the unit roundoff of the dtype and w that of float32: a product of D terms is off by D w sum|q_i k_i|, which
    Cauchy and Schwarz bound by the norms; scale, cap, logarithm's base and subtracted maximum add some w of the
    score's or the cap's size (16 are allowed). A score's error is its weight's relative error, and the denominator's.
    Weights are rounded to the dtype before they meet the values (u), so is the output (u), and two sums over N keys, a
    rounding of each term and one of its rescaling, are off by 4 N w.
    """
    u, w = torch.finfo(q.dtype).eps / 2, 2.0**-24
    largest_q, largest_k = (x.double().norm(dim=-1).max().item() for x in (q, k))
    score = spec.scale * largest_q * largest_k + (spec.softcap or 0.0)
    relative = 2 * u + 2 * (spec.head_dim + 16) * w * score + 4 * len(k) * w
    return relative * v.abs().max().item()


def bits(x: Tensor) -> Tensor:
    """NaN equals NaN in these."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
