"""float8 linear layers: their rounding and products against float8.py, the kernel in Triton's interpreter, and a server
beside transformers. Uninitialised memory is NaN, so an element that is not written shows.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import float8
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import tensors
from torch import Tensor

from lightllm import ModelInfo
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.nn.layers import Make
from lightllm.plugins import Plugins, Recipe
from lightllm.testing import check_linear_method, check_plugin
from lightllm_builtin import fp8
from lightllm_builtin.fp8 import rounding
from lightllm_builtin.fp8.method import Fp8

INFO = ModelInfo(path="", architecture="", config={})
TESTS = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATELESS = HealthCheck.function_scoped_fixture  # as the fixtures here are
EVERY_FLOAT8 = torch.arange(256).to(torch.uint8).view(rounding.FLOAT8).double()


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all() and torch.empty(9, dtype=rounding.FLOAT8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["torch", "triton"])
def quantize(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Any]:
    if request.param == "torch":
        return rounding.quantize
    if torch.cuda.is_available():
        pytest.skip("tests/gpu does this on the device")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """The interpreter's own loses the carry into the exponent, and makes 384 of NaN."""
        if target.name != "fp8e4nv":
            return convert(data, source, target, mode)
        return torch.from_numpy(np.array(data)).to(rounding.FLOAT8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    return rounding.quantize_fused


def test_it_is_a_plugin() -> None:
    check_plugin(fp8)


def test_the_reference_knows_every_float8() -> None:
    finite = EVERY_FLOAT8[EVERY_FLOAT8.isfinite()]
    assert len(finite) == 254
    assert torch.equal(float8.rounded(finite), finite)
    between = (finite.unique()[1:] + finite.unique()[:-1]) / 2
    distances = (float8.rounded(between)[:, None] - finite).abs().amin(1)
    assert not distances.any()


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[STATELESS])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_rows_of_any_size_and_stride_are_rounded(
    quantize: Callable[[Tensor], Any], data: Any, dtype: torch.dtype
) -> None:
    rows, size = data.draw(st.sampled_from((0, 1, 2, 7))), data.draw(st.integers(1, 300))
    x = data.draw(tensors((rows, size), dtype, "cpu"))
    x *= data.draw(st.sampled_from((0.0, 1.0, 1.0, 1e-6, 300.0)))
    before = x.clone()
    found, scales = quantize(x)
    assert (found.shape, found.dtype) == (x.shape, rounding.FLOAT8)
    assert (scales.shape, scales.dtype) == ((rows, 1), torch.float32)
    expected, expected_scales = float8.quantized(x.float())
    assert torch.equal(scales.double(), expected_scales)
    assert torch.equal(found.double(), expected)
    assert torch.equal(x, before)


def test_the_largest_of_a_row_is_kept_and_zeros_are_zeros(quantize: Callable[[Tensor], Any]) -> None:
    x = torch.zeros(5, 32)
    x[1, 3], x[2, 3], x[3, 3], x[4, 3] = 3e38, -1e-30, 1e-45, -7.0
    found, scales = quantize(x)
    assert found[:, 3].tolist() == [0, 448, -448, 0, -448]
    assert scales.isfinite().all() and (scales > 0).all()
    assert not found[:, :3].double().any()
    torch.testing.assert_close((found.float() * scales)[[1, 2, 4]], x[[1, 2, 4]], rtol=2e-7, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # numpy's: infinity times 0
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("multiply", [rounding.multiply, rounding.multiply_emulated])
def test_what_is_not_finite_shows(wrong: float, multiply: Any, quantize: Callable[[Tensor], Any]) -> None:
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    x[1, 9] = wrong
    y = multiply(*quantize(x), *rounding.quantize(weight), torch.float32)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("native", [True, False], ids=["scaled_mm", "emulated"])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_products(native: bool, data: Any, dtype: torch.dtype) -> None:
    """PyTorch's product for devices runs on a CPU, too."""
    rows, inputs, outputs = data.draw(st.sampled_from((0, 1, 5))), *(16 * data.draw(st.integers(1, 6)) for _ in "io")
    x = data.draw(tensors((rows, inputs), dtype, "cpu"))
    weight = data.draw(tensors((outputs, inputs), dtype, "cpu")) / 16
    multiply = rounding.multiply if native else rounding.multiply_emulated
    found = multiply(*rounding.quantize(x), *rounding.quantize(weight), dtype)
    assert (found.dtype, found.shape) == (dtype, (rows, outputs))
    exact, terms = float8.product(x, weight)
    if native:  # of the float8 numbers themselves
        float8.close(found, exact, terms, torch.float64, torch.bfloat16)
    else:
        float8.close(found, exact, terms, dtype, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_layers_multiply(dtype: str) -> None:
    """Each factor is rounded to 4 significant bits: off by up to 1/16, and by 1/38 in the quadratic mean, so that a
    product is off by 1/27. So is a sum of 64 of them, both growing as its root. The largest of some hundred answers is
    about as many times the mean as the largest of their errors is."""
    check_linear_method(Fp8, dtype=dtype, tolerance=1.5 / 27)


def make_layer(inputs: int, outputs: int, **more: Any) -> Any:
    make = Make(dtype=torch.float32, device="cpu", linear_method=lambda: Fp8(INFO))
    layer = make.linear(inputs, outputs, **more)
    layer.create(("layer",))
    torch.manual_seed(inputs + outputs)
    layer.load("weight", torch.randn(outputs, inputs), None)
    return layer


def test_a_layer_holds_a_byte_for_each_weight() -> None:
    layer = make_layer(64, 48)
    layer.finish()
    assert not list(layer.parameters())
    held = [value for value in vars(layer.method).values() if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in held) == 64 * 48 + 4 * 48


def test_a_device_gets_the_weights_of_finished_layers_only() -> None:
    """A device may have no room for all of them as they are in the checkpoint."""
    make = Make(dtype=torch.bfloat16, device="meta", linear_method=lambda: Fp8(INFO))
    layer = make.linear(64, 48)
    layer.create(("layer",))
    assert layer.weight.device.type == "cpu"
    layer.load("weight", torch.randn(48, 64), None)
    layer.finish()
    assert layer.method.weight.device.type == layer.method.scales.device.type == "meta"


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 48), (48, 40)])
def test_a_layer_whose_sizes_do_not_fit_is_plain(inputs: int, outputs: int) -> None:
    layer = make_layer(inputs, outputs)
    weight = layer.weight.detach().clone()
    layer.finish()
    x = torch.randn(3, inputs)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert layer.method.summary(layer) == "plain (sizes that are no multiples of 16)"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_plain(tied: bool) -> None:
    make = Make(dtype=torch.float32, device="cpu", linear_method=lambda: Fp8(INFO))
    embedding = make.embedding(48, 64)
    head = make.head(embedding, tied=tied)
    head.create(("head",))
    embedding.weight.copy_(weight := torch.randn(48, 64))
    if not tied:
        head.load("weight", weight, None)
    head.finish()
    x = torch.randn(3, 64)
    torch.testing.assert_close(head(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(embedding(torch.arange(48)), weight)
    assert head.method.summary(head) == "plain (the head)"


def test_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightllm_builtin.fp8 import method

    for capability, expected in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert method.multiplies_float8(torch.device("cuda")) is expected
    assert not method.multiplies_float8(torch.device("cpu"))
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="7.0"))
    assert not method.multiplies_float8(torch.device("cuda"))


@pytest.mark.parametrize("case", ["llama-gqa", "llama-biases", "llama-tied", "qwen2"])
def test_an_engine_answers_as_transformers_with_rounded_layers(case: str, tmp_path: Path) -> None:
    """Log-probabilities of 133 tokens. With the same rounding they are the same but for the last bits of float32. These
    may put a number that lies between two float8 numbers on the other side, which the tokens after it
    see. Without it they are off by what 3 layers of 4 products lose, each 1/27 of its size (`test_layers_multiply`), in
    logits of variance 1 or so: about a tenth."""
    model = write_checkpoint(tmp_path, case)
    draw = random.Random(case)
    prompts = [[draw.randrange(199) for _ in range(size)] for size in (90, 3, 40)]
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    config = Config(dtype="float32", device="cpu", quantization="fp8", max_total_tokens=1024)
    with closing(build_engine(config, Plugins.discover(Recipe(), quiet=True), tmp_path)) as engine:
        asked = [Generate(id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(prompts)]
        outputs = [output for _, output in sorted(engine.generate(*asked).items())]
        assert engine.ready.summary[-1] == (
            "linear layers: 12 emulated float8 (slower than plain: this device cannot multiply float8), "
            "1 plain (the head)"
        )

    def differences() -> Tensor:
        found, expected = [], []
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = prompt + output.tokens
            with torch.no_grad():
                values = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            expected.append(values[range(len(tokens) - 1), tokens[1:]])
            found += [entry.logprob for entry in (*output.prompt_logprobs, *output.logprobs)]
        return (torch.tensor(found) - torch.cat(expected)).abs()

    assert 0.02 < differences().mean() < 0.25
    float8.round_layers(model, weights=True)
    assert differences().median() < 1e-5
    assert differences().max() < 0.1


COMPILE = """
import torch
from compiled import Compiled
from lightllm_builtin.fp8 import kernels, rounding

kernel = kernels.quantize
for capability in (89, 90):
    kernels.quantize = Compiled(kernel, capability)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (64, 896, 14336, 53248):
            rounding.quantize_fused(torch.zeros(3, size + 8, dtype=dtype)[:, 8:])
"""


def test_the_kernel_compiles_for_devices(tmp_path: Path) -> None:
    """What the interpreter lets pass and a compiler does not. Needs no device."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["quantize"] * 24
