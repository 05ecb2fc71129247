"""PyTorch's operators by the kit; and the kit finds operators that are wrong."""

from __future__ import annotations

import pytest
from torch import Tensor

from lightllm.nn.operators import TorchOperators
from lightllm.testing import check_operators


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_they_compute_what_their_contract_says(dtype: str) -> None:
    check_operators(TorchOperators, dtype=dtype)


class AddsInPlace(TorchOperators):
    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return super().rms_norm(x if residual is None else x.add_(residual), None, weight, eps)


class ForgetsTheSum(TorchOperators):
    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return super().rms_norm(x, residual, weight, eps)[0], x


class GatesTheWrongHalf(TorchOperators):
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return super().silu_mul(gate_up.roll(gate_up.shape[-1] // 2, -1))


class TurnsTheOtherWay(TorchOperators):
    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        return super().rotate(x, (cos_sin[0], -cos_sin[1]))


class DropsTheRest(TorchOperators):
    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        return super().rotate(x[..., : cos_sin[0].shape[-1]], cos_sin)


class CountsFromTheEnd(TorchOperators):
    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        return super().gather(x.flip(0), rows)


class Widens(TorchOperators):
    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return super().gelu_mul(gate_up).double()


WRONG = {
    AddsInPlace: "leave their arguments",
    ForgetsTheSum: "the sum",
    GatesTheWrongHalf: "silu_mul",
    TurnsTheOtherWay: "rotate, 16 of 16",
    DropsTheRest: "rotate, 32 of 80",
    CountsFromTheEnd: "gather",
    Widens: "in x's dtype",
}


@pytest.mark.parametrize("operators", WRONG, ids=lambda kind: kind.__name__)
def test_the_kit_says_what_is_wrong(operators: type) -> None:
    with pytest.raises(AssertionError, match=WRONG[operators]):
        check_operators(operators)
