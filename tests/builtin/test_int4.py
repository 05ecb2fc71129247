"""Packed checkpoints, by layers and whole: what is loaded is what the integers stand for (quantized.py)."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import awq, compressed, compressed_config, gptq, rounded, write_quantized
from torch import Tensor

from lightllm import LinearMethodRecord, ModelInfo, UserError, hookimpl
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.nn.layers import Make, Shard
from lightllm.plugins import Plugins
from lightllm.testing import check_linear_method, check_model
from lightllm_builtin.int4 import matches
from lightllm_builtin.int4.method import Int4
from lightllm_builtin.int4.settings import READERS
from lightllm_builtin.quantization_config import read

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}

Packed = tuple[Mapping[str, Tensor], Tensor]


def info(quantization: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(path="/models/x", architecture="A", config={"quantization_config": dict(quantization)})


def shuffled(weight: Tensor) -> np.ndarray[Any, Any]:
    """An order of the inputs, another for each weight."""
    return np.random.default_rng(int(weight.double().abs().sum() * 1e6)).permutation(weight.shape[1])


def in_gptq(act_order: bool = False, v2: bool = False, g_idx: bool = True, **args: Any) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        held = rounded(weight, order=shuffled(weight) if act_order else None, **args)
        return gptq(held, bits=args.get("bits", 4), v2=v2, g_idx=g_idx), held.weight

    return pack


def in_awq(weight: Tensor, **args: Any) -> Packed:
    held = rounded(weight, **args)
    return awq(held), held.weight


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "gptq": (GPTQ, in_gptq()),
    "gptq-without-g_idx": (GPTQ, in_gptq(g_idx=False)),
    "gptq-symmetric": (GPTQ | {"sym": True}, in_gptq(symmetric=True)),
    "gptq-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, in_gptq(v2=True)),
    "gptq-8-bits": (GPTQ | {"bits": 8}, in_gptq(bits=8)),
    "gptq-column": (GPTQ | {"group_size": -1}, in_gptq(group=-1)),
    "gptq-groups-of-16": (GPTQ | {"group_size": 16}, in_gptq(group=16)),
    "gptq-groups-of-48": (GPTQ | {"group_size": 48}, in_gptq(group=48)),
    "gptq-act-order": (GPTQ | {"desc_act": True}, in_gptq(act_order=True)),
    "gptq-act-order-groups-of-16": (GPTQ | {"desc_act": True, "group_size": 16}, in_gptq(act_order=True, group=16)),
    "awq": (AWQ, in_awq),
    "awq-column": (AWQ | {"group_size": -1}, lambda weight: in_awq(weight, group=-1)),
    "compressed": (compressed_config(), compressed),
    "compressed-zeros": (compressed_config(symmetric=False), lambda weight: compressed(weight, symmetric=False)),
    "compressed-column": (
        compressed_config(symmetric=False, group=-1),
        lambda weight: compressed(weight, symmetric=False, group=-1),
    ),
    "compressed-8-bits": (compressed_config(bits=8), lambda weight: compressed(weight, bits=8)),
}


def with_kernel(info: ModelInfo) -> Int4:
    return Int4(info, kernel=True)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Callable[[Tensor], Packed]]:
    if "compressed" in request.param:
        pytest.importorskip("compressed_tensors")
    config, pack = CASES[request.param]
    assert matches(info(config)) is None
    return {"quantization_config": config}, pack


def test_dequantized_layers(case: Any) -> None:
    config, pack = case
    check_linear_method(Int4, config=config, pack=pack, tolerance=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")
def test_multiplied_layers(case: Any) -> None:
    pytest.importorskip("triton")
    config, pack = case
    check_linear_method(with_kernel, config=config, pack=pack, tolerance=1e-5)


def test_the_kernel_multiplies_in_the_models_dtype() -> None:
    pytest.importorskip("triton")
    config = {"quantization_config": AWQ}
    for dtype, tolerance in (("bfloat16", 2**-7), ("float16", 2**-10)):
        check_linear_method(with_kernel, config=config, pack=in_awq, tolerance=tolerance, dtype=dtype)


# --- whole models


def write(folder: Path, case: str, skip: str = "", **fields: Any) -> Any:
    """``skip``: a regular expression; layers it fits at the end keep their plain weights."""
    config, pack = CASES[case]

    def maybe(name: str, weight: Tensor) -> Packed:
        return ({"weight": weight}, weight) if skip and re.search(f"{skip}$", name) else pack(weight)

    return write_quantized(folder, config, maybe, **fields)


@pytest.mark.parametrize("case", ["gptq-act-order", "awq", "compressed-zeros"])
def test_a_model_is_the_same_as_in_transformers_with_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    if "compressed" in case:
        pytest.importorskip("compressed_tensors")
    check_model(tmp_path, write(tmp_path, case))


def test_transformers_reads_the_compressed_checkpoint_as_we_do(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    write(tmp_path, "compressed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checkpoint has a quantization_config, too
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    check_logprobs(tmp_path, theirs.eval())


def check_logprobs(folder: Path, reference: torch.nn.Module, **chosen: Any) -> list[str]:
    """Of a prompt, with the linear method that auto chooses unless another is given. Gives what the log says of it."""
    plugins = Plugins.discover(extra=[("mine", Provider())])
    engine = build_engine(Config(max_total_tokens=200, device="cpu", **chosen), plugins, folder)
    prompt = list(range(3, 43))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    output = engine.generate(Generate(id="a", prompt=prompt, params=params))["a", 0]
    assert output.error is None
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    wanted = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
    assert [entry.logprob for entry in output.prompt_logprobs] == pytest.approx(wanted, abs=1e-3)
    return engine.ready.summary


class Provider:
    """The kernel, without a CUDA device."""

    @hookimpl
    def lightllm_linear_methods(self) -> Any:
        return [LinearMethodRecord(name="kernel", target=f"{__name__}:with_kernel")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")
def test_a_model_is_the_same_by_the_kernel(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    model = write(tmp_path, "gptq-act-order")
    check_logprobs(tmp_path, model, quantization="mine/kernel")


SKIPPING: dict[str, tuple[str, dict[str, Any], str]] = {
    "awq": ("awq", {"modules_to_not_convert": ["mlp.gate", "layers.0.self_attn"]}, r"layers\.0\.self_attn\.\w+"),
    "compressed": (
        "compressed",
        {"ignore": ["lm_head", "model.layers.1.mlp.down_proj", "re:.*self_attn.o.*"]},
        r"1\.mlp\.down_proj|o_proj",
    ),
    "gptq-blocks": (
        "gptq",
        {"modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"]]},
        "self_attn.*|down_proj",
    ),
    "gptq-dynamic": ("gptq", {"dynamic": {r"-:.*\.0\..*down_proj": {}}}, r"0\.mlp\.down_proj"),
}


@pytest.mark.parametrize("case", SKIPPING)
def test_layers_that_the_checkpoint_leaves_plain(case: str, tmp_path: Path) -> None:
    base, config, skip = SKIPPING[case]
    if base == "compressed":
        pytest.importorskip("compressed_tensors")
    model = write(tmp_path, base, skip)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] |= config
    file.write_text(json.dumps(content))
    check_logprobs(tmp_path, model)


def test_a_head_may_be_tied_or_quantized(tmp_path: Path) -> None:
    check_logprobs(tmp_path, write(tmp_path, "gptq", tie_word_embeddings=True))
    scheme = read(info(GPTQ | {"lm_head": True}), READERS)[1]
    assert scheme("lm_head", True) == scheme("model.layers.0.mlp.up_proj", False) is not None
    assert read(info(GPTQ), READERS)[1]("lm_head", True) is None


def test_layers_of_their_own_bits(tmp_path: Path) -> None:
    """GPTQModel's dynamic, and groups of compressed-tensors: by name before by pattern before by class."""
    scheme = read(info(GPTQ | {"dynamic": {r"+:.*down": {"bits": 8, "group_size": 64}}}), READERS)[1]
    down = scheme("model.layers.0.mlp.down_proj", False)
    assert (down.bits, down.group) == (8, 64)
    assert scheme("model.layers.0.mlp.up_proj", False).bits == 4
    config = compressed_config()
    every = config["config_groups"]["group_0"]
    config["config_groups"] |= {
        "a": {**every, "targets": ["re:.*mlp.*"], "weights": every["weights"] | {"group_size": 64}},
        "b": {**every, "targets": ["model.mlp.down"], "weights": every["weights"] | {"group_size": 128}},
    }
    scheme = read(info(config), READERS)[1]
    assert [scheme(name, False).group for name in ("model.q", "model.mlp.up", "model.mlp.down")] == [32, 64, 128]


def test_a_bias_of_zeros_that_the_model_does_not_have(tmp_path: Path) -> None:
    """As AutoGPTQ wrote them for every layer."""
    config, pack = CASES["gptq"]

    def biased(value: float) -> Callable[[str, Tensor], Packed]:
        def packed(name: str, weight: Tensor) -> Packed:
            tensors, exact = pack(weight)
            return {**tensors, "bias": torch.full((len(weight),), value)}, exact

        return packed

    check_logprobs(tmp_path, write_quantized(tmp_path, config, biased(0.0)))
    model = write_quantized(tmp_path, config, biased(1.0))
    with pytest.raises(UserError, match=r"it has 14 tensors \(model\.layers\.0\.mlp\.down_proj\.bias"):
        check_logprobs(tmp_path, model)


# --- what is refused

CONFIG_24 = compressed_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}
ACTIVATIONS = compressed_config()
ACTIVATIONS["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
FLOATS = compressed_config()
FLOATS["config_groups"]["group_0"]["weights"]["type"] = "float"

REFUSED = [
    (GPTQ | {"bits": 3}, "its gptq quantization has bits 3; supported: 4, 8"),
    (AWQ | {"bits": 8}, "its awq quantization has bits 8; supported: 4"),
    (compressed_config(bits=2), "num_bits 2; supported: 4, 8"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; supported: gptq, gptq_v2"),
    (GPTQ | {"is_marlin_format": True}, "has Marlin's layout; supported: gptq, gptq_v2"),
    (AWQ | {"version": "gemv"}, "has version 'gemv'; supported: gemm, GEMM"),
    (compressed_config() | {"format": "marlin-24"}, "format 'marlin-24'; supported: pack-quantized"),
    (CONFIG_24, "sparsity_config format 'sparse-24-bitmask'; supported: dense"),
    (ACTIVATIONS, "is of activations, too; supported: weights only"),
    (FLOATS, "has type 'float'; supported: int"),
    (GPTQ | {"group_size": 0}, "has group_size 0; supported: positive numbers"),
    ({"quant_method": "gptq", "group_size": 128}, "its gptq quantization does not say its bits"),
    ({"quant_method": "awq", "bits": 4}, "its awq quantization does not say its group_size"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "does not say its config_groups"),
    (AWQ | {"modules_to_not_convert": ["("]}, "its quantization_config cannot be read: "),
    (GPTQ | {"dynamic": ["x"]}, "its quantization_config cannot be read: "),
    ({"quant_method": "exl3"}, "its quant_method is 'exl3'; supported: gptq, awq, compressed-tensors"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_not_supported_is_said_with_what_is(config: dict[str, Any], reason: str) -> None:
    answer = matches(info(config))
    assert answer is not None and "\n" not in answer
    with pytest.raises(UserError) as error:
        Int4(info(config))
    assert str(error.value) == answer
    assert reason in answer and answer.startswith("/models/x: ")


def test_plain_checkpoints_are_not_its_own() -> None:
    assert matches(info({})) == "the checkpoint is not quantized"


def test_the_log_says_that_weights_are_dequantized(tmp_path: Path) -> None:
    summary = check_logprobs(tmp_path, write(tmp_path, "gptq"))
    assert summary[-1] == "linear layers: 8 4-bit gptq (dequantized when loaded), 1 plain (the head)"


def layer(config: dict[str, Any], *names: str, inputs: int = 64, shard: Shard | None = None, **how: Any) -> Any:
    make = Make(dtype=torch.float32, device="cpu", linear_method=lambda: Int4(info(config)), shard=shard)
    made = make.linear(inputs, [32] * len(names), **how)
    made.create(names)
    return made


def test_parts_of_one_layer_that_are_held_differently() -> None:
    with pytest.raises(UserError, match=r"^/models/x: a\.q and a\.v are one layer here, .* plain weights$"):
        layer(compressed_config(ignore=("re:.*v",)), "a.q", "a.k", "a.v")


def test_ranks_that_would_cut_through_a_word() -> None:
    with pytest.raises(UserError, match=r"^down: 2 tensor-parallel ranks get \[36\] inputs each, .* 8 inputs together"):
        layer(GPTQ, "down", inputs=72, shard=Shard(1, 2), split="rows")


def test_groups_that_there_are_not() -> None:
    made = layer(GPTQ | {"desc_act": True}, "up")
    tensors, _ = in_gptq(act_order=True)(torch.randn(32, 64))
    for name, tensor in tensors.items():
        made.load(name, tensor + 1 if name == "g_idx" else tensor, None)
    with pytest.raises(UserError, match=r"^up: g_idx goes from 1 to 2, of 2 groups$"):
        made.finish()


def test_act_order_without_the_order() -> None:
    made = layer(GPTQ | {"desc_act": True}, "up")
    for name, tensor in in_gptq(g_idx=False)(torch.randn(32, 64))[0].items():
        made.load(name, tensor, None)
    with pytest.raises(UserError, match=r"^up: desc_act is set, but there is no g_idx$"):
        made.finish()


def test_the_kernel_needs_a_device() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        make = Make(dtype=torch.float32, device="cpu", linear_method=lambda: with_kernel(info(AWQ)))
        with pytest.raises(UserError, match=r"packed weights cannot be multiplied: (it needs a CUDA|triton is not)"):
            make.linear(32, 32).create(("up",))
