"""Operators against their formulas, written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightllm.testing.rules import broken, resolve, shown

TOLERANCES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
ROWS = (0, 1, 3, 17)
SIZES = (8, 20, 64, 576, 1000)
HEADS = ((4, 16, 16), (3, 64, 64), (2, 80, 32), (5, 96, 96), (1, 128, 128))
"""(heads, head_dim, rotated)"""


def check_operators(
    operators: Any, *, device: str = "cpu", dtype: str = "float32", tolerance: float | None = None
) -> None:
    """They compute what `lightllm.Operators` says, for any number of rows and any size, of tensors that are views of
    larger ones, too, and leave their arguments as they are.

    ``operators``: the class, or its record. ``tolerance``: absolute, for values of variance 1; by default the dtype's.
    """
    check = _Check(resolve(operators)(), device, getattr(torch, dtype), tolerance or TOLERANCES[dtype])
    for rows, size in product(ROWS, SIZES):
        check.norms(rows, size)
        check.gates(rows, size)
        check.gathers(rows, size)
    for rows, (heads, head_dim, rotated) in product(ROWS, HEADS):
        check.rotations(rows, heads, head_dim, rotated)


class _Check:
    def __init__(self, operators: Any, device: str, dtype: torch.dtype, tolerance: float) -> None:
        self.operators = operators
        self.device, self.dtype, self.tolerance = device, dtype, tolerance
        self.random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.random).to(dtype or self.dtype).to(self.device)

    def norms(self, rows: int, size: int) -> None:
        weights = [self.normal(size)]
        if self.dtype != torch.float32:
            weights.append(self.normal(size, dtype=torch.float32))
        for weight, residual in product(weights, (None, self.normal(rows, size))):
            x = self.normal(rows, 2, size)[:, 1]  # rows that do not lie one after the other
            total = x if residual is None else x + residual
            wide = total.double()
            expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
            what = f"rms_norm {'with' if residual is not None else 'without'} a residual, weight {weight.dtype}"
            found = self.call(what, self.operators.rms_norm, x, residual, weight, 1e-6)
            if not isinstance(found, tuple) or len(found) != 2:
                raise broken("rms_norm gives the norm and the sum", what, f"found: {shown(found)}")
            self.same(f"{what}: the norm", found[0], expected, x)
            self.same(f"{what}: the sum", found[1], total.double(), x)

    def gates(self, rows: int, size: int) -> None:
        gate_up = self.normal(rows, 2 * size)
        gate, up = gate_up.double().chunk(2, -1)
        for name, expected in (("silu_mul", F.silu(gate) * up), ("gelu_mul", F.gelu(gate, approximate="tanh") * up)):
            found = self.call(name, getattr(self.operators, name), gate_up)
            self.same(name, found, expected, gate_up)

    def gathers(self, rows: int, size: int) -> None:
        x = self.normal(5, 2, size)[:, 1]
        chosen = torch.randint(5, (rows,), generator=self.random).to(self.device)
        found = self.call("gather", self.operators.gather, x, chosen)
        self.same("gather", found, x[chosen].double(), x, tolerance=0.0)

    def rotations(self, rows: int, heads: int, head_dim: int, rotated: int) -> None:
        x = self.normal(rows, heads + 2, head_dim)[:, 1:-1]  # as queries are a view of a packed projection
        angles = self.normal(rows, 1, rotated // 2, dtype=torch.float32)
        cos = torch.cat((angles.cos(), angles.cos()), -1).to(self.dtype)
        sin = torch.cat((-angles.sin(), angles.sin()), -1).to(self.dtype)
        wide = x.double()
        turned = wide[..., :rotated] * cos.double() + wide[..., :rotated].roll(rotated // 2, -1) * sin.double()
        expected = torch.cat((turned, wide[..., rotated:]), -1)
        what = f"rotate, {rotated} of {head_dim} dimensions"
        self.same(what, self.call(what, self.operators.rotate, x, (cos, sin)), expected, x)

    def call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        def copies() -> list[Tensor]:
            flat = [t for a in arguments for t in (a if isinstance(a, tuple) else (a,))]
            return [t.clone() for t in flat if isinstance(t, Tensor)]

        before = copies()
        with torch.inference_mode():
            found = function(*arguments)
        if not all(map(torch.equal, before, copies())):
            raise broken("operators leave their arguments as they are", f"{what} has changed one")
        return found

    def same(self, what: str, found: Any, expected: Tensor, x: Tensor, tolerance: float | None = None) -> None:
        tolerance = self.tolerance if tolerance is None else tolerance
        where = f"{what}; x is {list(x.shape)} {x.dtype}"
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, x.dtype):
            got = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else shown(found)
            raise broken("operators answer in x's dtype", where, f"expected: {list(expected.shape)}", f"found: {got}")
        # relative where values are large, which products of normal ones now and then are
        off = ((found.double() - expected).abs() / expected.abs().clamp(min=1)).max().item() if found.numel() else 0.0
        if not off <= tolerance:
            raise broken(
                "operators compute what their contract says",
                where,
                f"off by {off:.3g}, tolerance {tolerance:.3g}",
                f"expected: {shown(expected.flatten()[:4].tolist())}, ...",
                f"found:    {shown(found.flatten()[:4].tolist())}, ...",
            )
