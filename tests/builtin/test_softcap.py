"""Capped attention scores against the formula written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm_builtin.torch_attention import backend as torch_backend
from lightllm_builtin.torch_attention.backend import TorchAttention

SLOTS = 300


def attend(spec: AttentionSpec, sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backend answers for sequences of (tokens cached before, tokens new), and what is right."""
    pool = KVPool([spec], SLOTS, torch.float32, "cpu")
    pool.k[0].fill_(1e4)  # what is in nobody's slots must not show
    pool.v[0].fill_(1e4)
    backend = TorchAttention(AttentionJob(layers=(spec,), device="cpu", dtype="float32", max_model_len=SLOTS), pool)
    tables, at = [], 0
    for cached, new in sizes:
        tables.append(torch.arange(at, at + cached + new))
        at += cached + new
    keys, values = (torch.randn(at, spec.kv_heads, spec.head_dim) for _ in range(2))
    q = torch.randn(sum(new for _, new in sizes), spec.heads, spec.head_dim)
    new_slots = torch.cat([t[cached:] for (cached, _), t in zip(sizes, tables, strict=True)])
    pool.k[0][:at], pool.v[0][:at] = keys, values
    pool.k[0][new_slots] = pool.v[0][new_slots] = 1e4
    batch = Batch.of(tables, [new for _, new in sizes], backend)
    batch.plan = backend.plan(batch)
    out = backend.attend(spec, q, keys[new_slots], values[new_slots], batch)

    expected, group = [], spec.heads // spec.kv_heads
    positions = [p for (cached, new) in sizes for p in range(cached, cached + new)]
    owners = [table for (_, new), table in zip(sizes, tables, strict=True) for _ in range(new)]
    for row, position, table in zip(q.double(), positions, owners, strict=True):
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        seen = table[first : position + 1]
        k, v = (t[seen].double().repeat_interleave(group, 1) for t in (keys, values))
        scores = torch.einsum("hd,chd->hc", row, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        expected.append(torch.einsum("hc,chd->hd", scores.softmax(-1), v))
    return out, torch.stack(expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2, 9])), min_size=1, max_size=6),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([0.5, 3.0, 50.0]),
    st.integers(0, 2**32 - 1),
)
def test_scores_are_capped_before_the_softmax(
    sizes: list[tuple[int, int]], heads: tuple[int, int], window: int | None, softcap: float, seed: int
) -> None:
    torch.manual_seed(seed)
    spec = AttentionSpec(
        layer=0, heads=heads[0], kv_heads=heads[1], head_dim=16, scale=0.7, window=window, softcap=softcap
    )
    out, expected = attend(spec, sizes)
    assert (out - expected).abs().max() < 1e-4


def test_the_fused_function_does_what_has_no_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fused = torch_backend.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch_backend, "scaled_dot_product_attention", counted)
    spec = AttentionSpec(layer=0, heads=4, kv_heads=2, head_dim=16, scale=0.7)
    for softcap, expected_calls in ((None, 2), (3.0, 0)):
        calls.clear()
        capped = AttentionSpec(layer=0, heads=4, kv_heads=2, head_dim=16, scale=spec.scale, softcap=softcap)
        out, expected = attend(capped, [(3, 1), (2, 5)])
        assert (out - expected).abs().max() < 1e-4
        assert len(calls) == expected_calls
