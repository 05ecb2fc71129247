"""Rotary position embedding (Su et al., 2021) and its extensions to longer contexts.

Reads config.json in both spellings, ``rope_parameters`` (with ``rope_theta`` inside) and the older ``rope_scaling``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightllm.interfaces import ModelInfo, UserError


def rope_parameters(info: ModelInfo) -> dict[str, Any]:
    """The parameters as one dict with ``rope_type`` and ``rope_theta``, whichever spelling the checkpoint uses."""
    parameters = dict(info.get("rope_scaling") or {}) | dict(info.get("rope_parameters") or {})
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", info.get("rope_theta", 10000.0))
    parameters.setdefault("original_max_position_embeddings", info.get("original_max_position_embeddings"))
    return parameters


def context_length(info: ModelInfo) -> int | None:
    """Tokens the positions reach: those of training, stretched by the scaling types that do not count that in."""
    trained = info.get("max_position_embeddings")
    p = rope_parameters(info)
    if trained is None or p["rope_type"] not in ("linear", "dynamic", "yarn"):
        return trained
    if p["rope_type"] == "yarn" and p.get("factor"):
        trained = p["original_max_position_embeddings"] or trained
    return int(trained * float(p.get("factor") or 1.0))


class Rope(nn.Module):
    """Cosines and sines for positions. A token's rotation depends on its position alone: never on what else is in the
    batch, nor on how its prompt was cut into chunks."""

    frequencies: Tensor
    exponents: Tensor

    def __init__(self, info: ModelInfo, head_dim: int, device: torch.device, **overrides: Any) -> None:
        super().__init__()
        p = rope_parameters(info) | overrides
        dim = int(head_dim * (p.get("partial_rotary_factor") or info.get("partial_rotary_factor", 1.0)))
        trained = info.get("max_position_embeddings", 2048)
        self.theta, self.factor = float(p["rope_theta"]), float(p.get("factor") or 1.0)
        self.trained = trained if p["rope_type"] == "dynamic" else None
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        frequencies, self.magnitude = _scaled(self.theta**-exponents, p, dim, trained)
        factors = info.get("rope_freq_factors")  # GGUF's way to write llama3 scaling
        if factors is not None:
            frequencies = frequencies / torch.tensor(factors, dtype=torch.float32)
        self.register_buffer("frequencies", frequencies.to(device), persistent=False)
        self.register_buffer("exponents", exponents.to(device), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[tokens] -> cosines and signed sines [tokens, 1, rotated], for `Operators.rotate`. Once a step."""
        index = positions.to(torch.float32)[:, None]
        if self.trained is None:
            angles = index * self.frequencies
        else:
            # Dynamic NTK (bloc97, 2023): the base grows with the length. Position p is rotated with the base for length
            # p + 1, as when it was generated: a base for the whole prompt would invalidate cached keys.
            length = torch.clamp(index + 1, min=self.trained)
            dim = 2 * self.exponents.shape[0]
            base = self.theta * (self.factor * length / self.trained - (self.factor - 1)) ** (dim / (dim - 2))
            angles = index * base**-self.exponents
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        return torch.cat((cos, cos), -1).to(dtype).unsqueeze(1), torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1)


def _scaled(frequencies: Tensor, p: dict[str, Any], dim: int, trained: int) -> tuple[Tensor, float]:
    """The frequencies [dim / 2] as the RoPE type changes them, and the factor on cosines and sines."""
    factor = float(p.get("factor") or 1.0)
    match p["rope_type"]:
        case "default" | "dynamic":
            return frequencies, 1.0
        case "linear":
            return frequencies / factor, 1.0
        case "llama3":
            return _llama3(frequencies, p, factor), 1.0
        case "yarn":
            return _yarn(frequencies, p, dim, trained)
    raise UserError(f"RoPE type {p['rope_type']!r} is not supported (default, linear, dynamic, llama3 and yarn are)")


def _llama3(frequencies: Tensor, p: dict[str, Any], factor: float) -> Tensor:
    """Llama 3.1: slow frequencies divided by ``factor``, fast ones kept, those between blended."""
    low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
    turns = float(p["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / factor * (1 - keep)


def _yarn(frequencies: Tensor, p: dict[str, Any], dim: int, trained: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023), with DeepSeek's mscale fields as transformers reads them."""
    theta, original = float(p["rope_theta"]), p["original_max_position_embeddings"]
    factor = float(p.get("factor") or (trained / original if original else 1.0))
    original = original or trained

    def scale(by: float, mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(by) + 1.0 if by > 1 else 1.0

    attention = p.get("attention_factor")
    if attention is None:
        mscale, all_dims = p.get("mscale"), p.get("mscale_all_dim")
        attention = scale(factor, mscale) / scale(factor, all_dims) if mscale and all_dims else scale(factor)

    def dimension(turns: float) -> float:
        """The dimension that turns ``turns`` times over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(attention)
