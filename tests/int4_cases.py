"""Products with packed weights of any shape, against float64, within a bound that is derived.

x is multiplied by integers that every dtype holds. Sums, and what they are multiplied by, are float32, in which a sum
of n products is off by n units of their sizes at most. The result is rounded once; Triton's interpreter cuts float32
off to bfloat16 where a device rounds to the nearest: there it is a whole unit.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import strategies as st

from lightllm_builtin.int4.formats import Weights, packed

UNIT = 2.0**-24


def random_weights(outputs: int, groups: torch.Tensor, bits: int, device: str, seed: int) -> Weights:
    """``groups``: the group of each input."""
    random = torch.Generator().manual_seed(seed)
    count, inputs = int(groups.max()) + 1, len(groups)
    values = torch.randint(0, 2**bits, (inputs, outputs), generator=random).to(torch.uint8)
    zeros = torch.randint(0, 2**bits, (count, outputs), generator=random).to(torch.uint8)
    scales = (torch.rand(count, outputs, generator=random) + 0.5).half().float() / 2**bits
    made = packed(values, bits), scales, zeros, groups
    return Weights(bits, *(tensor.to(device) for tensor in made))


def exact(weights: Weights, outputs: int) -> torch.Tensor:
    """[outputs, inputs] float64, read bit by bit."""
    per = 32 // weights.bits
    inputs = torch.arange(len(weights.groups), device=weights.words.device)
    shifts = (inputs % per * weights.bits)[:, None]
    values = (weights.words[inputs // per].long() >> shifts) & (2**weights.bits - 1)
    steps = values.double() - weights.zeros[weights.groups].double()
    return (steps * weights.scales[weights.groups].double()).T


def products(product: Any, data: st.DataObject, device: str) -> None:
    """``product``: the class."""
    dtype = data.draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
    bits = data.draw(st.sampled_from((4, 4, 8)))
    rows = data.draw(st.sampled_from((0, 1, 2, 3)) | st.integers(0, 200))
    outputs = data.draw(st.integers(1, 150))
    inputs = data.draw(st.integers(1, 20)) * 8 * data.draw(st.sampled_from((1, 4)))
    group = data.draw(st.sampled_from((32, 64, 128, inputs, 48)))
    groups = torch.arange(inputs) // group
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = torch.Generator().manual_seed(seed)
    if data.draw(st.booleans()):  # act-order, of which a rank has a part
        groups = groups[torch.randperm(inputs, generator=random)]
    weights = random_weights(outputs, groups, bits, device, seed)
    gaps = data.draw(st.sampled_from((1, 2)))
    x = torch.randn(rows, inputs * gaps, generator=random).to(device, dtype)[:, ::gaps]
    bias = torch.randn(outputs, generator=random).to(device, dtype) if data.draw(st.booleans()) else None
    check(product(weights, dtype)(x, bias), x, exact(weights, outputs), bias)


def check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    wide = 0 if bias is None else bias.double()
    expected = x.double() @ weight.T + wide
    sizes = x.double().abs() @ weight.T.abs() + abs(wide)
    assert (found.dtype, found.shape) == (x.dtype, expected.shape)
    info = torch.finfo(x.dtype)
    cut_off = x.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    unit = info.eps if cut_off else info.eps / 2
    bound = expected.abs() * unit + (x.shape[1] + 8) * UNIT * 2 * sizes + info.smallest_normal
    assert not found.numel() or ((found.double() - expected).abs() <= bound).all()
