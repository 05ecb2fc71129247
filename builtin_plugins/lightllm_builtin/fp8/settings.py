"""How the layers of float8 checkpoints are held, by config.json. No torch.

compressed-tensors' "float-quantized", and quant_method "fp8", which AutoFP8, vLLM and Hugging Face's libraries write.
Both hold e4m3 numbers and what they are multiplied by: a scale for every tensor, output or block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightllm_builtin.quantization_config import Readers, Schemes, Unsupported, compressed_tensors, in_modules, one_of


@dataclass(frozen=True)
class Scheme:
    """``block``: how many outputs and inputs share a scale of the weight; None: all of a part's. ``scales``: the names
    these may have; a layer has one of them. ``input_scales``: the names of what is not used."""

    block: tuple[int | None, int | None]
    scales: tuple[str, ...] = ("weight_scale",)
    input_scales: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows, columns = self.block
        of = f"blocks of {rows} x {columns}" if columns else "outputs" if rows else "tensors"
        return f"float8 with scales of {of}{', static for inputs' if self.input_scales else ''}"


def _block(found: Any) -> tuple[int, int]:
    if not isinstance(found, (list, tuple)) or len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise Unsupported(f"has blocks of {found!r}; supported: two positive numbers")
    return found[0], found[1]


def _fp8(config: dict[str, Any]) -> Schemes[Scheme]:
    one_of(config, "fmt", ("e4m3",), default="e4m3")
    static = one_of(config, "activation_scheme", ("dynamic", "static"), default="dynamic") == "static"
    inputs = ("input_scale", "activation_scale") if static else ()
    if config.get("weight_block_size") is None:
        everywhere = Scheme((None, None), ("weight_scale", "weight_scale_inv"), inputs)
    else:
        everywhere = Scheme(_block(config["weight_block_size"]), ("weight_scale_inv",), inputs)
    skipped = [in_modules(config.get(key)) for key in ("modules_to_not_convert", "ignored_layers")]

    def of(name: str, head: bool) -> Scheme | None:
        return None if head or any(skips(name) for skips in skipped) else everywhere

    return of


def _compressed_tensors(config: dict[str, Any]) -> Schemes[Scheme]:
    # "naive-quantized": as older versions call the same
    return compressed_tensors(config, ("float-quantized", "naive-quantized"), _compressed_weights)


def _compressed_weights(group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    if not inputs:
        raise Unsupported("is of weights only; supported: of activations, too")
    if group.get("output_activations"):
        raise Unsupported("is of a layer's outputs, too; supported: weights and inputs")
    for each in (weights, inputs):
        one_of(each, "type", ("float",), default="int")
        one_of(each, "num_bits", (8,), default=8)
        one_of(each, "symmetric", (True,), default=True)
    strategy = one_of(weights, "strategy", ("tensor", "channel", "block"), default="tensor")
    static = not inputs.get("dynamic")
    if static:
        one_of(inputs, "strategy", ("tensor",), default="tensor")
    if strategy == "block":
        block: tuple[int | None, int | None] = _block(weights.get("block_structure"))
    else:
        block = (1 if strategy == "channel" else None, None)
    return Scheme(block, input_scales=("input_scale",) if static else ())


READERS: Readers[Scheme] = {"fp8": _fp8, "compressed-tensors": _compressed_tensors}
