"""float8 checkpoints, by layers and whole: what they stand for is computed in float64, or by compressed-tensors."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import float8
import pytest
import torch
from quantized import compressed_config, write_quantized
from torch import Tensor

from lightllm import ModelInfo, UserError
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.nn.layers import Make, Shard
from lightllm.plugins import Plugins, Recipe
from lightllm.testing import check_linear_method
from lightllm_builtin import fp8, int4, linear
from lightllm_builtin.fp8 import method
from lightllm_builtin.fp8.method import Fp8

Packed = tuple[Mapping[str, Tensor], Tensor]
BLOCK = (16, 32)
EMULATED = "(slower than plain: this device cannot multiply float8)"


def info(quantization: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(path="/models/x", architecture="A", config={"quantization_config": dict(quantization)})


def arguments(strategy: str, static: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of weights and of input activations, in compressed-tensors' way."""
    both = {"num_bits": 8, "type": "float", "symmetric": True}
    block = {"block_structure": list(BLOCK)} if strategy == "block" else {}
    inputs = {"strategy": "tensor" if static else "token", "dynamic": not static}
    return {**both, "strategy": strategy, "dynamic": False, **block}, both | inputs


def compressed(weight: Tensor, strategy: str, static: bool = False) -> Packed:
    """The library's tensors, and what it decompresses them to."""
    from compressed_tensors.compressors import FloatQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weights, inputs = (QuantizationArgs(**args) for args in arguments(strategy, static))
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    size = {"tensor": weight.shape, "channel": (1, weight.shape[1]), "block": BLOCK}[strategy]
    high = float8.largest(weight, size).float()
    scales, _ = calculate_qparams(-high, high, weights)
    if strategy == "tensor":
        scales = scales.view(1)
    packed = Compressor.compress({"weight": weight.float(), "weight_scale": scales}, scheme)
    assert packed["weight"].dtype == float8.FLOAT8
    exact = Compressor.decompress(dict(packed), scheme)["weight"]
    return packed | ({"input_scale": torch.full((1,), 0.02)} if static else {}), exact


def config(strategy: str, static: bool = False, ignore: tuple[str, ...] = ("lm_head",), **more: Any) -> dict[str, Any]:
    weights, inputs = arguments(strategy, static)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    found = compressed_config(ignore) | {"format": "float-quantized", "config_groups": {"group_0": group}}
    return found | more


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = FP8 | {"activation_scheme": "static"}
BLOCKS = FP8 | {"weight_block_size": list(BLOCK), "fmt": "e4m3"}

CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "fp8": (FP8, float8.packed),
    "fp8-vectors": (FP8, lambda weight: float8.packed(weight, shape=(1,))),
    "fp8-static": (STATIC, lambda weight: float8.packed(weight, shape=(1,), inputs="input_scale")),
    "fp8-hf": (
        STATIC | {"weight_block_size": None},
        lambda weight: float8.packed(weight, scale="weight_scale_inv", inputs="activation_scale"),
    ),
    "fp8-blocks": (BLOCKS, lambda weight: float8.packed(weight, BLOCK, "weight_scale_inv")),
    "compressed-channel": (config("channel"), lambda weight: compressed(weight, "channel")),
    "compressed-tensor": (config("tensor"), lambda weight: compressed(weight, "tensor")),
    "compressed-static": (config("tensor", static=True), lambda weight: compressed(weight, "tensor", static=True)),
    "compressed-naive": (config("channel", format="naive-quantized"), lambda weight: compressed(weight, "channel")),
    "compressed-blocks": (config("block"), lambda weight: compressed(weight, "block")),
}


def needs(case: str) -> None:
    if "compressed" in case:
        pytest.importorskip("compressed_tensors")


# --- layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_layers_multiply(case: str, dtype: str) -> None:
    """Inputs are rounded: off by 1/38 in the quadratic mean, as so are weights of blocks, by 1/27 together, and the
    largest by what test_fp8.py says."""
    needs(case)
    quantization, pack = CASES[case]
    tolerance = 1.5 / (27 if "blocks" in case else 38)
    check_linear_method(Fp8, config={"quantization_config": quantization}, pack=pack, tolerance=tolerance, dtype=dtype)


def layer(quantization: Mapping[str, Any], *names: str, inputs: int = 64, outputs: int = 32, **how: Any) -> Any:
    shard = how.pop("shard", None)
    make = Make(dtype=torch.float32, device="cpu", linear_method=lambda: Fp8(info(quantization)), shard=shard)
    made = make.linear(inputs, [outputs] * len(names), **how)
    made.create(names)
    return made


def fill(made: Any, pack: Callable[[Tensor], Packed]) -> Tensor:
    """Gives what its weight stands for."""
    random = torch.Generator().manual_seed(1)
    exact = []
    for part, outputs in enumerate(made.full_outs):
        # of different magnitudes, so that a scale of another part shows
        weight = torch.randn(outputs, made.full_inputs, generator=random) * 8**part
        tensors, stands_for = pack(weight)
        for name, tensor in tensors.items():
            made.load(name, tensor, part)
        exact.append(stands_for.double())
    made.finish()
    return torch.cat(exact)


def check(made: Any, weight: Tensor, again: bool, native: bool = False) -> None:
    x = torch.randn(5, made.full_inputs, generator=torch.Generator().manual_seed(2)) * 3
    held, scales = float8.quantized(weight.float()) if again else (weight, 1.0)
    weight = held * scales
    held, scales = float8.quantized(x)
    rounded = held * scales
    dtypes = (torch.float64, torch.bfloat16) if native else (torch.float32, torch.float32)
    float8.close(made(x), rounded @ weight.T, rounded.abs() @ weight.abs().T, *dtypes)


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_numbers_in_the_checkpoint(case: str) -> None:
    """But for blocks, they are not rounded again. Static scales of inputs, whose 0.02 would clamp, are not used."""
    needs(case)
    quantization, pack = CASES[case]
    made = layer(quantization, "a", "b", "c")
    check(made, fill(made, pack), "blocks" in case)
    again = " rounded again from blocks" if "blocks" in case else ""
    assert made.method.summary(made) == f"emulated float8{again} {EMULATED}"


@pytest.mark.parametrize("case", CASES)
def test_products_of_a_device_that_multiplies_float8(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is as PyTorch's product wants it, which runs on a CPU, too."""
    needs(case)
    monkeypatch.setattr(method, "multiplies_float8", lambda _: True)
    monkeypatch.setattr(method, "why_not", lambda _: "the interpreter's rounding is off: see test_fp8.py")
    quantization, pack = CASES[case]
    made = layer(quantization, "a", "b", "c")
    check(made, fill(made, pack), "blocks" in case, native=True)
    assert made.method.summary(made) == ("float8 rounded again from blocks" if "blocks" in case else "float8")


def test_blocks_that_do_not_fill_a_layer() -> None:
    """The last of each part's outputs, and of inputs, are smaller."""
    block = (48, 40)
    made = layer(BLOCKS | {"weight_block_size": list(block)}, "a", "b", outputs=80, inputs=96)
    check(made, fill(made, lambda weight: float8.packed(weight, block, "weight_scale_inv")), True)


def test_blocks_of_whole_rows_are_not_rounded_again() -> None:
    made = layer(BLOCKS | {"weight_block_size": [16, 128]}, "a", "b")
    check(made, fill(made, lambda weight: float8.packed(weight, (16, 128), "weight_scale_inv")), False)
    assert made.method.summary(made) == f"emulated float8 {EMULATED}"


def test_scales_that_are_powers_of_two_in_a_byte() -> None:
    def pack(weight: Tensor) -> Packed:
        scales = torch.exp2((float8.largest(weight, BLOCK) / 448).log2().ceil())
        values = float8.rounded(weight.double() / float8.spread(scales, BLOCK, weight.shape))
        held = {"weight": values.to(float8.FLOAT8), "weight_scale_inv": scales.float().to(torch.float8_e8m0fnu)}
        return held, values * float8.spread(scales, BLOCK, weight.shape)

    made = layer(BLOCKS | {"scale_fmt": "ue8m0"}, "a", "b")
    check(made, fill(made, pack), True)


@pytest.mark.parametrize("case", ["fp8", "fp8-blocks"])
@pytest.mark.parametrize(("inputs", "outputs"), [(40, 48), (48, 40)])
def test_a_layer_whose_sizes_do_not_fit_is_dequantized(case: str, inputs: int, outputs: int) -> None:
    quantization, pack = CASES[case]
    made = layer(quantization, "a", inputs=inputs, outputs=outputs)
    weight = fill(made, pack)
    x = torch.randn(3, inputs)
    torch.testing.assert_close(made(x), (x.double() @ weight.T).float(), rtol=1e-5, atol=1e-5)
    assert made.method.summary(made) == "plain (dequantized, sizes that are no multiples of 16)"


def test_a_layer_holds_a_byte_for_each_weight() -> None:
    made = layer(STATIC, "a", "b")
    fill(made, CASES["fp8-static"][1])
    assert not list(made.parameters())
    held = [value for value in vars(made.method).values() if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in held) == 64 * (64 + 4)


def test_heads() -> None:
    """compressed-tensors says which are quantized; quant_method fp8 quantizes none."""
    for quantization, summary in (
        (FP8, "plain (the head)"),
        (config("tensor"), "plain (the head)"),
        (config("tensor", ignore=()), f"emulated float8 {EMULATED}"),
    ):
        make = Make(dtype=torch.float32, device="cpu", linear_method=lambda q=quantization: Fp8(info(q)))
        head = make.head(make.embedding(48, 64), tied=False)
        head.create(("lm_head",))
        if summary == "plain (the head)":
            head.load("weight", weight := torch.randn(48, 64), None)
            head.finish()
            x = torch.randn(3, 64)
            torch.testing.assert_close(head(x), x @ weight.T, rtol=1e-5, atol=1e-5)
        else:
            check(head, fill(head, float8.packed), False)
        assert head.method.summary(head) == summary


# --- whole models


def write(folder: Path, case: str, skip: str = "", **fields: Any) -> Any:
    """``skip``: a regular expression; layers it fits at the end keep their plain weights."""
    quantization, pack = CASES[case]

    def maybe(name: str, weight: Tensor) -> Packed:
        return ({"weight": weight}, weight) if skip and re.search(f"{skip}$", name) else pack(weight)

    return write_quantized(folder, quantization, maybe, **fields)


def check_logprobs(folder: Path, reference: torch.nn.Module, again: bool = False, skip: str = "") -> list[str]:
    """Of a prompt, by the method that auto chooses. Gives what the log says of it. ``reference``: of transformers, with
    the weights that the checkpoint stands for; its layers are made to round. A number that lies between two of float8
    may be put on either side, which the tokens after it see: the median does not."""
    float8.round_layers(reference, again, skip)
    prompt = [7 * i % 199 for i in range(3, 63)]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    chosen = Config(max_total_tokens=200, device="cpu", dtype="float32")
    with closing(build_engine(chosen, Plugins.discover(Recipe(), quiet=True), folder)) as engine:
        output = engine.generate(Generate(id="a", prompt=prompt, params=params))["a", 0]
        summary: list[str] = engine.ready.summary
    assert output.error is None
    with torch.inference_mode():
        values = reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    expected = values[range(len(prompt) - 1), prompt[1:]]
    off = (torch.tensor([entry.logprob for entry in output.prompt_logprobs]) - expected).abs()
    assert off.median() < 1e-5
    assert off.max() < 0.1
    return summary


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_the_same_as_in_transformers_with_layers_that_round(case: str, tmp_path: Path) -> None:
    needs(case)
    again = "blocks" in case
    summary = check_logprobs(tmp_path, write(tmp_path, case), again)
    how = " rounded again from blocks" if again else ""
    assert summary[-1] == f"linear layers: 8 emulated float8{how} {EMULATED}, 1 plain (the head)"


@pytest.mark.parametrize("case", ["compressed-channel", "compressed-static", "compressed-blocks"])
def test_transformers_reads_the_checkpoint_as_we_do(case: str, tmp_path: Path) -> None:
    needs(case)
    write(tmp_path, case)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checkpoint has a quantization_config, too
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    check_logprobs(tmp_path, theirs.eval(), "blocks" in case)


def change(folder: Path, **quantization: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] |= quantization
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("case", "more", "skip"),
    [
        ("fp8", {"modules_to_not_convert": ["lm_head", "layers.0.self_attn"]}, r"layers\.0\.self_attn\.\w+"),
        ("fp8-static", {"ignored_layers": ["model.layers.1.mlp.down_proj"]}, r"1\.mlp\.down_proj"),
        ("compressed-channel", {"ignore": ["lm_head", "re:.*self_attn.o.*"]}, "o_proj"),
    ],
)
def test_layers_that_the_checkpoint_leaves_plain(case: str, more: Any, skip: str, tmp_path: Path) -> None:
    needs(case)
    model = write(tmp_path, case, skip)
    change(tmp_path, **more)
    assert "plain, " in check_logprobs(tmp_path, model, skip=skip)[-1]


def test_a_tied_head_and_scales_of_a_cache(tmp_path: Path) -> None:
    model = write(tmp_path, "fp8-static", tie_word_embeddings=True)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(2):
        tensors |= {f"model.layers.{i}.self_attn.{name}_scale": torch.tensor(0.5) for name in "kv"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_logprobs(tmp_path, model)


# --- what is refused


def changed(**weights: Any) -> dict[str, Any]:
    found = config("channel")
    found["config_groups"]["group_0"]["weights"] |= weights
    return found


def grouped(**group: Any) -> dict[str, Any]:
    found = config("channel")
    found["config_groups"]["group_0"] |= group
    return found


REFUSED = [
    (FP8 | {"fmt": "e5m2"}, "its fp8 quantization has fmt 'e5m2'; supported: e4m3"),
    (FP8 | {"activation_scheme": "none"}, "has activation_scheme 'none'; supported: dynamic, static"),
    (FP8 | {"weight_block_size": [128]}, "has blocks of [128]; supported: two positive numbers"),
    (FP8 | {"weight_block_size": [0, 128]}, "has blocks of [0, 128]; supported: two positive numbers"),
    (FP8 | {"modules_to_not_convert": ["("]}, "its quantization_config cannot be read: "),
    (grouped(input_activations=None), "is of weights only; supported: of activations, too"),
    (grouped(output_activations={"num_bits": 8}), "is of a layer's outputs, too; supported: weights and inputs"),
    (grouped(format="mxfp8-quantized"), "has format 'mxfp8-quantized'; supported: float-quantized, naive-quantized"),
    (changed(type="int"), "has type 'int'; supported: float"),
    (changed(num_bits=4), "has num_bits 4; supported: 8"),
    (changed(symmetric=False), "has symmetric False; supported: True"),
    (changed(strategy="group"), "has strategy 'group'; supported: tensor, channel, block"),
    (changed(strategy="block"), "has blocks of None; supported: two positive numbers"),
    (config("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "supported: dense"),
    (compressed_config(), "has format 'pack-quantized'; supported: float-quantized, naive-quantized"),
    ({"quant_method": "gptq"}, "its quant_method is 'gptq'; supported: fp8, compressed-tensors"),
]


@pytest.mark.parametrize(("quantization", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_not_supported_is_said_with_what_is(quantization: dict[str, Any], reason: str) -> None:
    answer = fp8.matches(info(quantization))
    assert answer is not None and "\n" not in answer
    with pytest.raises(UserError) as error:
        Fp8(info(quantization))
    assert str(error.value) == answer
    assert reason in answer and answer.startswith("/models/x: ")


def test_one_method_matches_a_checkpoint() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    owners = [(quantization, "fp8") for quantization, _ in CASES.values()]
    owners += [(quantization, "int4") for quantization in (awq, gptq, compressed_config())] + [({}, "dense")]
    ways = {"fp8": fp8.matches, "int4": int4.matches, "dense": linear.is_plain}
    for quantization, owner in owners:
        assert [name for name, matches in ways.items() if matches(info(quantization)) is None] == [owner]


def test_parts_of_one_layer_that_are_held_differently() -> None:
    with pytest.raises(UserError, match=r"^/models/x: a\.q and a\.v are .* scales of outputs and plain weights$"):
        layer(config("channel", ignore=("re:.*v",)), "a.q", "a.k", "a.v")


def test_ranks_that_would_cut_through_a_block() -> None:
    with pytest.raises(UserError, match=r"^up: 2 .* ranks get \[24\] outputs each, .* 16 outputs together"):
        layer(BLOCKS, "up", outputs=48, shard=Shard(0, 2), split="columns")
    with pytest.raises(UserError, match=r"^down: 2 .* ranks get \[48\] inputs each, .* 32 inputs together"):
        layer(BLOCKS, "down", inputs=96, shard=Shard(1, 2), split="rows")


def load(folder: Path, case: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """A checkpoint of which every layer's tensors are changed."""
    quantization, pack = CASES[case]

    def changed(name: str, weight: Tensor) -> Packed:
        tensors = dict(pack(weight)[0])
        change(tensors)
        return tensors, weight

    write_quantized(folder, quantization, changed)
    build_engine(Config(max_total_tokens=200, device="cpu"), Plugins.discover(Recipe(), quiet=True), folder)


BAD: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("fp8", lambda t: t.pop("weight_scale"), r"lacks weight_scale and weight_scale_inv"),
    ("fp8", lambda t: t.update(weight_scale_inv=torch.ones(1)), r"it has both weight_scale and weight_scale_inv"),
    ("fp8", lambda t: t.update(input_scale=torch.ones(1)), r"it has 14 tensors \(.*input_scale.* does not know"),
    ("fp8-blocks", lambda t: t.pop("weight_scale_inv"), r"it lacks 14 tensors \(.*weight_scale_inv"),
    ("fp8-blocks", lambda t: t.update(weight_scale_inv=torch.ones(1, 1)), r"weight_scale_inv has shape \[1, 1\]"),
    (
        "fp8",
        lambda t: t.update(weight=t["weight"].float().to(torch.float8_e5m2)),
        r"does not fit in 14 tensors \(.*weight holds float8_e5m2, the model expects float8_e4m3fn",
    ),
    ("fp8", lambda t: t.update(weight=t["weight"].bfloat16()), r"weight holds bfloat16, the model expects float8"),
    (
        "fp8-blocks",
        lambda t: t.update(weight_scale_inv=torch.ones_like(t["weight_scale_inv"], dtype=torch.uint8)),
        r"weight_scale_inv holds uint8, the model expects float32",
    ),
]


@pytest.mark.parametrize(("case", "change", "reason"), BAD, ids=[reason for *_, reason in BAD])
def test_checkpoints_that_are_not_what_they_say(case: str, change: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        load(tmp_path, case, change)
