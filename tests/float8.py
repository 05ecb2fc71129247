"""float8 arithmetic written out in float64, checkpoints by it, and what it may differ by from what is computed."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


def rounded(values: Tensor) -> Tensor:
    """The e4m3 number nearest to each, the even one of two: multiples of an eighth of the power of two below it, of
    2^-9 at least, 448 at most."""
    power = torch.frexp(values).exponent.clamp(min=-5) - 1
    step = torch.ldexp(torch.ones_like(values), power - 3)
    return ((values / step).round() * step).clamp(-448, 448)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a row of float32 is divided by, and its float8 numbers, in float64. Scales are rounded to float32."""
    scales = (x.double().abs().amax(-1, keepdim=True) / 448).float().clamp(min=2**-126)
    inverses = (1 / scales.double()).float()
    return rounded((x.double() * inverses.double()).float().double()), scales.double()


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T with both rounded, and the sum of the magnitudes that are added up for it."""
    (a, a_scales), (b, b_scales) = quantized(x.float()), quantized(weight.float())
    a, b = a * a_scales, b * b_scales
    return a @ b.T, a.abs() @ b.abs().T


def largest(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block [ceil(out / block), ceil(in / block)], float64."""
    return torch.stack(
        [torch.stack([b.abs().amax() for b in row.split(block[1], 1)]) for row in weight.double().split(block[0])]
    )


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A scale for every number of a weight of this shape."""
    return scales.kron(torch.ones(block, dtype=scales.dtype, device=scales.device))[: shape[0], : shape[1]]


def packed(
    weight: Tensor,
    block: tuple[int, int] | None = None,
    scale: str = "weight_scale",
    inputs: str = "",
    shape: tuple[int, ...] = (),
) -> tuple[dict[str, Tensor], Tensor]:
    """What a checkpoint has of a weight, and what it stands for. ``block``: outputs and inputs that share a scale;
    ``scale``: its name, ``shape``: its shape where it is one for all. ``inputs``: the name of a static scale."""
    size = block or (weight.shape[0], weight.shape[1])
    scales = (largest(weight, size) / 448).float()
    steps = spread(scales.double(), size, weight.shape)
    values = rounded(weight.double() / steps)
    held = {"weight": values.to(FLOAT8), scale: scales if block else scales.view(shape)}
    return held | ({inputs: torch.full(shape, 0.02)} if inputs else {}), values * steps


class Rounding(torch.nn.Module):
    """A linear layer of transformers with its inputs rounded, and its weight if ``weights``."""

    def __init__(self, linear: torch.nn.Linear, weights: bool) -> None:
        super().__init__()
        self.linear = linear
        weight = linear.weight.detach()
        held, scales = quantized(weight.float()) if weights else (weight.double(), 1.0)
        self.weight = held * scales

    def forward(self, x: Tensor) -> Tensor:
        held, scales = quantized(x.float())
        y = (held * scales @ self.weight.T).float()
        return y if self.linear.bias is None else y + self.linear.bias


def round_layers(model: Any, weights: bool, skip: str = "") -> None:
    """Of a model of transformers, but for its head and those whose names end as the regular expression says."""
    for name, module in list(model.named_modules()):
        if ".layers." in name and isinstance(module, torch.nn.Linear) and not (skip and re.search(f"{skip}$", name)):
            model.set_submodule(name, Rounding(module, weights))


def close(found: Tensor, exact: Tensor, terms: Tensor, factors: torch.dtype, result: torch.dtype) -> None:
    """``factors``: what the dequantized numbers are rounded to before they are multiplied; ``result``: what the sum is
    rounded to. Added up in float32, whose part depends on the order: taken as a unit for each of 2^6 steps."""
    unit = {dtype: torch.finfo(dtype).eps / 2 for dtype in (factors, result, found.dtype)}
    bound = terms * (2.1 * unit[factors] + 2**-18) + exact.abs() * (unit[result] + 2 * unit[found.dtype])
    smallest = torch.finfo(found.dtype).tiny
    off = (found.double() - exact).abs()
    assert (off <= bound + smallest).all(), (off / (bound + smallest)).max()
