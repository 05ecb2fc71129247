"""No sequence of so many tokens comes twice in an answer."""

from __future__ import annotations

from collections.abc import Sequence

from lightllm import ModelInfo, SamplingRow
from torch import Tensor

from example_plugin import FIELD


class ExamplePluginProcessor:
    """`lightllm.LogitsProcessor`. It is given the rows of those requests only that have the field."""

    def __init__(self, info: ModelInfo) -> None:
        """``info`` is the model's config; nothing of it is needed here."""

    def apply(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        for one, row in zip(logits, rows, strict=True):
            banned = _would_repeat(row.output, row.params.extra[FIELD])
            one[banned] = float("-inf")


def _would_repeat(output: Sequence[int], size: int) -> list[int]:
    """The tokens that would make the last ``size`` tokens a sequence that was there before."""
    last = output[len(output) - size + 1 :]
    ends = range(size - 1, len(output))
    return [output[end] for end in ends if output[end - size + 1 : end] == last]
