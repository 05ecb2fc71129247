"""What config.json's ``quantization_config`` says: which layers are quantized, and how. No torch.

GPTQ as AutoGPTQ and GPTQModel write it, AWQ as AutoAWQ does ("gemm"), compressed-tensors' "pack-quantized". All hold
``(q - zero) * scale``, q and zero unsigned, a scale and a zero for each output and group of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightllm import ModelInfo, UserError

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


Schemes = Callable[[str, bool], "Scheme | None"]
"""(a layer's name, whether it gives logits) -> its scheme; None: it is not quantized."""


def quantization(info: ModelInfo) -> dict[str, Any]:
    found = info.get("quantization_config")
    return found if isinstance(found, dict) else {}


def read(info: ModelInfo) -> tuple[str, Schemes]:
    """The quant_method, and the schemes. Raises UserError for what is not supported."""
    config = quantization(info)
    method = str(config.get("quant_method"))
    if method not in METHODS:
        raise UserError(f"{info.path}: its quant_method is {method!r}; supported: {', '.join(METHODS)}")
    try:
        return method, METHODS[method](config)
    except Unsupported as error:
        raise UserError(f"{info.path}: its {method} quantization {error}") from None
    except KeyError as error:
        raise UserError(f"{info.path}: its {method} quantization does not say its {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{info.path}: its quantization_config cannot be read: {error}") from None


class Unsupported(Exception):
    """Goes on from "its quantization"."""


def _one_of(config: Mapping[str, Any], key: str, supported: tuple[Any, ...], *names: str, default: Any = None) -> Any:
    """``config[key]``, or what it has under another of its ``names``."""
    found = next((config[name] for name in (key, *names) if config.get(name) is not None), default)
    if found is None:
        raise KeyError(key)
    if found not in supported:
        raise Unsupported(f"has {key} {found!r}; supported: {', '.join(map(str, supported))}")
    return found


def _group(size: Any) -> int | None:
    if size == -1:
        return None
    if not isinstance(size, int) or size < 1:
        raise Unsupported(f"has group_size {size!r}; supported: positive numbers, and -1 for the whole column")
    return size


def _gptq(config: dict[str, Any]) -> Schemes:
    if config.get("is_marlin_format"):
        raise Unsupported("has Marlin's layout; supported: gptq, gptq_v2")
    _one_of(config, "pack_dtype", ("int32",), default="int32")

    def scheme(settings: Mapping[str, Any]) -> Scheme:
        layout = _one_of(settings, "checkpoint_format", ("gptq", "gptq_v2"), "format", default="gptq")
        return Scheme(
            bits=_one_of(settings, "bits", BITS),
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


def _awq(config: dict[str, Any]) -> Schemes:
    _one_of(config, "version", ("gemm", "GEMM"), "format", default="gemm")
    group = next((config[key] for key in ("group_size", "q_group_size") if key in config), None)
    if group is None:
        raise KeyError("group_size")
    everywhere = Scheme(bits=_one_of(config, "bits", (4,), "w_bit"), group=_group(group))
    skipped = [re.compile(rf"(?:.*\.)?(?:{key})(?:\.|$)") for key in config.get("modules_to_not_convert") or ()]

    def of(name: str, head: bool) -> Scheme | None:
        return None if head or any(pattern.match(name) for pattern in skipped) else everywhere

    return of


def _compressed_tensors(config: dict[str, Any]) -> Schemes:
    _one_of(config, "format", ("pack-quantized",))
    sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        raise Unsupported(f"has sparsity_config format {sparsity!r}; supported: dense")
    groups = {
        target: _compressed_weights(group)
        for group in config["config_groups"].values()
        for target in group.get("targets") or ()
    }
    ignored = list(config.get("ignore") or ())
    for text in (*groups, *ignored):
        re.compile(text.removeprefix("re:"))

    def of(name: str, head: bool) -> Scheme | None:
        if "Linear" in ignored or any(_is(name, text) for text in ignored):
            return None
        # the most specific: by name, by pattern, by class
        for target in sorted(groups, key=lambda text: text.startswith("re:")):
            if _is(name, target):
                return groups[target]
        return groups.get("Linear")

    return of


def _is(name: str, text: str) -> bool:
    return re.match(text[3:], name) is not None if text.startswith("re:") else text == name


def _compressed_weights(group: Mapping[str, Any]) -> Scheme:
    if group.get("input_activations"):
        raise Unsupported("is of activations, too; supported: weights only")
    _one_of(group, "format", ("pack-quantized",), default="pack-quantized")
    weights = group["weights"]
    _one_of(weights, "type", ("int",), default="int")
    strategy = _one_of(
        weights, "strategy", ("group", "channel"), default="group" if weights.get("group_size") else None
    )
    return Scheme(
        bits=_one_of(weights, "num_bits", BITS),
        group=_group(weights["group_size"]) if strategy == "group" else None,
        zeros=not weights.get("symmetric", True),
        # "weight" and "static" permute before quantizing and store weights in their own order
        act_order=weights.get("actorder") in ("group", "dynamic", True),
    )


METHODS: Mapping[str, Callable[[dict[str, Any]], Schemes]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
