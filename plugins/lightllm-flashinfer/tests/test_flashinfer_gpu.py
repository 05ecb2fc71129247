"""FlashInfer's kernels on a CUDA device. Where they are not compiled yet, the first tests take minutes each."""

from __future__ import annotations

import pytest
import torch

from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm.testing import check_attention_backend
from lightllm_flashinfer import lightllm_attention_backends, supports

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]

GROUPS = ((32, 8), (28, 4), (16, 16), (8, 1))


def job(*layers: AttentionSpec, dtype: str = "bfloat16") -> AttentionJob:
    return AttentionJob(layers=layers, device="cuda", dtype=dtype, max_model_len=1 << 16)


def spec(heads: int, kv_heads: int, head_dim: int, window: int | None = None) -> AttentionSpec:
    return AttentionSpec(
        layer=0, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, window=window
    )


@pytest.fixture(scope="module", autouse=True)
def able() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if reason := supports(job(spec(4, 2, 64))):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decodes_and_prefills_are_attention(dtype: str) -> None:
    (record,) = lightllm_attention_backends()
    check_attention_backend(record, device="cuda", dtype=dtype)


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_steps_begun_while_others_run_have_their_own_plans(
    heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    """As under overlap: the device is kept busy until all of them are planned, as far as the backend lets them be."""
    from lightllm_builtin.torch_attention.backend import TorchAttention
    from lightllm_flashinfer.backend import FlashInferAttention

    layer = spec(heads, kv_heads, head_dim, window)
    sizes = [[(0, 700), (5000, 1)], [(700, 300), (5001, 1)], [(1000, 1), (5002, 1)], [(3, 1), (17, 900), (5002, 64)]]
    random = torch.Generator("cuda").manual_seed(0)
    pool = KVPool([layer], 12_000, torch.bfloat16, "cuda")
    for held in (*pool.k, *pool.v):
        held.normal_(generator=random)
    theirs, ours = FlashInferAttention(job(layer), pool), TorchAttention(job(layer), pool)
    steps = []
    for step in sizes:
        order = torch.randperm(12_000, generator=random, device="cuda")
        lengths = [cached + new for cached, new in step]
        batch = Batch.of(order[: sum(lengths)].split(lengths), [new for _, new in step], theirs)
        k, v = torch.randn(2, len(batch.slots), kv_heads, head_dim, device="cuda", generator=random).bfloat16()
        q = torch.randn(len(batch.slots), heads, head_dim, device="cuda", generator=random).bfloat16()
        steps.append((batch, q, k, v))
    torch.cuda.synchronize()
    before = [(held, held.clone()) for held in (*pool.k, *pool.v)]
    found = []
    for batch, q, k, v in steps:
        torch.cuda._sleep(50_000_000)
        batch.plan = theirs.plan(batch)
        found.append(theirs.attend(layer, q, k, v, batch))
    for held, old in before:
        held.copy_(old)
    for (batch, q, k, v), out in zip(steps, found, strict=True):
        batch.plan = ours.plan(batch)
        torch.testing.assert_close(out, ours.attend(layer, q, k, v, batch), atol=2e-2, rtol=2e-2)
