"""Attention backends against attention written out in float64, one sequence at a time."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightllm.interfaces import AttentionBackendRecord, AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm.nn.operators import TorchOperators
from lightllm.testing.rules import broken, resolve, shown

SLOTS = 400
POISON = 1e4
"""What lies in slots that are nobody's: finite, as what earlier sequences left behind is."""

TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
HEADS = ((4, 4), (4, 2), (6, 1), (9, 3), (8, 1))
HEAD_DIMS = (16, 20, 64, 80, 128)
WINDOWS = (None, None, 1, 5, 33)
SOFTCAPS = (None, None, 2.0)
NEW = (1, 1, 1, 2, 3, 17, 40)
"""Sizes that are drawn from; GQA ratios among ``HEADS``."""


@dataclass(frozen=True)
class Case:
    """``sizes``: (tokens cached before, tokens new) of each sequence. ``scattered``: its slots do not follow each
    other. ``packed``: q, k and v are views of one tensor, as a packed projection leaves them."""

    layers: tuple[AttentionSpec, ...]
    sizes: tuple[tuple[int, int], ...]
    scattered: bool
    packed: bool
    seed: int


def check_attention_backend(
    backend: Any,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tolerance: float | None = None,
    supports: Callable[[AttentionJob], str | None] | None = None,
    cases: int = 80,
) -> None:
    """It computes softmax(softcap(q k^T * scale)) v over the keys each query may see, and keeps its contract.

    ``backend``: the class, or its record. ``tolerance``: absolute, of the output for keys and values of variance 1; by
    default the dtype's. Jobs that ``supports`` (the record's own unless given) refuses are passed over; refusing all of
    them is an error. ``cases``: how many are drawn, the same ones each time: prefill and decode in one batch, prompts
    with a cached beginning, sliding windows, capped scores, kv heads shared by several heads, scattered slots.

    If it is ``capturable``, decodes are right also where the batch's lists are those of another step; if it is a
    `lightllm.PackedAttention`, the same holds of queries and keys that it rotates.
    """
    if supports is None and isinstance(backend, AttentionBackendRecord):
        supports = backend.supports
    target = resolve(backend)
    if not isinstance(getattr(target, "capturable", None), bool):
        raise broken("a backend says on its class whether attend may be captured", "capturable: it is no bool")
    refusals, tried = set(), 0
    for case in _cases(cases):
        job = AttentionJob(layers=case.layers, device=device, dtype=dtype, max_model_len=SLOTS)
        reason = supports(job) if supports else None
        if reason is None:
            within = TOLERANCES[dtype] if tolerance is None else tolerance
            _check(target, job, case, within)
            if target.capturable and all(new == 1 for _, new in case.sizes):
                _check(target, job, case, within, replay=True)
            if case.packed and hasattr(target, "attend_packed"):
                _check_packed(target, job, case, 2 * within)  # what was rotated is rounded, too
            tried += 1
        else:
            refusals.add(reason)
    if not tried:
        raise broken("a backend supports something", *(f"refused: {reason}" for reason in sorted(refusals)))


def _cases(count: int) -> Iterator[Case]:
    draw = random.Random(0)
    for seed in range(count):
        heads, kv_heads = HEADS[seed % len(HEADS)]
        head_dim = draw.choice(HEAD_DIMS)
        layers = []
        for layer in range(draw.choice((1, 1, 3))):
            window, softcap = draw.choice(WINDOWS), draw.choice(SOFTCAPS)
            layers.append(
                AttentionSpec(
                    layer=layer,
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    scale=0.3,
                    window=window,
                    softcap=softcap,
                )
            )
        sizes: list[tuple[int, int]] = []
        # now and then a full batch of decodes
        for _ in range(draw.randint(1, 6) if seed % 10 else 24):
            size = (draw.randint(0, 90), draw.choice(NEW)) if seed % 10 else (draw.randint(0, 15), 1)
            if sum(map(sum, [*sizes, size])) <= SLOTS:
                sizes.append(size)
        yield Case(tuple(layers), tuple(sizes), draw.random() < 0.5, draw.random() < 0.5, seed)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised tensors are NaN: what a backend does not write cannot pass for what it should have."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Step:
    """One step of a case: its tensors, and what should come of them."""

    def __init__(self, job: AttentionJob, case: Case) -> None:
        self.case, self.sizes = case, case.sizes
        self.device, self.dtype = job.device, getattr(torch, job.dtype)
        self.generator = torch.Generator().manual_seed(case.seed)
        order = torch.randperm(SLOTS, generator=self.generator) if case.scattered else torch.arange(SLOTS)
        ends = list(accumulate(cached + new for cached, new in self.sizes))
        starts = [0, *ends[:-1]]
        self.tables = [order[start:end].to(job.device) for start, end in zip(starts, ends, strict=True)]
        self.pool = KVPool(job.layers, SLOTS, self.dtype, job.device)
        self.contexts = [self._context(spec) for spec in job.layers]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype).to(self.device)

    def _context(self, spec: AttentionSpec) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every sequence, the cached ones put into the pool."""
        context = []
        for held in (self.pool.k[spec.layer], self.pool.v[spec.layer]):
            held.fill_(POISON)
        for (cached, _), table in zip(self.sizes, self.tables, strict=True):
            shape = len(table), spec.kv_heads, spec.head_dim
            k, v = self._normal(*shape), self._normal(*shape)
            self.pool.k[spec.layer][table[:cached]], self.pool.v[spec.layer][table[:cached]] = k[:cached], v[:cached]
            context.append((k, v))
        return context

    def batch(self, backend: Any) -> Batch:
        return Batch.of(self.tables, [new for _, new in self.sizes], backend)

    def inputs(self, spec: AttentionSpec) -> tuple[Tensor, ...]:
        """q, k, v of the new tokens."""
        q = self._normal(sum(new for _, new in self.sizes), spec.heads, spec.head_dim)
        pairs = list(zip(self.sizes, self.contexts[spec.layer], strict=True))
        k, v = (torch.cat([pair[i][cached:] for (cached, _), pair in pairs]) for i in (0, 1))
        if self.case.packed:
            return torch.cat((q, k, v), 1).split((spec.heads, spec.kv_heads, spec.kv_heads), 1)
        return q, k, v

    def expected(self, spec: AttentionSpec, q: Tensor) -> Tensor:
        """What attend should give for these queries, in float64."""
        parts, row = [], 0
        for (cached, new), (k, v) in zip(self.sizes, self.contexts[spec.layer], strict=True):
            parts.append(_attention(q[row : row + new].double(), k.double(), v.double(), cached, spec))
            row += new
        return torch.cat(parts)

    def place(self, row: int) -> str:
        """Whose token it is."""
        owners = [(i, cached + at) for i, (cached, new) in enumerate(self.sizes) for at in range(new)]
        return f"row {row} (sequence {owners[row][0]}, position {owners[row][1]})"


def _attention(q: Tensor, k: Tensor, v: Tensor, cached: int, spec: AttentionSpec) -> Tensor:
    """q [new, heads, head_dim] over k, v [cached + new, kv_heads, head_dim]."""
    k, v = (t.repeat_interleave(spec.heads // spec.kv_heads, 1) for t in (k, v))
    scores = torch.einsum("nhd,chd->hnc", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    key = torch.arange(len(k), device=k.device)
    query = key[cached:, None]
    seen = key <= query
    if spec.window is not None:
        seen &= key > query - spec.window
    return torch.einsum("hnc,chd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def _check(target: Any, job: AttentionJob, case: Case, tolerance: float, replay: bool = False) -> None:
    """``replay``: the batch's lists are those of a step that was captured, of sequences of one token."""
    lie, are = "scattered" if case.scattered else "in order", "views of one tensor" if case.packed else "on their own"
    facts = [f"job: {job}", f"(cached, new) tokens of the sequences: {case.sizes}; slots {lie}; q, k, v {are}"]
    with _poisoned_memory(), torch.inference_mode():
        step = _Step(job, case)
        backend = target(job, step.pool)
        batch = step.batch(backend)
        if replay:
            facts.append("as a replayed CUDA graph: context_lengths and rows are not this step's, its tensors are")
            batch.context_lengths, batch.rows = [1] * len(case.sizes), [0] * len(case.sizes)
        batch.plan = backend.plan(batch)  # once for all layers
        for spec in job.layers:
            where = [*facts, f"layer: {spec}"]
            q, k, v = step.inputs(spec)
            before = step.pool.k[spec.layer].clone(), step.pool.v[spec.layer].clone()
            out = backend.attend(spec, q, k, v, batch)
            _check_output(out, q, where)
            for kind, held, old, new in (("keys", step.pool.k, before[0], k), ("values", step.pool.v, before[1], v)):
                _check_pool(kind, held[spec.layer], old, new, batch.slots, where)
            _check_values("attend", step, spec, q, out, tolerance, where)


def _check_packed(target: Any, job: AttentionJob, case: Case, tolerance: float) -> None:
    """attend_packed: all dimensions rotated, or half of them."""
    with _poisoned_memory(), torch.inference_mode():
        step = _Step(job, case)
        backend = target(job, step.pool)
        batch = step.batch(backend)
        batch.plan = backend.plan(batch)
        for spec in job.layers:
            q, k, v = step.inputs(spec)
            rotated = spec.head_dim // (1 + case.seed % 2) // 2 * 2
            where = [f"job: {job}", f"(cached, new) tokens: {case.sizes}", f"layer: {spec}; {rotated} are rotated"]
            angles = torch.rand(len(q), 1, rotated // 2, generator=step.generator) * 6
            cos, sin = angles.cos(), angles.sin()
            turn = torch.cat((cos, cos), -1).to(q), torch.cat((-sin, sin), -1).to(q)
            exact = turn[0].double(), turn[1].double()
            out = backend.attend_packed(spec, torch.cat((q, k, v), 1), turn, batch)
            q, k = (TorchOperators().rotate(x.double(), exact).to(x) for x in (q, k))
            _check_output(out, q, where)
            rows = 0
            for (cached, new), (keys, _) in zip(case.sizes, step.contexts[spec.layer], strict=True):
                keys[cached:] = k[rows : rows + new]
                rows += new
            if not torch.allclose(step.pool.k[spec.layer][batch.slots].double(), k.double(), tolerance, tolerance):
                raise broken("attend_packed writes each new token's key, rotated, to its slot", *where)
            if not torch.equal(step.pool.v[spec.layer][batch.slots], v):
                raise broken("attend_packed writes each new token's value to its slot", *where)
            _check_values("attend_packed", step, spec, q, out, tolerance, where)


def _check_values(
    what: str, step: _Step, spec: AttentionSpec, q: Tensor, out: Tensor, tolerance: float, where: list[str]
) -> None:
    expected = step.expected(spec, q)
    wrong = (out.double() - expected).abs().amax((1, 2))
    if not bool((wrong <= tolerance).all()):
        row = int((~(wrong <= tolerance)).nonzero()[0])
        raise broken(
            f"{what} gives attention over the keys that a query may see",
            *where,
            f"{step.place(row)} is off by {wrong[row].item():.3g}, tolerance {tolerance:.3g}",
            f"expected: {shown(expected[row].flatten()[:4].tolist())}, ...",
            f"found:    {shown(out[row].flatten()[:4].tolist())}, ...",
        )


def _check_output(out: Any, q: Tensor, where: list[str]) -> None:
    if not isinstance(out, Tensor) or (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        found = f"{list(out.shape)} {out.dtype} on {out.device}" if isinstance(out, Tensor) else shown(out)
        raise broken(
            "attend gives a tensor like q: [tokens, heads, head_dim]",
            *where,
            f"expected: {list(q.shape)} {q.dtype} on {q.device}",
            f"found:    {found}",
        )


def _check_pool(kind: str, held: Tensor, old: Tensor, new: Tensor, slots: Tensor, where: list[str]) -> None:
    """``held``, ``old``: a layer's part of the pool now and before, ``new``: what belongs into ``slots``."""
    if not torch.equal(held[slots], new):
        raise broken(f"attend writes each new token's {kind} to its slot (batch.slots)", *where)
    others = torch.ones(len(held), dtype=torch.bool, device=held.device)
    others[slots] = False
    others[-1] = False  # where padding may be written
    changed = (others & (held != old).flatten(1).any(1)).nonzero().flatten().tolist()
    if changed:
        raise broken(
            "attend changes no slot of the pool but the new tokens' (and the last, which is nobody's)",
            *where,
            f"{kind} have changed in the slots {shown(changed, 80)}",
        )
