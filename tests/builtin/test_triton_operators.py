"""Triton's fused operators, in its interpreter: by the kit, and by operator_cases.py, which states the bounds.

Uninitialised memory is NaN, so an element that is not written shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gates, gathers, norms, rotations

from lightllm.testing import check_operators

pytest.importorskip("triton")
operators = pytest.importorskip("lightllm_builtin.triton_operators.operators")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")

TESTS = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_they_compute_what_their_contract_says(dtype: str) -> None:
    check_operators(operators.TritonOperators, dtype=dtype)


# numpy's: a sigmoid far below 0 is 1 / (1 + inf)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize(("check", "longest"), [(norms, 300), (gates, 200), (rotations, 140), (gathers, 200)])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_shape_and_stride(check: Callable[..., None], longest: int, data: Any, dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "BLOCK", 64)  # a row is several programs'
        check(operators.TritonOperators(), data, dtype, "cpu", longest)


COMPILE = """
import torch
from compiled import Compiled
from lightllm_builtin.triton_operators import kernels
from lightllm_builtin.triton_operators.operators import TritonOperators

each = {name: getattr(kernels, name) for name in ("rms_norm", "gate", "rotate", "gather")}
for capability in (80, 90):
    for name, kernel in each.items():
        setattr(kernels, name, Compiled(kernel, capability))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.zeros(2, 4096, dtype=dtype)
        TritonOperators().rms_norm(x, x, torch.ones(4096), 1e-6)
        TritonOperators().rms_norm(x, None, x[0], 1e-6)
        TritonOperators().silu_mul(x)
        TritonOperators().gelu_mul(x)
        TritonOperators().rotate(x.view(2, 32, 128)[:, :8, :80], (x[:, None, :32], x[:, None, :32]))
        TritonOperators().gather(x, torch.zeros(2, dtype=torch.int64))
"""


def test_they_compile_for_devices(tmp_path: Path) -> None:
    """What the interpreter lets pass and a compiler does not. Needs no device."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled: list[Any] = [line.split()[0] for line in done.stdout.splitlines()]
    assert compiled == ["rms_norm", "rms_norm", "gate", "gate", "rotate", "gather"] * 6
