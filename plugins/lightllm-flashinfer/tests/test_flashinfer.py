"""That FlashInfer is asked for the right thing: by a double of its two wrappers, as its kernels need a CUDA device.

The double has their signatures, which a test compares with the real ones where FlashInfer is installed, and computes
attention from what they are given as its documentation says. `test_flashinfer_gpu.py` runs the kernels.
"""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightllm_flashinfer
from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm.testing import check_attention_backend, check_plugin
from lightllm_builtin import torch_attention
from lightllm_flashinfer import backend, lacking_kernel, supports
from lightllm_flashinfer.backend import FlashInferAttention

Given = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The double


def check_given(function: Callable[..., Any], given: Given, *understood: str) -> None:
    """What the double makes nothing of is left at its default."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in {"self", "args", *understood}:
            assert given[name] is parameter.default, f"{name} is {given[name]}"


def check_wrapper(given: Given) -> None:
    workspace = given["float_workspace_buffer"]
    assert workspace.dtype == torch.uint8 and workspace.data_ptr() % 16 == 0 and not workspace.any()


def check_indices(begins: Tensor, pages: Tensor, last: Tensor, page_size: int) -> None:
    """begins [sequences + 1] and last [sequences] are read on the host, pages [begins[-1]] on the device."""
    assert (begins.dtype, pages.dtype, last.dtype) == (torch.int32,) * 3
    assert begins.device.type == last.device.type == "cpu"
    assert len(begins) == len(last) + 1 and begins[0] == 0 and len(pages) == begins[-1]
    assert bool((begins.diff() > 0).all()) and bool((last > 0).all()) and bool((last <= page_size).all())


def attention(
    planned: Given, head_dim: int, queries: Tensor, indices: tuple[Tensor, Tensor, Tensor], run: Given, *, causal: bool
) -> Tensor:
    """queries [sequences + 1]: where each one's begin in q. Documented: logits are scaled, then capped; window_left is
    inclusive; the last query is at the last key."""
    q, (k_cache, v_cache), out = run["q"], run["paged_kv_cache"], run["out"]
    heads, kv_heads, page_size = planned["num_qo_heads"], planned["num_kv_heads"], planned["page_size"]
    assert q.shape == (queries[-1], heads, head_dim) and q.stride(-1) == 1
    assert q.dtype == planned["q_data_type"] and k_cache.dtype == v_cache.dtype == planned["kv_data_type"]
    assert k_cache.shape[1:] == v_cache.shape[1:] == (page_size, kv_heads, head_dim)  # NHD
    out = torch.zeros(q.shape, dtype=q.dtype) if out is None else out
    assert out.shape == q.shape and out.dtype == q.dtype
    scale, cap, window_left = planned["sm_scale"], planned["logits_soft_cap"], planned["window_left"]
    begins, pages, last = indices
    for i, full in enumerate(last.tolist()):
        held = pages[begins[i] : begins[i + 1]].long()
        length = (len(held) - 1) * page_size + full
        k, v = (
            cache[held].flatten(0, 1)[:length].double().repeat_interleave(heads // kv_heads, 1)
            for cache in (k_cache, v_cache)
        )
        rows = slice(int(queries[i]), int(queries[i + 1]))
        logits = torch.einsum("nhd,chd->hnc", q[rows].double(), k) * (head_dim**-0.5 if scale is None else scale)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        key = torch.arange(length)
        query = key[length - (rows.stop - rows.start) :, None]
        seen = (key <= query) | (not causal)
        if window_left >= 0:
            seen &= key >= query - window_left
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hnc,chd->nhd", weights, v).to(q.dtype)
    return out


# fmt: off
class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto",
        jit_args=None,
    ):
        check_given(type(self).__init__, locals(), "float_workspace_buffer", "use_tensor_cores", "backend")
        check_wrapper(locals())
        assert backend in ("fa2", "fa3")  # auto may take one that has no pages of one token
        self.any_group = use_tensor_cores

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        pos_encoding_mode="NONE", window_left=-1, window_right=0, logits_soft_cap=None, q_data_type="float16",
        kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None,
        non_blocking=True, block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False,
        q_len_per_req=1, is_causal=None,
    ):
        check_given(
            type(self).plan, locals(), "indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim",
            "page_size", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "sm_scale",
        )
        assert self.any_group or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 6, 8, 16)
        check_indices(indptr, indices, last_page_len, page_size)
        self.planned = locals()

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, q_len_per_req=None, skip_softmax_threshold_scale_factor=None,
        kv_cache_sf=None,
    ):
        check_given(type(self).run, locals(), "q", "paged_kv_cache", "out")
        p = self.planned
        indices = p["indptr"], p["indices"], p["last_page_len"]
        queries = torch.arange(len(p["last_page_len"]) + 1)
        return attention(p, p["head_dim"], queries, indices, locals(), causal=False)


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None, variant_owns_mask=False,
    ):
        check_given(type(self).__init__, locals(), "float_workspace_buffer", "backend")
        check_wrapper(locals())
        assert backend in ("auto", "fa2", "fa3")  # its auto takes one of these two

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, o_data_type=None, non_blocking=True,
        prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None,
        seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None, max_sequence_kv=None,
        fixed_split_size=None, disable_split_kv=False, uniform_q_len=None,
    ):
        check_given(
            type(self).plan, locals(), "qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len",
            "num_qo_heads", "num_kv_heads", "head_dim_qk", "page_size", "causal", "sm_scale", "window_left",
            "logits_soft_cap", "q_data_type", "kv_data_type",
        )
        check_indices(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        assert qo_indptr.dtype == torch.int32 and qo_indptr.device.type == "cpu"
        assert len(qo_indptr) == len(paged_kv_indptr)
        self.planned = locals()

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        lse_base="log2", lse_layout="NH", enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None,
    ):
        check_given(type(self).run, locals(), "q", "paged_kv_cache", "out")
        p = self.planned
        indices = p["paged_kv_indptr"], p["paged_kv_indices"], p["paged_kv_last_page_len"]
        return attention(p, p["head_dim_qk"], p["qo_indptr"], indices, locals(), causal=p["causal"])
# fmt: on


DOUBLES = (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper)


@pytest.fixture(scope="module", autouse=True)
def double() -> Iterator[None]:
    module = ModuleType("flashinfer")
    for one in DOUBLES:
        setattr(module, one.__name__, one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", module)
        patch.setattr(backend, "WORKSPACE_BYTES", 4096)  # of which the double needs nothing
        yield


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="FlashInfer is not installed")
@pytest.mark.parametrize("one", DOUBLES)
def test_the_double_has_the_real_signatures(one: type) -> None:
    script = f"""
import inspect, flashinfer
real = flashinfer.{one.__name__}
for name in ("__init__", "plan", "run"):
    # decode's plan takes them as they come, and hands them on
    function = getattr(real, "_plan_impl") if name == "plan" and hasattr(real, "_plan_impl") else getattr(real, name)
    print([(p.name, p.kind.name, repr(p.default)) for p in inspect.signature(function).parameters.values()])
"""
    # in a process of its own: here the double has the name
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    real = [line for line in ran.stdout.splitlines() if line.startswith("[(")]
    for name, found in zip(("__init__", "plan", "run"), real, strict=True):
        parameters = inspect.signature(getattr(one, name)).parameters.values()
        assert str([(p.name, p.kind.name, repr(p.default)) for p in parameters]) == found


# ---------------------------------------------------------------------------------------------------------------------
# The backend


def spec(layer: int = 0, **fields: Any) -> AttentionSpec:
    return AttentionSpec(**{"layer": layer, "heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 0.1, **fields})


def job(*layers: AttentionSpec, device: str = "cpu", dtype: str = "bfloat16") -> AttentionJob:
    return AttentionJob(layers=layers or (spec(),), device=device, dtype=dtype, max_model_len=4096)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decodes_and_prefills_are_attention(dtype: str) -> None:
    check_attention_backend(FlashInferAttention, dtype=dtype, supports=lacking_kernel, cases=60)


@st.composite
def steps(draw: st.DrawFn) -> tuple[AttentionJob, list[tuple[int, int]], int]:
    """Layers of up to three kinds; (cached, new) tokens of up to six sequences; a seed."""
    kinds = st.fixed_dictionaries(
        {
            "kv_heads": st.integers(1, 2),
            "head_dim": st.sampled_from((64, 128, 256)),
            "scale": st.sampled_from((0.05, 0.2)),
            "window": st.none() | st.integers(1, 40),
            "softcap": st.sampled_from((None, 2.0, 30.0)),
        }
    )
    drawn, group = draw(st.lists(kinds, min_size=1, max_size=3)), draw(st.integers(1, 9))
    layers = [spec(i, heads=kind["kv_heads"] * group, **kind) for i, kind in enumerate(drawn)]
    new = st.just(1) | st.integers(1, 40)
    sizes = draw(st.lists(st.tuples(st.integers(0, 60), new), min_size=1, max_size=6))
    return job(*layers, dtype="float16"), sizes, draw(st.integers(0, 999))


@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_any_step_is_attention(step: tuple[AttentionJob, list[tuple[int, int]], int]) -> None:
    """Slots are scattered; those that are nobody's hold NaN."""
    job, sizes, seed = step
    random = torch.Generator().manual_seed(seed)
    lengths = [cached + new for cached, new in sizes]
    tables = list(torch.randperm(sum(lengths) + 5, generator=random)[: sum(lengths)].split(lengths))
    pool = KVPool(job.layers, sum(lengths) + 5, torch.float16, "cpu")
    for held in (*pool.k, *pool.v):
        held.fill_(float("nan"))
    ours = FlashInferAttention(job, pool)
    batch = Batch.of(tables, [new for _, new in sizes], ours)
    batch.plan = ours.plan(batch)
    for layer in job.layers:
        contexts = [torch.randn(2, n, layer.kv_heads, layer.head_dim, generator=random).half() for n in lengths]
        for (cached, _), table, (k, v) in zip(sizes, tables, contexts, strict=True):
            pool.k[layer.layer][table[:cached]], pool.v[layer.layer][table[:cached]] = k[:cached], v[:cached]
        new_k, new_v = torch.cat([c[:, cached:] for (cached, _), c in zip(sizes, contexts, strict=True)], 1)
        q = torch.randn(len(new_k), layer.heads, layer.head_dim, generator=random).half()
        found = ours.attend(layer, q, new_k, new_v, batch)
        assert found.shape == q.shape and found.dtype == q.dtype
        for queries, out, context in zip(
            q.split(batch.query_lengths), found.split(batch.query_lengths), contexts, strict=True
        ):
            torch.testing.assert_close(out.double(), written_out(layer, queries, *context), atol=3e-3, rtol=0)


def written_out(layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A query and a head at a time, in float64."""
    rows = []
    for position, query in enumerate(q.double(), len(k) - len(q)):
        first = 0 if layer.window is None else max(0, position + 1 - layer.window)
        for head, one in enumerate(query):
            kv_head = head * layer.kv_heads // layer.heads
            scores = k[first : position + 1, kv_head].double() @ one * layer.scale
            if layer.softcap is not None:
                scores = layer.softcap * (scores / layer.softcap).tanh()
            rows.append(scores.softmax(0) @ v[first : position + 1, kv_head].double())
    return torch.stack(rows).view(q.shape)


def test_the_host_reads_nothing_from_the_device() -> None:
    """Tensors on the meta device have no numbers to be read."""
    tables = [torch.arange(5), torch.arange(5, 45), torch.arange(45, 48), torch.arange(48, 60)]
    ours = FlashInferAttention(job(), KVPool(job().layers, 60, torch.bfloat16, "cpu"))
    here = Batch.of(tables, [1, 7, 1, 12], ours)
    for new in ([1, 7, 1, 12], [1, 1, 1, 1], [2, 7, 3, 12]):
        there = {name: value.to("meta") for name, value in vars(here).items() if isinstance(value, Tensor)}
        batch = Batch(**{**vars(here), **there, "query_lengths": new})
        for part in ours.plan(batch):
            for wrapper in part.wrappers.values():
                pages = wrapper.planned["indices" if part.wrappers is ours.decodes else "paged_kv_indices"]
                assert pages.device.type == "meta"


def test_layers_alike_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [spec(0), spec(1, window=9), spec(2), spec(3, scale=0.2), spec(4, softcap=5.0), spec(5, window=9)]
    made: list[str] = []
    for one in DOUBLES:
        monkeypatch.setattr(one, "__init__", noting(made, one.__name__, one.__init__))
    FlashInferAttention(job(*layers), KVPool(layers, 9, torch.bfloat16, "cpu"))
    assert sorted(made) == sorted(4 * [one.__name__ for one in DOUBLES])


def noting(notes: list[str], note: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        notes.append(note)
        return function(*args, **kwargs)

    return noted


def test_a_plan_waits_until_the_last_one_has_been_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, for which an event stands in."""
    ours = FlashInferAttention(job(), KVPool(job().layers, 60, torch.bfloat16, "cpu"))
    notes: list[str] = []
    for one in DOUBLES:
        monkeypatch.setattr(one, "plan", noting(notes, "plan", one.plan))
    wait, record = (noting(notes, note, lambda: None) for note in ("wait", "record"))
    ours.copied = SimpleNamespace(synchronize=wait, record=record)
    batch = Batch.of([torch.arange(5), torch.arange(5, 45)], [1, 7], ours)
    ours.plan(batch)
    ours.plan(batch)
    assert notes == 2 * ["wait", "plan", "plan", "record"]


def test_kernels_are_loaded_at_the_start() -> None:
    """A plan of both sorts is made then: what compiles, or cannot, does so before the first request."""
    ours = FlashInferAttention(job(), KVPool(job().layers, 9, torch.bfloat16, "cpu"))
    assert all(hasattr(wrapper, "planned") for one in (ours.decodes, ours.prefills) for wrapper in one.values())


# ---------------------------------------------------------------------------------------------------------------------
# The plugin


def test_it_is_a_plugin() -> None:
    check_plugin(lightllm_flashinfer)


def test_declaring_imports_neither_torch_nor_flashinfer() -> None:
    script = "import sys, lightllm_flashinfer; print({'torch', 'flashinfer'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str | None]:
    """Asks `supports` on a machine with these packages, this compute capability, and nvcc if so."""

    def ask(job: AttentionJob, packages: str = "", capability: tuple[int, int] = (9, 0), nvcc: bool = False) -> Any:
        nvcc_file = tmp_path / "bin" / "nvcc"
        nvcc_file.parent.mkdir(exist_ok=True)
        nvcc_file.touch(0o755 if nvcc else 0o644)
        nvcc_file.chmod(0o755 if nvcc else 0o644)
        monkeypatch.delenv("FLASHINFER_NVCC", raising=False)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setattr(lightllm_flashinfer, "find_spec", lambda name: name if name in packages.split() else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        return supports(job)

    return ask


def test_it_says_what_it_lacks(machine: Callable[..., str | None]) -> None:
    cuda, both = job(device="cuda"), "flashinfer flashinfer_jit_cache"
    assert machine(cuda, both) is None
    assert machine(cuda, "flashinfer", nvcc=True) is None
    assert machine(job(device="cpu"), both) == "it needs a CUDA device"
    assert "pip install 'lightllm-flashinfer[kernels]'" in machine(cuda)
    assert "flashinfer-jit-cache" in (reason := machine(cuda, "flashinfer")) and "nvcc" in reason
    assert machine(cuda, both, (7, 5)) == "bfloat16 needs compute capability 8.0, the device has 7.5"
    assert machine(job(device="cuda", dtype="float16"), both, (7, 5)) is None
    assert machine(job(device="cuda", dtype="float32"), both).endswith("not for float32")
    assert machine(job(spec(head_dim=64), spec(1, head_dim=80), device="cuda"), both).endswith("not of 80")
    assert all(machine(job(spec(head_dim=size), device="cuda"), both) is None for size in (64, 128, 256))


def test_auto_never_takes_it() -> None:
    """The torch backend can do whatever is asked."""
    (ours,), (torchs,) = (m.lightllm_attention_backends() for m in (lightllm_flashinfer, torch_attention))
    assert torchs.supports is None and ours.priority < torchs.priority
