"""The kernel for few rows in Triton's interpreter, and who multiplies when."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_steps import poisoned_memory
from few_rows_cases import products
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lightllm import ModelInfo
from lightllm.nn.layers import Make
from lightllm_builtin.linear import dense, few_rows
from lightllm_builtin.linear.dense import Dense
from lightllm_builtin.linear.few_rows import CANDIDATES, Product, Tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")
TESTS = Path(__file__).parents[1]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: Any) -> None:
    with poisoned_memory():
        products(data, "cpu")


def test_leading_dimensions_stay() -> None:
    x, weight = torch.randn(2, 3, 40).half(), torch.randn(50, 40).half()
    found = Product({1: None, 16: CANDIDATES[0]})(x, weight, None)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("rows", "by"), [(0, None), (1, 1), (2, 16), (16, 16), (17, None), (500, None)])
def test_the_number_of_rows_decides(monkeypatch: pytest.MonkeyPatch, rows: int, by: int | None) -> None:
    launched: list[int] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, BN, **constants: launched.append(BN)

    monkeypatch.setattr(few_rows.kernels, "multiply", Kernel())
    product = Product({1: Tiles(1, 1, 1, 1), 16: Tiles(16, 1, 1, 1)})
    assert product(torch.randn(rows, 8), torch.randn(5, 8), None).shape == (rows, 5)
    assert launched == ([] if by is None else [by])


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Product]]:
    """For what products take: of the tiles (None: the library) and the number of rows."""

    def timed(takes: Callable[[Tiles | None, int], float]) -> Product:
        def milliseconds(product: Any, x: Tensor, weights: list[Tensor]) -> float:
            assert {weight.shape for weight in weights} == {(64, 32)}
            return takes(product.tiles[len(x)] if isinstance(product, Product) else None, len(x))

        monkeypatch.setattr(few_rows, "_milliseconds", milliseconds)
        few_rows.fastest.cache_clear()
        return few_rows.fastest(64, 32, torch.bfloat16, torch.device("cpu"))

    yield timed
    few_rows.fastest.cache_clear()


def test_the_fastest_is_chosen_for_each_number_of_rows(fastest: Callable[..., Product]) -> None:
    first, second, third = CANDIDATES
    times = {(first, 1): 5.0, (second, 1): 4.0, (third, 1): 9.0, (first, 16): 9.0, (second, 16): 8.0, (third, 16): 7.0}
    assert fastest(lambda tiles, rows: times.get((tiles, rows), 10.0)).tiles == {1: second, 16: third}
    assert fastest(lambda tiles, rows: times.get((tiles, rows), {1: 3.0, 16: 10.0}[rows])).tiles == {1: None, 16: third}


def test_what_could_be_chance_is_left_to_the_library(fastest: Callable[..., Product]) -> None:
    assert fastest(lambda tiles, rows: 0.98 if tiles else 1.0).tiles == {1: None, 16: None}
    assert fastest(lambda tiles, rows: 0.96 if tiles else 1.0).tiles == dict.fromkeys((1, 16), CANDIDATES[0])


def test_without_memory_to_try_the_library_multiplies(fastest: Callable[..., Product]) -> None:
    def takes(tiles: Tiles | None, rows: int) -> float:
        raise torch.OutOfMemoryError

    assert fastest(takes).tiles == {1: None, 16: None}


def test_what_does_not_fit_is_never_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(each: Callable[[], None], rep: float, return_mode: str) -> float:
        raise OutOfResources(300_000, 100_000, "shared memory")

    monkeypatch.setattr(few_rows, "do_bench_cudagraph", bench)
    assert few_rows._milliseconds(torch.nn.functional.linear, torch.ones(1, 1), []) == float("inf")


def test_layers_in_16_bits_on_a_device_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in float32 do not: there the library multiplies in full precision, and no faster way is looked for."""
    asked: list[tuple[int, int]] = []

    def fastest(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Product:
        asked.append((outputs, inputs))
        return Product({1: CANDIDATES[0], 16: None})

    monkeypatch.setattr(few_rows, "fastest", fastest)
    monkeypatch.setattr(dense, "why_not", lambda device: None)
    info = ModelInfo(path=Path(), architecture="", config={})
    for dtype, device, kernel in ((torch.bfloat16, "meta", True), (torch.float32, "meta", False)):
        made = Make(dtype=dtype, device=device, linear_method=lambda: Dense(info)).linear(32, (40, 24))
        made.create(("a", "b"))
        made.finish()
        assert made.method.summary(made) == ("plain, few rows by a kernel" if kernel else "")  # type: ignore[attr-defined]
    assert asked == [(64, 32)]


COMPILE = """
import torch
from compiled import Compiled
from lightllm_builtin.linear import kernels
from lightllm_builtin.linear.few_rows import CANDIDATES, ROWS, Product

kernel = kernels.multiply
for capability in (80, 90):
    kernels.multiply = Compiled(kernel, capability)
    for tiles in CANDIDATES:
        for dtype in (torch.bfloat16, torch.float16):
            x, weight = torch.zeros(1, 4096, dtype=dtype), torch.zeros(256, 4096, dtype=dtype)
            for bias in (None, torch.zeros(256, dtype=dtype)):
                Product(dict.fromkeys(ROWS, tiles))(x, weight, bias)
"""


def test_it_compiles_for_devices(tmp_path: Path) -> None:
    """What the interpreter lets pass and a compiler does not, and the shared memory that it needs. Needs no device."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = [line.split() for line in done.stdout.splitlines()]
    assert len(launched) == 24
    assert max(int(shared) for _, shared in launched) <= 99 * 1024
