"""The torch backend against attention written out one query at a time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm_builtin.torch_attention.backend import TorchAttention

SLOTS = 400
sequences = st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 1, 2, 3, 17, 40])), min_size=1, max_size=6)


def one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [heads, head_dim] over k, v [context, kv_heads, head_dim], in float64."""
    group = q.shape[0] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    weights = (torch.einsum("hd,chd->hc", q.double(), k) * scale).softmax(-1)
    return torch.einsum("hc,chd->hd", weights, v)


@settings(max_examples=120, deadline=None)
@given(
    sequences,
    st.sampled_from([(4, 4), (4, 2), (6, 1), (9, 3)]),
    st.sampled_from([16, 20, 64]),
    st.sampled_from([None, 1, 5, 33]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_ragged_prefill_decode_prefix_and_window(
    sizes: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    scattered: bool,
    seed: int,
) -> None:
    """``sizes``: (tokens cached before, tokens new) of each sequence."""
    sizes = sizes[: next((i for i in range(len(sizes)) if sum(a + b for a, b in sizes[: i + 1]) > SLOTS), len(sizes))]
    if not sizes:
        return
    torch.manual_seed(seed)
    spec = AttentionSpec(layer=0, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, scale=0.3, window=window)
    pool = KVPool([spec], SLOTS, torch.float32, "cpu")
    pool.k[0].fill_(1e4)  # what is in nobody's slots must not show
    pool.v[0].fill_(1e4)
    backend = TorchAttention(AttentionJob(layers=(spec,), device="cpu", dtype="float32", max_model_len=SLOTS), pool)
    order = torch.randperm(SLOTS) if scattered else torch.arange(SLOTS)
    tables, at = [], 0
    for cached, new in sizes:
        tables.append(order[at : at + cached + new])
        at += cached + new
    keys = [torch.randn(len(t), heads[1], head_dim) for t in tables]
    values = [torch.randn(len(t), heads[1], head_dim) for t in tables]
    for (cached, _), table, k, v in zip(sizes, tables, keys, values, strict=True):
        pool.k[0][table[:cached]], pool.v[0][table[:cached]] = k[:cached], v[:cached]
    batch = Batch(
        slots=torch.cat([t[c:] for (c, _), t in zip(sizes, tables, strict=True)]),
        query_lengths=[new for _, new in sizes],
        context_lengths=[cached + new for cached, new in sizes],
        tables=tables,
        attention=backend,
    )
    batch.plan = backend.plan(batch)
    q = torch.randn(sum(batch.query_lengths), heads[0], head_dim)
    new_k = torch.cat([k[c:] for (c, _), k in zip(sizes, keys, strict=True)])
    new_v = torch.cat([v[c:] for (c, _), v in zip(sizes, values, strict=True)])
    out = backend.attend(spec, q, new_k, new_v, batch)
    row = 0
    for (cached, new), k, v in zip(sizes, keys, values, strict=True):
        for position in range(cached, cached + new):
            first = 0 if window is None else max(0, position - window + 1)
            expected = one_query(q[row], k[first : position + 1], v[first : position + 1], spec.scale)
            assert (out[row] - expected).abs().max() < 1e-4
            row += 1
