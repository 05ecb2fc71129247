"""Triton's sampler on a CUDA device: by the kit, and at the sizes of real vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightllm.engine.request import SamplingParams
from lightllm.nn.batch import History
from lightllm.testing import check_sampler
from lightllm.testing.rows import Row
from lightllm.testing.samplers import unlike, wanted
from lightllm_builtin.sampling.sampler import StandardSampler
from lightllm_builtin.triton_sampling.sampler import TritonSampler

pytestmark = pytest.mark.gpu

SIZES = (32_000, 128_256, 151_936)


@pytest.mark.parametrize("sampler", [TritonSampler, StandardSampler])
def test_it_samples_as_requests_ask(sampler: type) -> None:
    check_sampler(sampler, device="cuda")


def logits(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """As they come: of a product in half precision, so that many tokens are equally likely, made float32."""
    random = torch.Generator("cuda").manual_seed(size)
    return (torch.randn(rows, size, device="cuda", generator=random) * 3).to(dtype).float()


def sample(sampler: Any, values: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    found: torch.Tensor = sampler().sample(values, rows, History.of(rows, "cuda"))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_the_standard_samplers_where_the_order_is(size: int, dtype: torch.dtype) -> None:
    """Tokens lie in the order of their ids unless top-k or top-p are set. A draw on the edge between two of them may
    fall to either, by rounding: of 512, at most two."""
    values = logits(512, size, dtype)
    menu: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"min_p": 0.05}, {"repetition_penalty": 1.3}]
    rows = [Row(SamplingParams(**menu[i % len(menu)]), prompt=[1, 2], output=[3], seed=i) for i in range(512)]
    found = sample(TritonSampler, values.clone(), rows)
    assert (found != sample(StandardSampler, values.clone(), rows)).sum() <= 2


@pytest.mark.parametrize(
    "params", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.8, "min_p": 0.01}], ids=str
)
@pytest.mark.parametrize("size", SIZES)
def test_draws_follow_the_distribution(size: int, params: dict[str, Any]) -> None:
    values = torch.randn(1, size, device="cuda", generator=torch.Generator("cuda").manual_seed(size)) * 4
    rows = [Row(SamplingParams(**params), seed=i) for i in range(1024)]
    tokens = sample(TritonSampler, values.expand(1024, -1).contiguous(), rows)
    counts = torch.bincount(tokens.cpu(), minlength=size)
    assert unlike(counts, wanted(values[0].cpu(), **params)) is None


def test_a_draw_does_not_depend_on_its_batch() -> None:
    values = logits(64, SIZES[1], torch.bfloat16)
    rows = [Row(SamplingParams(top_k=40, top_p=0.9), seed=i) for i in range(64)]
    together = sample(TritonSampler, values.clone(), rows).tolist()
    alone = [int(sample(TritonSampler, values[i : i + 1].clone(), rows[i : i + 1])) for i in range(64)]
    assert together == alone
