"""Triton's attention kernels, in its interpreter, against attention written out and against the torch backend.

Bounds are the kit's: 1e-4 in float32 and 3e-2 in bfloat16 (8 bits of mantissa, of values up to about 4). Uninitialised
memory is NaN throughout, so an element that is not written shows.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from lightllm import AttentionJob, AttentionSpec
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.plugins import Plugins
from lightllm.testing import check_attention_backend
from lightllm_builtin.triton_attention import supports

pytest.importorskip("triton")
backend = pytest.importorskip("lightllm_builtin.triton_attention.backend")
INTERPRETED = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tests/gpu does this on the device")


def test_decodes_and_prefills_are_attention() -> None:
    check_attention_backend(backend.TritonAttention, cases=30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_too(dtype: str) -> None:
    check_attention_backend(backend.TritonAttention, dtype=dtype, cases=10)


def test_decodes_of_many_parts_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 keys: sequences shorter than that leave most of theirs empty."""
    monkeypatch.setattr(backend, "SMALLEST_PART", 16)
    taken: list[int] = []
    parts = backend.TritonAttention.parts

    def counted(programs: int, keys: int) -> int:
        taken.append(parts(programs, keys))
        return taken[-1]

    monkeypatch.setattr(backend.TritonAttention, "parts", staticmethod(counted))
    check_attention_backend(backend.TritonAttention, cases=30)
    assert {1, 2, 4} <= set(taken)


@pytest.mark.parametrize(
    ("programs", "keys", "expected"),
    [(8, 1024, 4), (8, 8192, 32), (64 * 8, 8192, 1), (1, 100, 1), (1, 1 << 20, 256), (0, 0, 1)],
)
def test_decodes_are_cut_into_parts_until_a_device_is_full(programs: int, keys: int, expected: int) -> None:
    assert backend.TritonAttention.parts(programs, keys) == expected


def test_it_says_where_it_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(head_dim: int, device: str = "cuda") -> AttentionJob:
        spec = AttentionSpec(layer=0, heads=1, kv_heads=1, head_dim=head_dim, scale=1.0)
        return AttentionJob(layers=(spec,), device=device, dtype="bfloat16", max_model_len=1)

    assert supports(job(256)) is None
    assert supports(job(512)) == "heads of 512 are larger than 256"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert supports(job(64, "cpu")) == "it needs a CUDA device"


@pytest.mark.parametrize("case", ["llama-gqa", "mistral-window", "llama-head-dim"])
def test_an_engine_gives_the_torch_backends_tokens(tmp_path: Path, case: str) -> None:
    """Prompts in chunks, a shared beginning, decodes of several sequences; the fused operators, too."""
    write_checkpoint(tmp_path, case)
    draw = random.Random(0)
    shared = [draw.randrange(199) for _ in range(21)]
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [shared, [*shared, 5, 6], [7], [draw.randrange(199) for _ in range(30)]]
    answers = []
    for name in ("torch", "triton"):
        config = Config(
            dtype="float32",
            device="cpu",
            max_total_tokens=600,
            max_batch_tokens=24,
            attention_backend=name,
            operators=name,
        )
        engine = build_engine(config, Plugins.discover(quiet=True), tmp_path)
        first = engine.generate(Generate(id="0", prompt=prompts[0], params=params))
        rest = engine.generate(*(Generate(id=str(i), prompt=p, params=params) for i, p in enumerate(prompts) if i))
        assert rest["1", 0].cached_tokens >= len(shared) - 1
        answers.append([output.tokens for output in (first | rest).values()])
    assert answers[0] == answers[1]
