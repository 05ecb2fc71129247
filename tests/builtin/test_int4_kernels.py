"""Products with packed weights in Triton's interpreter, by int4_cases.py, which states the bound.

Uninitialised memory is NaN, so an element that is not written shows.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_cases import check, exact, products, random_weights

pytest.importorskip("triton")
product = pytest.importorskip("lightllm_builtin.int4.product")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), small=st.booleans())
def test_any_shape(data: Any, small: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if small:  # so that inputs are cut into parts, and partial sums added by several programs
            tiles = [dataclasses.replace(each, inputs=32, outputs=16) for each in product.TILES]
            patch.setattr(product, "TILES", tiles)
            patch.setattr(product, "SMALLEST_PART", 32)
            patch.setattr(product, "SUMMED", 16)
        products(product.Product, data, "cpu")


@pytest.mark.parametrize("rows", [1, 40])
def test_parts_of_the_inputs_are_added(rows: int) -> None:
    weights = random_weights(70, torch.arange(2048 + 64) // 64, 4, "cpu", seed=rows)
    made = product.Product(weights, torch.float32)
    assert made.parts(2) == 4
    x, bias = torch.randn(rows, 2048 + 64), torch.randn(70)
    check(made(x, bias), x, exact(weights, 70), bias)
    check(made(x, None), x, exact(weights, 70), None)


def test_scales_are_rounded_to_no_other_dtype() -> None:
    weights = random_weights(8, torch.arange(64) // 32, 4, "cpu", seed=0)  # of float16
    for dtype, held in ((torch.float16, torch.float16), (torch.bfloat16, torch.float32)):
        assert product.Product(weights, dtype).scales.dtype == held


COMPILE = """
import torch
from compiled import Compiled
from int4_cases import random_weights
from lightllm_builtin.int4 import kernels
from lightllm_builtin.int4.product import TILES, Product

each = {name: getattr(kernels, name) for name in ("multiply", "add")}
for capability in (80, 90):
    for name, kernel in each.items():
        setattr(kernels, name, Compiled(kernel, capability))
    for dtype, bits, group in (
        (torch.bfloat16, 4, 128), (torch.float16, 4, 128), (torch.bfloat16, 4, 32), (torch.bfloat16, 8, 128)
    ):
        product = Product(random_weights(256, torch.arange(2048) // group, bits, "cpu", seed=0), dtype)
        for rows in [min(tiles.most, 4096) for tiles in TILES] if (bits, group) == (4, 128) else [1]:
            product(torch.zeros(rows, 2048, dtype=dtype), torch.zeros(256, dtype=dtype))
"""


def test_they_compile_for_devices(tmp_path: Path) -> None:
    """What the interpreter lets pass and a compiler does not, and the shared memory that they need. Needs no device."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in launched} == {"multiply", "add"}
    assert max(int(shared) for _, shared in launched) <= 99 * 1024
