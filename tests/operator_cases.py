"""Operators for any shape, dtype and stride, against PyTorch's operators in float64, within a bound that is derived.

Triton's compute in float32 and round once at the end: half a unit in the last place, and what float32 loses. Its
interpreter cuts float32 off to bfloat16 where a device rounds to the nearest: there it is a whole unit.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightllm.nn.operators import TorchOperators

SCALES = st.sampled_from((1e-3, 1.0, 20.0))
TORCH = TorchOperators()


@st.composite
def tensors(draw: st.DrawFn, dims: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Normal values; a view of a larger tensor, whose last dimension may have gaps."""
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    step = draw(st.sampled_from((1, 1, 1, 2)))
    around = torch.full((*dims[:-1], before + dims[-1] * step + after), 1e4, dtype=dtype, device=device)
    view = around[..., before : before + dims[-1] * step : step]
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    view.copy_(torch.randn(dims, generator=random) * draw(SCALES))
    return view


def close(found: Tensor, exact: Tensor, dtype: torch.dtype, terms: Tensor) -> None:
    """``terms``: the size of what was added up, of which float32 loses a part."""
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    info = torch.finfo(dtype)
    cut_off = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    unit = info.eps if cut_off else info.eps / 2
    off = (found.double() - exact).abs()
    assert (off <= exact.abs() * unit + 1e-5 * terms.abs() + info.smallest_normal * info.eps).all(), off.max()


def norms(operators: Any, data: st.DataObject, dtype: torch.dtype, device: str, longest: int) -> None:
    size = data.draw(st.integers(1, longest))
    dims = (*data.draw(st.sampled_from(((0,), (1,), (5,), (2, 3)))), size)
    x = data.draw(tensors(dims, dtype, device))
    residual = data.draw(st.none() | tensors(dims, dtype, device))
    weight = data.draw(tensors((size,), data.draw(st.sampled_from((dtype, torch.float32))), device)).contiguous()
    given = [t for t in (x, residual, weight) if t is not None]
    before = [t.clone() for t in given]
    normed, total = operators.rms_norm(x, residual, weight, 1e-6)
    exact = x.double() if residual is None else x.double() + residual.double()
    close(total, exact, dtype, exact)
    wide = total.double()  # the norm is of the sum that is given back
    exact, _ = TORCH.rms_norm(wide, None, weight.double(), 1e-6)
    close(normed, exact, dtype, exact)
    assert all(map(torch.equal, before, given))


def gates(operators: Any, data: st.DataObject, dtype: torch.dtype, device: str, longest: int) -> None:
    x = data.draw(tensors((data.draw(st.integers(0, 6)), 2 * data.draw(st.integers(1, longest))), dtype, device))
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    for name in ("silu_mul", "gelu_mul"):
        close(getattr(operators, name)(x), getattr(TORCH, name)(x.double()), dtype, gate * up)
    assert torch.equal(x, before)


def rotations(operators: Any, data: st.DataObject, dtype: torch.dtype, device: str, longest: int) -> None:
    """Of heads in the middle of a packed projection, with dimensions past those that are rotated."""
    half = data.draw(st.integers(1, longest // 2))
    kept = data.draw(st.integers(0, longest - 2 * half))
    tokens, heads, first = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    packed = data.draw(tensors((tokens, heads + 3, 2 * half + kept), dtype, device))
    before = packed.clone()
    x = packed[:, first : first + heads]
    angles = data.draw(tensors((tokens, 1, half), torch.float32, device))
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    found = operators.rotate(x, (cos, sin))
    wide = x.double()
    turned = wide[..., : 2 * half].abs()
    terms = torch.cat((turned + turned.roll(half, -1), wide[..., 2 * half :]), -1)
    close(found, TORCH.rotate(wide, (cos.double(), sin.double())), dtype, terms)
    assert torch.equal(found[..., 2 * half :], x[..., 2 * half :])
    assert torch.equal(packed, before)


def gathers(operators: Any, data: st.DataObject, dtype: torch.dtype, device: str, longest: int) -> None:
    tokens = data.draw(st.integers(1, 5))
    x = data.draw(tensors((tokens, data.draw(st.integers(1, longest))), dtype, device))
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), max_size=7))
    before = x.clone()
    found = operators.gather(x, torch.tensor(chosen, dtype=torch.int64, device=device))
    assert torch.equal(found, x[chosen])
    assert torch.equal(x, before)
