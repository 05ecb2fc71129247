"""Linear layers whose weights and inputs are float8, a scale for each output and each token.

Checkpoints with a scale for a tensor or an output are multiplied as they are; where a scale is of a block of outputs
and inputs, weights are rounded again for a scale of each output, which costs as much precision as rounding did before.
Inputs always have a scale of their token: the static ones that a checkpoint may bring are not used, as they clamp what
is larger than in its calibration and are coarse where a token is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm import ModelInfo, UserError
from lightllm.nn.layers import Dim, Inputs, Linear, Outputs, Parts
from lightllm_builtin.fp8 import rounding
from lightllm_builtin.fp8.settings import READERS, Scheme
from lightllm_builtin.linear.dense import Dense
from lightllm_builtin.quantization_config import quantization, read, scheme_of
from lightllm_builtin.triton_support import why_not

MULTIPLE = 16
"""What PyTorch's product of float8 matrices wants sizes to be of."""


class Fp8:
    """`lightllm.LinearMethod` and `lightllm.LinearSummary`. A plain checkpoint is rounded, but for its head. Layers
    whose sizes do not fit are plain."""

    dense: Dense | None = None
    """What holds a layer that is plain."""
    scheme: Scheme | None = None
    """How the checkpoint holds this layer, if in float8."""
    again: bool = False
    """Whether that is rounded again."""
    weight: Tensor
    """[out, in] float8"""
    scales: Tensor
    """[out, 1] float32"""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.schemes = read(info, READERS)[1] if quantization(info) else None

    def create(self, layer: Linear) -> None:
        if self.schemes:
            self.scheme = scheme_of(layer, self.info.path, self.schemes)
            plain = self.scheme is None
        else:
            plain = layer.head
        if plain or layer.inputs % MULTIPLE or layer.outputs % MULTIPLE:
            self.dense = Dense(self.info)
        if self.scheme:
            hold(layer, self.scheme)
        elif self.dense:
            self.dense.create(layer)
        else:
            # In the host's memory: a device need not have room for all the weights as the checkpoint has them.
            layer.hold("weight", Outputs(), Inputs(), device=torch.device("cpu"))

    def finish(self, layer: Linear) -> None:
        native = multiplies_float8(layer.device)
        fused = native and why_not(layer.device.type) is None
        self.quantize = rounding.quantize_fused if fused else rounding.quantize
        self.multiply = rounding.multiply if native else rounding.multiply_emulated
        if self.scheme:
            weight, scales = take(layer, self.scheme)
            if self.dense:
                layer.hold("weight", Outputs(), Inputs())
                layer.get_parameter("weight").copy_(weight.float().mul_(scales))
            elif scales.shape[1] == 1:
                self.weight, self.scales = weight, scales
            else:
                self.again = True
                self.weight, self.scales = self.quantize(weight.float().mul_(scales))
        elif not self.dense:
            self.weight, self.scales = self.quantize(layer.get_parameter("weight").data.to(layer.device))
            layer.register_parameter("weight", None)
        if self.dense:
            self.dense.finish(layer)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        if self.dense:
            return self.dense.apply(layer, x)
        y = self.multiply(*self.quantize(x.reshape(-1, layer.inputs)), self.weight, self.scales, x.dtype)
        if layer.bias is not None:
            y += layer.bias
        return y.view(*x.shape[:-1], layer.outputs)

    def summary(self, layer: Linear) -> str:
        if self.dense:
            if self.scheme:
                return f"plain (dequantized, sizes that are no multiples of {MULTIPLE})"
            if layer.head:
                return "plain (the head)"
            return "plain" if self.schemes else f"plain (sizes that are no multiples of {MULTIPLE})"
        again = " rounded again from blocks" if self.again else ""
        if multiplies_float8(layer.device):
            return f"float8{again}"
        return f"emulated float8{again} (slower than plain: this device cannot multiply float8)"


def hold(layer: Linear, scheme: Scheme) -> None:
    layer.hold("weight", Outputs(), Inputs(), dtype=rounding.FLOAT8)
    rows, columns = scheme.block
    dims: tuple[Dim, ...] = (Parts(),)
    if rows:
        dims = (Outputs(rows), Inputs(columns) if columns else 1)
    for name in scheme.scales:
        layer.hold(name, *dims, dtype=torch.float32, optional=len(scheme.scales) > 1)
    for name in scheme.input_scales:
        layer.hold(name, Parts(), dtype=torch.float32, optional=True)


def take(layer: Linear, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The loaded weight and its scales, [outputs, 1] or [outputs, inputs]; the layer no longer holds them. Raises
    UserError."""
    held = dict(layer.named_parameters(recurse=False))
    weight = held["weight"].data
    found = [held[name].data for name in scheme.scales if name in held]
    if len(found) != 1:
        both = "it has both" if found else "the checkpoint lacks"
        raise UserError(f"{', '.join(layer.names)}: {both} {' and '.join(scheme.scales)}")
    for name in {"weight", *scheme.scales, *scheme.input_scales} & held.keys():
        layer.register_parameter(name, None)
    (scales,) = found
    rows, columns = scheme.block
    if rows is None:
        return weight, torch.cat([scale.expand(out, 1) for scale, out in zip(scales, layer.outs, strict=True)])
    parts = zip(scales.split([-(-out // rows) for out in layer.outs]), layer.outs, strict=True)
    scales = torch.cat([part.repeat_interleave(rows, 0)[:out] for part, out in parts])
    if columns and scales.shape[1] > 1:
        scales = scales.repeat_interleave(columns, 1)[:, : layer.inputs]
    return weight, scales


def multiplies_float8(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)
