"""Triton's attention kernels, in its interpreter, against attention written out and against the torch backend.

Bounds are the kit's (1e-4 in float32 and 3e-2 in bfloat16: 8 bits of mantissa, of values up to about 4), and the one
that attention_steps.py derives. Uninitialised memory is NaN throughout, so an element that is not written shows. That
kernels compile for CUDA devices, which the interpreter does not tell, is tested, too; nothing here runs on one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attention_steps import Step, attention, bound, check, poisoned_memory, steps
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm import AttentionJob, AttentionSpec
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.nn.batch import Batch, KVPool
from lightllm.nn.operators import TorchOperators
from lightllm.plugins import Plugins
from lightllm.testing import check_attention_backend
from lightllm_builtin.triton_attention import supports

pytest.importorskip("triton")
backend = pytest.importorskip("lightllm_builtin.triton_attention.backend")
tiles = pytest.importorskip("lightllm_builtin.triton_attention.tiles")
INTERPRETED = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tests/gpu does this on the device")


SMALL = tiles.Tiles(queries=16, keys=16, warps=4, stages=1, decode_keys=16, decode_warps=4, decode_stages=1)
"""So that short sequences have several tiles and parts."""


@contextmanager
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "tiles_for", lambda head_bytes, device: SMALL)
        patch.setattr(backend, "SMALLEST_PART", 16)
        yield


@pytest.mark.parametrize(("dtype", "cases"), [("float32", 10), ("bfloat16", 4), ("float16", 3)])
def test_decodes_and_prefills_are_attention(dtype: str, cases: int) -> None:
    check_attention_backend(backend.TritonAttention, dtype=dtype, cases=cases)


@settings(max_examples=25, deadline=None)
@given(step=steps(("float32", "bfloat16", "float16"), longest=70))
def test_any_step_in_small_tiles_and_parts(step: Step) -> None:
    with small_tiles():
        check(backend.TritonAttention, step)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_queries_and_keys_are_rotated_where_they_are_written(data: st.DataObject) -> None:
    """Off by the rounding of two products and a sum, each in float32, and of the result."""
    kv_heads, head_dim = data.draw(st.integers(1, 3)), 2 * data.draw(st.integers(1, 65))
    heads = kv_heads * data.draw(st.integers(1, 8))
    rotated = 2 * data.draw(st.integers(1, head_dim // 2))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    tokens, slots, both = data.draw(st.integers(1, 9)), 12, heads + kv_heads
    spec = AttentionSpec(layer=0, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=1.0)
    job = AttentionJob(layers=(spec,), device="cpu", dtype=str(dtype).removeprefix("torch."), max_model_len=slots)
    pool = KVPool(job.layers, slots, dtype, "cpu")
    qkv = torch.randn(tokens, both + kv_heads + 1, head_dim).to(dtype)[:, 1:]
    angles = 6 * torch.rand(tokens, 1, rotated // 2)
    cos, sin = angles.cos(), angles.sin()
    turn = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
    order = torch.randperm(slots)[: tokens + 2]
    target = backend.TritonAttention(job, pool)
    found: list[torch.Tensor] = []
    target._attend = lambda layer, q, batch: found.append(q) or q
    for held in (pool.k[0], pool.v[0]):
        held.fill_(float("nan"))
    batch = Batch.of([order], [tokens], target)
    with poisoned_memory():
        target.attend_packed(spec, qkv, turn, batch)
    exact = TorchOperators().rotate(qkv[:, :both].double(), (turn[0].double(), turn[1].double()))
    keys, values = pool.k[0][batch.slots], pool.v[0][batch.slots]
    size = qkv.abs().max().item()
    bound = 2 * size * torch.finfo(dtype).eps + 4 * size * torch.finfo(torch.float32).eps
    assert (torch.cat((found[0], keys), 1).double() - exact).abs().max() <= bound
    assert torch.equal(values, qkv[:, both:])
    others = torch.ones(slots + 1, dtype=torch.bool)
    others[batch.slots] = False
    assert pool.k[0][others].isnan().all() and pool.v[0][others].isnan().all()


@pytest.mark.parametrize("window", [None, 1, 16, 17, 100])
def test_parts_of_a_decode_are_put_together(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long sequence all parts hold keys; of the short ones beside it most are empty."""
    taken: list[int] = []
    parts = backend.TritonAttention.parts

    def counted(programs: int, keys: int) -> int:
        taken.append(parts(programs, keys))
        return taken[-1]

    monkeypatch.setattr(backend.TritonAttention, "parts", staticmethod(counted))
    with small_tiles():
        check(backend.TritonAttention, Step(6, 2, 80, ((299, 1), (0, 1), (16, 1), (40, 1)), window=window))
    assert taken == [{None: 16, 1: 1, 16: 1, 17: 1, 100: 4}[window]]


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_the_real_tiles_over_several_of_them(head_dim: int) -> None:
    check(backend.TritonAttention, Step(4, 1, head_dim, ((300, 1), (70, 150)), window=90, dtype="bfloat16"))


def test_slots_far_into_a_large_pool() -> None:
    """Where slot * kv_heads * head_dim is beyond int32. Memory that is not touched costs nothing."""
    spec = AttentionSpec(layer=0, heads=2, kv_heads=2, head_dim=256, scale=0.1)
    job = AttentionJob(layers=(spec,), device="cpu", dtype="float16", max_model_len=64)
    slots = 2**31 // (2 * 256) + 40
    pool = KVPool(job.layers, slots, torch.float16, "cpu")
    tables = [torch.arange(slots - 36, slots - 30), torch.arange(slots - 30, slots)]
    target = backend.TritonAttention(job, pool)
    batch = Batch.of(tables, [1, 30], target)
    pool.k[0][tables[0]], pool.v[0][tables[0]] = torch.randn(2, 6, 2, 256, dtype=torch.float16)
    q, k, v = torch.randn(3, 31, 2, 256, dtype=torch.float16)
    batch.plan = target.plan(batch)
    out = target.attend(spec, q, k, v, batch)
    assert torch.equal(pool.k[0][batch.slots], k) and torch.equal(pool.v[0][batch.slots], v)
    for queries, table, found in ((q[:1], tables[0], out[:1]), (q[1:], tables[1], out[1:])):
        keys, values = pool.k[0][table], pool.v[0][table]
        expected = attention(queries.double(), keys.double(), values.double(), len(table) - len(queries), spec)
        assert (found - expected).abs().max() <= bound(queries, keys, values, spec)


def test_compiled_they_fit_into_the_shared_memory_of_any_device() -> None:
    """99 KiB, what a block has at most on devices of compute capability 8.6, 8.9 and 12.0; others have more."""
    jobs = [
        {"capability": 90, "dtype": "bfloat16", "heads": 32, "kv_heads": 8, "head_dim": 128},
        {"capability": 90, "dtype": "bfloat16", "heads": 8, "kv_heads": 4, "head_dim": 256, "softcap": 50.0},
        {"capability": 80, "dtype": "float16", "heads": 32, "kv_heads": 1, "head_dim": 64},
        {"capability": 89, "dtype": "float32", "heads": 16, "kv_heads": 8, "head_dim": 128},
        {"capability": 89, "dtype": "float32", "heads": 32, "kv_heads": 1, "head_dim": 256},
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1] / "compiled.py"), *map(json.dumps, jobs)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    launches = [line.split() for line in ran.stdout.splitlines()]
    assert [name for name, _ in launches] == ["write_slots", "decode", "combine", "prefill", "rotate_and_write"] * len(
        jobs
    )
    assert max(int(size) for _, size in launches) <= 99 * 1024


@pytest.mark.parametrize(
    ("programs", "keys", "expected"),
    [(8, 1024, 16), (8, 8192, 64), (64 * 8, 8192, 2), (1, 100, 1), (1, 1 << 20, 64), (2000, 8192, 1)],
)
def test_decodes_are_cut_into_parts_until_a_device_is_full(programs: int, keys: int, expected: int) -> None:
    assert backend.TritonAttention.parts(programs, keys) == expected


def test_what_was_measured_on_a_device_is_used_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = dataclasses.asdict(SMALL)
    (tmp_path / "measured.json").write_text(json.dumps({"9.0": {"256": measured}}))
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(tiles, "capability", lambda: "9.0")
    assert tiles.tiles_for(256, "cuda") == SMALL
    assert tiles.tiles_for(128, "cuda") == tiles.USUAL[128], "heads that were not measured"
    assert tiles.tiles_for(256, "cpu") == tiles.USUAL[256]
    monkeypatch.setattr(tiles, "capability", lambda: "8.0")
    assert tiles.tiles_for(200, "cuda") == tiles.USUAL[256], "a device that was not measured"


def test_what_is_shipped_as_measured_can_be_read() -> None:
    for sizes in json.loads(tiles.MEASURED.read_text()).values():
        for size, found in sizes.items():
            assert int(size) in tiles.USUAL and tiles.Tiles(**found)


def test_it_says_where_it_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(head_dim: int, device: str = "cuda", heads: int = 1, dtype: str = "bfloat16") -> AttentionJob:
        spec = AttentionSpec(layer=0, heads=heads, kv_heads=1, head_dim=head_dim, scale=1.0)
        return AttentionJob(layers=(spec,), device=device, dtype=dtype, max_model_len=1)

    assert supports(job(256, heads=64)) is None
    assert supports(job(128, heads=64, dtype="float32")) is None
    assert supports(job(256, heads=64, dtype="float32")) == "64 heads share a kv head, more than 32"
    assert supports(job(512)) == "heads of 512 are larger than 256"
    assert supports(job(64, heads=71)) == "71 heads share a kv head, more than 64"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert supports(job(64, "cpu")) == "it needs a CUDA device"
    assert supports(job(64)) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert supports(job(64)) == "it needs a device of compute capability 8.0 or newer, this one's is 7.5"


@pytest.mark.parametrize("case", ["mistral-window", "llama-head-dim"])
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
