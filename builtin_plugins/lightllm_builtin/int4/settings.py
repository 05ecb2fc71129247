"""How layers of packed integers are held, by config.json. No torch.

GPTQ as AutoGPTQ and GPTQModel write it, AWQ as AutoAWQ does ("gemm"), compressed-tensors' "pack-quantized". All hold
``(q - zero) * scale``, q and zero unsigned, a scale and a zero for each output and group of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightllm_builtin.quantization_config import Readers, Schemes, Unsupported, compressed_tensors, in_modules, one_of

BITS = (4, 8)


@dataclass(frozen=True)
class Scheme:
    """How a layer is held. ``group``: inputs that share a scale; None: all of them. ``zeros``: whether zero points are
    stored, ``less_one``: whether with 1 taken off. ``act_order``: whether each input's group is stored."""

    bits: int
    group: int | None
    zeros: bool = True
    less_one: bool = False
    act_order: bool = False

    def groups(self, inputs: int) -> int:
        return 1 if self.group is None else -(-inputs // self.group)

    def __str__(self) -> str:
        zeros = "with zero points" if self.zeros else "symmetric"
        order = ", act-order" if self.act_order else ""
        return f"{self.bits} bits, group size {self.group or -1}, {zeros}{order}"


def _group(size: Any) -> int | None:
    if size == -1:
        return None
    if not isinstance(size, int) or size < 1:
        raise Unsupported(f"has group_size {size!r}; supported: positive numbers, and -1 for the whole column")
    return size


def _gptq(config: dict[str, Any]) -> Schemes[Scheme]:
    if config.get("is_marlin_format"):
        raise Unsupported("has Marlin's layout; supported: gptq, gptq_v2")
    one_of(config, "pack_dtype", ("int32",), default="int32")

    def scheme(settings: Mapping[str, Any]) -> Scheme:
        layout = one_of(settings, "checkpoint_format", ("gptq", "gptq_v2"), "format", default="gptq")
        return Scheme(
            bits=one_of(settings, "bits", BITS),
            group=_group(settings["group_size"]),
            less_one=layout == "gptq",
            act_order=bool(settings.get("desc_act", False)),
        )

    everywhere = scheme(config)
    # GPTQModel: what differs for the layers that a pattern matches; "-:" for those that are not quantized
    dynamic = [
        (
            re.compile(key.removeprefix("-:").removeprefix("+:")),
            None if key[:2] == "-:" else scheme({**config, **value}),
        )
        for key, value in (config.get("dynamic") or {}).items()
    ]
    blocks = config.get("modules_in_block_to_quantize")
    only = [f".{n}" for entry in blocks for n in ([entry] if isinstance(entry, str) else entry)] if blocks else None

    def of(name: str, head: bool) -> Scheme | None:
        for pattern, found in dynamic:
            if pattern.match(name):
                return found
        if (head and not config.get("lm_head")) or (only and not head and not name.endswith(tuple(only))):
            return None
        return everywhere

    return of


def _awq(config: dict[str, Any]) -> Schemes[Scheme]:
    one_of(config, "version", ("gemm", "GEMM"), "format", default="gemm")
    group = next((config[key] for key in ("group_size", "q_group_size") if key in config), None)
    if group is None:
        raise KeyError("group_size")
    everywhere = Scheme(bits=one_of(config, "bits", (4,), "w_bit"), group=_group(group))
    skipped = in_modules(config.get("modules_to_not_convert"))

    def of(name: str, head: bool) -> Scheme | None:
        return None if head or skipped(name) else everywhere

    return of


def _compressed_tensors(config: dict[str, Any]) -> Schemes[Scheme]:
    return compressed_tensors(config, ("pack-quantized",), _compressed_weights)


def _compressed_weights(group: Mapping[str, Any]) -> Scheme:
    if group.get("input_activations"):
        raise Unsupported("is of activations, too; supported: weights only")
    weights = group["weights"]
    one_of(weights, "type", ("int",), default="int")
    strategy = one_of(weights, "strategy", ("group", "channel"), default="group" if weights.get("group_size") else None)
    return Scheme(
        bits=one_of(weights, "num_bits", BITS),
        group=_group(weights["group_size"]) if strategy == "group" else None,
        zeros=not weights.get("symmetric", True),
        # "weight" and "static" permute before quantizing and store weights in their own order
        act_order=weights.get("actorder") in ("group", "dynamic", True),
    )


READERS: Readers[Scheme] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
