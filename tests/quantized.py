"""Weights rounded to integers and written as GPTQ, AWQ and compressed-tensors write them.

GPTQ and AWQ are packed here, as AutoGPTQ 0.7.1 (qlinear_cuda.py), GPTQModel 7.7 (utils/model.py) and AutoAWQ 0.2.9
(modules/linear/gemm.py) do it; compressed-tensors' by its own library. What the integers stand for is computed in
float64, from them and not from the packed words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import BASE, FAMILIES, write_tokenizer
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Rounded:
    """``values`` [out, in], unsigned; ``scales`` (float16's), ``zeros`` [out, groups]; ``groups`` [in]."""

    values: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]

    @property
    def weight(self) -> Tensor:
        """What they stand for, float64."""
        steps = self.values.astype(np.float64) - self.zeros[:, self.groups]
        return torch.from_numpy(steps * self.scales.astype(np.float64)[:, self.groups])


def rounded(
    weight: Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    order: np.ndarray[Any, Any] | None = None,
) -> Rounded:
    """``group``: -1 for the whole column. ``order``: inputs in the order in which they were put into groups."""
    w = weight.double().cpu().numpy()
    outputs, inputs = w.shape
    size = inputs if group == -1 else group
    groups = np.empty(inputs, np.int64)
    groups[np.arange(inputs) if order is None else order] = np.arange(inputs) // size
    top = 2**bits - 1
    scales, zeros = np.empty((2, outputs, groups.max() + 1))
    for g in range(groups.max() + 1):
        low, high = w[:, groups == g].min(1).clip(max=0), w[:, groups == g].max(1).clip(min=0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[:, g] = np.maximum((high - low) / top, 1e-6).astype(np.float16)
        zeros[:, g] = (top + 1) / 2 if symmetric else np.rint(-low / scales[:, g]).clip(0, top)
    values = (np.rint(w / scales[:, groups]) + zeros[:, groups]).clip(0, top)
    return Rounded(values.astype(np.int64), scales.astype(np.float16), zeros.astype(np.int64), groups)


def words(values: np.ndarray[Any, Any], bits: int, order: tuple[int, ...] | None = None) -> np.ndarray[Any, Any]:
    """[m, n] -> [m, n / (32 / bits)] int32; ``order``: which of a word's values lies in the lowest bits, and so on."""
    per = 32 // bits
    packed = np.zeros((values.shape[0], values.shape[1] // per), np.uint32)
    for i in range(per):
        each = values[:, (order[i] if order else i) :: per]
        packed |= each.astype(np.uint32) << np.uint32(bits * i)
    return packed.view(np.int32)


def gptq(held: Rounded, *, bits: int = 4, v2: bool = False, g_idx: bool = True) -> dict[str, Tensor]:
    qzeros = words(held.zeros.T, bits)
    if not v2:
        qzeros = (qzeros.view(np.uint32) - np.uint32(0x11111111 if bits == 4 else 0x01010101)).view(np.int32)
    tensors = {
        "qweight": words(held.values, bits).T,
        "qzeros": qzeros,
        "scales": held.scales.T,
        "g_idx": held.groups.astype(np.int32),
    }
    return {name: torch.from_numpy(t.copy()) for name, t in tensors.items() if g_idx or name != "g_idx"}


def awq(held: Rounded) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": words(held.values.T, 4, order),
        "qzeros": words(held.zeros.T, 4, order),
        "scales": held.scales.T,
    }
    return {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}


def weights_args(*, bits: int = 4, group: int = 32, symmetric: bool = True) -> dict[str, Any]:
    """As config.json says it in compressed-tensors' way."""
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}


def compressed(weight: Tensor, **args: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The library's tensors, and what it decompresses them to."""
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    held = rounded(weight, **{"symmetric": True, **args})
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_args(**args)))
    middle = 2 ** (args.get("bits", 4) - 1)
    state = {"weight": weight.float(), "weight_scale": torch.from_numpy(held.scales).float()}
    if not args.get("symmetric", True):
        state["weight_zero_point"] = torch.from_numpy(held.zeros - middle).to(torch.int8)
    packed = Compressor.compress(state, scheme)
    return packed, Compressor.decompress(packed, scheme)["weight"]


def compressed_config(ignore: tuple[str, ...] = ("lm_head",), **args: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights_args(**args), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


Pack = Callable[[str, Tensor], tuple[Mapping[str, Tensor], Tensor]]


def write_quantized(folder: Path, config: Mapping[str, Any], pack: Pack, **fields: Any) -> Any:
    """A tiny Llama whose layers' matrices are what ``pack(name, weight)`` makes of them; returns transformers' model of
    what these stand for. ``config``: its quantization_config."""
    config_class, model_class = FAMILIES["llama"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = model_class(config_class(**BASE | sizes | fields)).float().eval()
    model.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name in [n for n, t in state.items() if ".layers." in n and t.dim() == 2]:
        tensors, weight = pack(name.removesuffix(".weight"), state.pop(name))
        state |= {name.removesuffix("weight") + kind: tensor.contiguous() for kind, tensor in tensors.items()}
        model.get_parameter(name).data = weight.float()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": dict(config)}))
    write_tokenizer(folder)
    return model
