"""The tensors of each format, and what all of them become.

Words are int32 and hold 32 / bits values, the first in the lowest bits: along the inputs for GPTQ and
compressed-tensors, along the outputs for AWQ, and for zero points along the outputs in all three. Scales and zeros of
all groups are held by every rank, as with act-order any of them may be needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightllm import UserError
from lightllm.nn.layers import Inputs, Linear, Outputs, Parts
from lightllm_builtin.int4.settings import Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight outputs lies in its lowest four bits, in the next ones, and so on."""

SMALLEST_GROUP = 32
"""Inputs that the kernel multiplies at a time share a group; there are this many at least, and a multiple of it."""


@dataclass(frozen=True)
class Weights:
    """A weight ``(q - zero) * scale`` of a layer, or of its parts where these have their inputs in different groups.

    ``words`` [ceil(inputs / (32 / bits)), outputs]: q, packed along the inputs. ``scales`` float32, ``zeros`` uint8
    [groups, outputs]. ``groups`` [inputs]: the group of each input.
    """

    bits: int
    words: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    def dequantized(self) -> Tensor:
        """[outputs, inputs] float32."""
        values = unpacked(self.words, self.bits)[: len(self.groups)].float()
        return ((values - self.zeros[self.groups]) * self.scales[self.groups]).T

    def regular(self) -> tuple[Weights, int, Tensor | None]:
        """The same with every group's inputs side by side and equally many; how many; and which input stands where,
        None where they have kept their places.

        They are sorted by group. Where that is not enough, as with a rank's share of an act-order layer or groups of
        48, groups are filled up to multiples of `SMALLEST_GROUP` with values that are zero, and their scales repeated.
        """
        count = len(self.groups)
        used, sizes = torch.unique(self.groups, return_counts=True)
        order = torch.argsort(self.groups, stable=True)
        kept = bool((order == torch.arange(count, device=order.device)).all())
        scales, zeros = self.scales[used], self.zeros[used]
        size = int(sizes[0])
        alike = bool((sizes[:-1] == size).all()) and int(sizes[-1]) <= size
        if alike and (size % SMALLEST_GROUP == 0 or len(used) == 1):
            words = self.words if kept else packed(unpacked(self.words, self.bits)[order], self.bits)
            return replace(self, words=words, scales=scales, zeros=zeros), size, None if kept else order

        blocks = -(-sizes // SMALLEST_GROUP)
        begins = (blocks.cumsum(0) - blocks) * SMALLEST_GROUP  # where each group begins among the filled up ones
        within = torch.arange(count, device=order.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        places = begins.repeat_interleave(sizes) + within
        scales, zeros = scales.repeat_interleave(blocks, 0), zeros.repeat_interleave(blocks, 0)
        values = zeros.repeat_interleave(SMALLEST_GROUP, 0)
        values[places] = unpacked(self.words, self.bits)[order]
        filled = torch.zeros(len(values), dtype=order.dtype, device=order.device)
        filled[places] = order
        words = packed(values, self.bits)
        return replace(self, words=words, scales=scales, zeros=zeros), SMALLEST_GROUP, filled


class Format(Protocol):
    def hold(self, layer: Linear, scheme: Scheme) -> None: ...

    def read(self, layer: Linear, scheme: Scheme) -> list[Weights]:
        """Of the whole layer, or of its parts in their order."""


class GPTQ:
    def hold(self, layer: Linear, scheme: Scheme) -> None:
        per, groups = 32 // scheme.bits, scheme.groups(layer.full_inputs)
        layer.hold("qweight", Inputs(per), Outputs(), dtype=torch.int32)
        layer.hold("qzeros", groups, Outputs(per), dtype=torch.int32)
        layer.hold("scales", groups, Outputs(), dtype=torch.float32)
        layer.hold("g_idx", Parts(), Inputs(), dtype=torch.int64, optional=True)

    def read(self, layer: Linear, scheme: Scheme) -> list[Weights]:
        qweight, qzeros, scales, g_idx = _take(layer, "qweight", "qzeros", "scales", "g_idx")
        if g_idx is None and scheme.act_order:
            raise UserError(f"{', '.join(layer.names)}: desc_act is set, but there is no g_idx")
        if scheme.less_one:  # from the word as a whole, as GPTQModel does it: from a zero it borrows
            qzeros = qzeros + sum(1 << i for i in range(0, 32, scheme.bits))
        zeros = unpacked_outputs(qzeros, scheme.bits, layer.outs)
        return _weights(layer, scheme, qweight, scales, zeros, g_idx)


class AWQ:
    def hold(self, layer: Linear, scheme: Scheme) -> None:
        groups = scheme.groups(layer.full_inputs)
        layer.hold("qweight", Inputs(), Outputs(8), dtype=torch.int32)
        layer.hold("qzeros", groups, Outputs(8), dtype=torch.int32)
        layer.hold("scales", groups, Outputs(), dtype=torch.float32)

    def read(self, layer: Linear, scheme: Scheme) -> list[Weights]:
        qweight, qzeros, scales = _take(layer, "qweight", "qzeros", "scales")
        words = packed(unpacked_outputs(qweight, 4, layer.outs, AWQ_ORDER), 4)
        zeros = unpacked_outputs(qzeros, 4, layer.outs, AWQ_ORDER)
        return _weights(layer, scheme, words, scales, zeros, None)


class PackQuantized:
    """compressed-tensors'. Signed values, stored with half of their range added."""

    def hold(self, layer: Linear, scheme: Scheme) -> None:
        per, groups = 32 // scheme.bits, scheme.groups(layer.full_inputs)
        layer.hold("weight_packed", Outputs(), Inputs(per), dtype=torch.int32)
        layer.hold("weight_scale", Outputs(), groups, dtype=torch.float32)
        layer.hold("weight_shape", Parts(), 2, dtype=torch.int64)
        if scheme.zeros:
            layer.hold("weight_zero_point", Outputs(per), groups, dtype=torch.int32)
        if scheme.act_order:
            layer.hold("weight_g_idx", Parts(), Inputs(), dtype=torch.int64)

    def read(self, layer: Linear, scheme: Scheme) -> list[Weights]:
        names = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
        words, scales, zeros, g_idx, _ = _take(layer, *names)
        scales = scales.T.contiguous()
        if zeros is None:
            zeros = torch.full_like(scales, 1 << (scheme.bits - 1), dtype=torch.uint8)
        else:
            zeros = unpacked_outputs(zeros.T, scheme.bits, layer.outs)
        return _weights(layer, scheme, words.T.contiguous(), scales, zeros, g_idx)


FORMATS: Mapping[str, Format] = {"gptq": GPTQ(), "awq": AWQ(), "compressed-tensors": PackQuantized()}


def _take(layer: Linear, *names: str) -> list[Any]:
    """The loaded tensors, None for those there are not; the layer no longer holds them."""
    held = dict(layer.named_parameters(recurse=False))
    found = [held[name].data if name in held else None for name in names]
    for name in held.keys() & {*names}:
        layer.register_parameter(name, None)
    return found


def _weights(
    layer: Linear, scheme: Scheme, words: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None
) -> list[Weights]:
    """``g_idx`` [parts, inputs]: the group of each input, if they do not follow each other."""
    if g_idx is None:
        first = layer.shard.rank * layer.inputs if layer.split == "rows" else 0
        inputs = torch.arange(first, first + layer.inputs, device=words.device)
        g_idx = inputs[None] // (scheme.group or layer.full_inputs)
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= len(scales):
        raise UserError(f"{', '.join(layer.names)}: g_idx goes from {lowest} to {highest}, of {len(scales)} groups")
    if bool((g_idx == g_idx[0]).all()):
        return [Weights(scheme.bits, words, scales, zeros, g_idx[0])]
    parts = zip(*(t.split(layer.outs, 1) for t in (words, scales, zeros)), g_idx, strict=True)
    return [Weights(scheme.bits, *(t.contiguous() for t in part)) for part in parts]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """[words, n] int32 -> [words * 32 / bits, n] uint8."""
    per = 32 // bits
    values = torch.empty(len(words) * per, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(per):
        values[i::per] = words >> (bits * i) & ((1 << bits) - 1)
    return values


def packed(values: Tensor, bits: int) -> Tensor:
    """[m, n] uint8 -> [ceil(m / (32 / bits)), n] int32; the last word's missing values are 0."""
    per = 32 // bits
    words = torch.zeros(-(-len(values) // per), values.shape[1], dtype=torch.int32, device=values.device)
    for i in range(per):
        each = values[i::per]
        words[: len(each)] |= each.int() << (bits * i)
    return words


def unpacked_outputs(words: Tensor, bits: int, outs: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """[m, words] int32 -> [m, outputs] uint8. Each part begins with a word of its own. ``order``: which output of a
    word lies where."""
    per = 32 // bits
    values = unpacked(words.T, bits)
    if order is not None:
        places = torch.tensor(order, device=words.device).argsort()
        values = values.view(-1, per, values.shape[1])[:, places].flatten(0, 1)
    padded = [-(-out // per) * per for out in outs]
    return torch.cat([part[:out] for part, out in zip(values.split(padded), outs, strict=True)]).T.contiguous()
