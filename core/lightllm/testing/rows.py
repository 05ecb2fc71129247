"""Sequences as samplers and logits processors see them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightllm.engine.request import SamplingParams


@dataclass
class Row:
    """A `lightllm.SamplingRow`. ``unknown``: how many of the tokens generated are not in ``output`` yet."""

    params: SamplingParams
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    index: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    unknown: int = 0

    @property
    def generated(self) -> int:
        return len(self.output) + self.unknown
