"""Triton's sampler, in its interpreter: by the kit; its cuts, against a sort; its draws, against the standard one's.

A draw of either sampler is the inverse of a distribution at one uniform number, so the two agree wherever they put
tokens in the same order: that of their ids, unless top-k or top-p are set, when the standard one ranks them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm.engine.request import SamplingParams
from lightllm.nn.batch import History
from lightllm.testing import check_sampler
from lightllm.testing.rows import Row
from lightllm.testing.samplers import wanted
from lightllm_builtin.sampling.sampler import StandardSampler, uniform

pytest.importorskip("triton")
sampler = pytest.importorskip("lightllm_builtin.triton_sampling.sampler")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")

TESTS = Path(__file__).parents[1]


def sample(logits: torch.Tensor, rows: list[Row], sampler: Any = sampler.TritonSampler) -> list[int]:
    return sampler().sample(logits.clone(), rows, History.of(rows, "cpu")).tolist()


def test_it_samples_as_requests_ask() -> None:
    # the interpreter takes up to 50 ms for each; the tests below say more
    check_sampler(sampler.TritonSampler, draws=32)


CUTS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 3, "temperature": 0.7},
    {"top_p": 0.4},
    {"top_p": 1e-6},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 2.0},
    {"min_p": 0.3},
]


@pytest.mark.parametrize("params", CUTS, ids=str)
def test_the_tokens_that_are_kept_are_those_of_a_sort(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform numbers are set to where each kept token's part of the distribution begins and ends."""
    monkeypatch.setattr(sampler, "BLOCK", 32)  # a row is several blocks
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(3)) * 2
    expected = wanted(logits[0], **params)
    cumulative = expected.cumsum(0)
    kept = expected.nonzero().flatten().tolist()
    inside = [float(cumulative[token] - expected[token] / 2) for token in kept]
    numbers = iter([*inside, 0.0, 1.0])
    monkeypatch.setattr(sampler, "uniform", lambda *_: next(numbers))
    rows = [Row(SamplingParams(**params)) for _ in range(len(kept) + 2)]
    assert sample(logits.expand(len(rows), -1), rows) == [*kept, kept[0], kept[-1]]


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 100),
    block=st.sampled_from((16, 64, 2048)),
    spread=st.sampled_from((0.01, 1.0, 8.0)),
    params=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.05, 5),
            "top_k": st.integers(1, 120),
            "top_p": st.floats(1e-3, 1),
            "min_p": st.floats(0, 1),
        },
    ),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_draw_is_the_inverse_of_the_distribution(
    size: int, block: int, spread: float, params: dict[str, Any], seed: int
) -> None:
    """Of any size and parameters; a neighbour, or a token on the edge of a cut, only where rounding decides: 1e-5."""
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed % 2**32)) * spread
    rows = [Row(SamplingParams(**params), seed=seed, index=i) for i in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "BLOCK", block)
        found = sample(logits, rows)
    assert all(0 <= token < size for token in found)
    for row, values, token in zip(rows, logits, found, strict=True):
        near = [params]
        for name in params.keys() & {"top_p", "min_p"}:
            near += [{**each, name: min(each[name] * by, 1.0)} for each in near for by in (1 - 1e-5, 1 + 1e-5)]
        u = uniform(seed, row.index, 0)
        fits = False
        for each in near:
            expected = wanted(values, **each)
            after = expected.cumsum(0)
            fits |= bool(expected[token] > 0 and after[token] - expected[token] - 1e-5 <= u <= after[token] + 1e-5)
        assert fits


SAME_ORDER: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 3.0, "min_p": 0.02},
    {"min_p": 0.1},
    {"top_k": 1},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.4},
    {"logit_bias": {3: 4.0, 7: -100.0}},
    {"min_tokens": 5},
]


def test_tokens_are_the_standard_samplers_where_the_order_is() -> None:
    """One batch of 200 rows, in blocks of the size that a device uses: they all agree."""
    size, count = 3000, 200
    logits = torch.randn(count, size, generator=torch.Generator().manual_seed(8)) * 3
    rows = [
        Row(
            SamplingParams(**SAME_ORDER[i % len(SAME_ORDER)]),
            prompt=[1, 2, 3],
            output=[5, 5, 9][: i % 4],
            index=i % 3,
            seed=i,
            stop_ids=(int(logits[i].argmax()),),
        )
        for i in range(count)
    ]
    found = sample(logits, rows)
    assert found == sample(logits, rows, StandardSampler)
    assert len({*found}) > 50


def test_logits_may_be_a_view() -> None:
    logits = torch.randn(6, 90, generator=torch.Generator().manual_seed(2))
    rows = [Row(SamplingParams(temperature=i % 3, top_k=9), seed=i) for i in range(6)]
    wide = torch.full((6, 100), 9.0)
    wide[:, 3:93] = logits
    for view in (logits.T.contiguous().T, wide[:, 3:93]):
        assert sampler.TritonSampler().sample(view, rows, History.of(rows, "cpu")).tolist() == sample(logits, rows)


def test_memory_that_is_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is poisoned before the kernel writes it."""
    empty = torch.empty
    poisoned: list[int] = []

    def poison(*shape: Any, **options: Any) -> torch.Tensor:
        found = empty(*shape, **options).fill_(-7)
        poisoned.append(found.numel())
        return found

    monkeypatch.setattr(torch, "empty", poison)
    logits = torch.randn(33, 50, generator=torch.Generator().manual_seed(1))
    rows = [Row(SamplingParams(temperature=i % 3), seed=i) for i in range(33)]
    found = sampler.TritonSampler().sample(logits, rows, History.of(rows, "cpu"))
    assert 33 in poisoned
    assert found.min() >= 0 and found.max() < 50


def drawn(logits: list[float], numbers: list[float], monkeypatch: pytest.MonkeyPatch, **params: Any) -> list[int]:
    monkeypatch.setattr(sampler, "uniform", lambda seed, *_: numbers[seed])
    rows = [Row(SamplingParams(**params), seed=seed) for seed in range(len(numbers))]
    return sample(torch.tensor([logits]).expand(len(rows), -1), rows)


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn([1.0, 2.0, 1.0, 0.0, float("-inf")], [0.01, 0.5, 0.99], monkeypatch, top_k=2) == [0, 1, 2]


def test_both_zeros_are_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn([0.0, -0.0, -1.0], [0.25, 0.75], monkeypatch, top_k=1) == [0, 1]
    assert drawn([-0.0, 0.0, 1.0], [0.01, 0.3, 0.99], monkeypatch, top_k=2) == [0, 1, 2]


def test_cuts_that_nothing_reaches_keep_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the tokens that a mask leaves; a mass too small for float32."""
    left = [float("-inf"), 1.0, float("-inf"), 1.0]
    assert drawn(left, [0.0, 0.49, 0.51, 0.999], monkeypatch, top_k=3) == [1, 1, 3, 3]
    assert drawn([0.0, 1.0, 3.0, 2.0], [0.0, 0.999], monkeypatch, top_p=1e-46) == [2, 2]


def test_neighbours_in_a_large_vocabulary_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums in float32 from block to block would be off by more than a token."""
    size = 300_000
    logits = torch.zeros(size)
    logits[-1] = 1.0
    weights = logits.double().exp()
    tokens = [1, 150_001, size - 2, size - 1]
    numbers = ((weights.cumsum(0) - weights * 0.9) / weights.sum())[tokens].tolist()
    assert drawn(logits.tolist(), numbers, monkeypatch) == tokens


COMPILE = """
import torch
from compiled import POINTERS, Compiled
from lightllm.engine.request import SamplingParams
from lightllm.nn.batch import History
from lightllm.testing.rows import Row
from lightllm_builtin.triton_sampling import kernels, sampler

POINTERS.setdefault(torch.float64, "*fp64")
draw = kernels.draw
for capability in (80, 90):
    kernels.draw = Compiled(draw, capability)
    rows = [Row(SamplingParams(top_k=5, top_p=0.9))] * 2
    sampler.TritonSampler().sample(torch.zeros(2, 128_256), rows, History.of(rows, "cpu"))
"""


def test_it_compiles_for_devices(tmp_path: Path) -> None:
    """What the interpreter lets pass and a compiler does not. Needs no device."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["draw"] * 2
