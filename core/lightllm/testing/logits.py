"""Logits processors: each row for itself, in place."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightllm.engine.request import SamplingParams
from lightllm.interfaces import LogitsProcessorRecord, ModelInfo
from lightllm.testing.rows import Row
from lightllm.testing.rules import broken, resolve, shown

VOCABULARY = 64


def check_logits_processor(
    processor: Any,
    *,
    extra: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    info: ModelInfo | None = None,
    device: str = "cpu",
) -> None:
    """It changes the logits in place, each row by what that row is, and leaves it something to draw from.

    ``processor``: the class, or its record. ``extra``: the request fields it claims, with values; several of them make
    rows that differ. ``info``: the model's; one with a vocabulary of 64 unless given.
    """
    given = [extra] if isinstance(extra, Mapping) else list(extra)
    if isinstance(processor, LogitsProcessorRecord):
        for fields in given:
            if other := {*fields} - {*processor.fields}:
                raise broken("a record names the fields its processor reads", f"not among its fields: {sorted(other)}")
            if processor.validate is not None and (reason := processor.validate(fields)) is not None:
                raise broken("validate lets through what the processor can do", f"{fields}: {reason}")
    info = info or ModelInfo(path="", architecture="LlamaForCausalLM", config={"vocab_size": VOCABULARY})
    made = resolve(processor)(info)
    vocabulary: int = info.config["vocab_size"]
    draw = random.Random(0)

    def ids(most: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(0, most))]

    rows = [Row(SamplingParams(extra=dict(given[i % len(given)])), ids(9) or [1], ids(9), seed=i) for i in range(6)]
    before = torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(0)).to(device)
    alone = [_apply(made, before[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    for i, (row, logits) in enumerate(zip(rows, alone, strict=True)):
        where = f"row {i}: extra={row.params.extra}, prompt={row.prompt}, output={row.output}"
        if logits.isnan().any() or (logits == float("inf")).any():
            bad = (logits.isnan() | (logits == float("inf"))).nonzero().flatten().tolist()
            raise broken(
                "logits are finite, or -inf to rule a token out", where, f"NaN or inf: tokens {shown(bad, 100)}"
            )
        if not logits.isfinite().any():
            raise broken("a row keeps at least one token that can be drawn", where, "all logits are -inf")
    for trial in range(12):
        order = draw.sample(range(len(rows)), draw.randint(1, len(rows)))
        together = _apply(made, before[order], [rows[i] for i in order])
        for place, i in enumerate(order):
            if not torch.equal(together[place], alone[i]):
                changed = (together[place] != alone[i]).nonzero().flatten().tolist()
                raise broken(
                    "a row's logits depend on that row only: the same alone and in a batch, the first time and later",
                    f"row: extra={rows[i].params.extra}, prompt={rows[i].prompt}, output={rows[i].output}",
                    f"alone, and as row {place} of {len(order)} in call {len(rows) + trial}: they differ in the tokens "
                    f"{shown(changed, 100)}",
                )


def _apply(processor: Any, logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """What becomes of the logits; which lie amid others, as rows of a batch do."""
    whole = torch.zeros(len(rows) + 2, logits.shape[1], device=logits.device)
    part = whole[1:-1]
    part.copy_(logits)
    answer = processor.apply(part, rows)
    if answer is not None:
        raise broken("apply changes the logits in place and gives nothing back", f"it gave {shown(answer, 100)}")
    if whole[0].any() or whole[-1].any():
        raise broken("apply changes no rows but those it was given", "memory before or after them has changed")
    return part.clone()
