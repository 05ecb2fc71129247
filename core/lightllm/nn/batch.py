"""One step's tensors, as models and attention backends see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightllm.nn.transfer import send

if TYPE_CHECKING:
    from lightllm.interfaces import AttentionBackend, AttentionSpec, SamplingRow


@dataclass(frozen=True)
class History:
    """Prompt and output of the sequences about to get a token, on the device: also of the last tokens, which the host
    may not know yet.

    ``table``: [sequences that run, positions] int32, of which ``rows`` [sequences about to get a token] int64 are
    theirs. What lies beyond a sequence's end is some token, or 0.
    """

    table: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], device: torch.device | str) -> History:
        """By itself, for tests and measurements; ``rows`` know all their tokens."""
        together = [[*row.prompt, *row.output] for row in rows]
        longest = max(map(len, together), default=0)
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in together]
        table = torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), longest)
        return cls(table, torch.arange(len(rows), device=device))

    def counts(self, which: torch.Tensor, starts: Sequence[int], ends: Sequence[int], vocabulary: int) -> torch.Tensor:
        """How often each token occurs: [which, vocabulary] float32. ``which``: [which] int64, numbers of the sequences
        about to get a token; ``starts`` and ``ends``: of each, the positions that count."""
        device = self.table.device
        tokens = self.table[:, : max(ends)].index_select(0, self.rows[which]).long()
        bounds = send([*starts, *ends], torch.int64, device).view(2, -1, 1)
        position = torch.arange(tokens.shape[1], device=device)
        counted = ((position >= bounds[0]) & (position < bounds[1])).float()
        return counted.new_zeros(len(tokens), vocabulary).scatter_add_(1, tokens, counted)


class KVPool:
    """Keys and values of every token in the cache: per layer two tensors [slots, kv_heads, head_dim].

    A slot holds one token. Which slots belong to which sequence is the scheduler's knowledge, not the pool's. The last
    slot is never handed out: it is where padding may be written and read.
    """

    def __init__(
        self, layers: Sequence[AttentionSpec], slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.slots = slots
        self.k = [zeros((slots + 1, s.kv_heads, s.head_dim), dtype, torch.device(device)) for s in layers]
        self.v = [zeros((slots + 1, s.kv_heads, s.head_dim), dtype, torch.device(device)) for s in layers]

    @staticmethod
    def bytes_per_token(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
        return sum(2 * s.kv_heads * s.head_dim for s in layers) * dtype.itemsize


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not empty: masked-out garbage could be NaN, and 0 * NaN is NaN.

    On a CPU from numpy, whose zeros are pages the system gives when they are first written; torch writes them all.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flat = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)


@dataclass
class Batch:
    """The sequences of one step, ragged and laid end to end.

    Sequence i brings ``query_lengths[i]`` new tokens; they are the last of its ``context_lengths[i]`` tokens, whose
    pool slots, in order of position, are ``table[rows[i], :context_lengths[i]]``.

    The tensors are on the pool's device. When a step is captured in a CUDA graph (`AttentionBackend.capturable`) they
    are what is written anew for every replay, and of the lists only the length counts.
    """

    slots: torch.Tensor
    """[tokens] int64: where each new token's key and value go."""
    table: torch.Tensor
    """[rows, positions] int32: the slots of every running sequence, in this step or not."""
    query_lengths: list[int]
    context_lengths: list[int]
    rows: list[int]
    device_context_lengths: torch.Tensor
    """[sequences] int64: ``context_lengths``."""
    device_rows: torch.Tensor
    """[sequences] int64: ``rows``."""
    attention: AttentionBackend
    plan: Any = field(default=None)

    @classmethod
    def of(cls, tables: Sequence[torch.Tensor], query_lengths: Sequence[int], attention: AttentionBackend) -> Batch:
        """A batch by itself, for tests and measurements; ``tables``: per sequence, its slots."""
        count, device = len(tables), tables[0].device
        lengths, rows = [len(table) for table in tables], list(range(count))[::-1]
        held = torch.zeros(count, max(lengths), dtype=torch.int32, device=device)
        for row, table in zip(rows, tables, strict=True):
            held[row, : len(table)] = table
        return cls(
            slots=torch.cat([t[len(t) - new :] for t, new in zip(tables, query_lengths, strict=True)]).long(),
            table=held,
            query_lengths=list(query_lengths),
            context_lengths=lengths,
            rows=rows,
            device_context_lengths=torch.tensor(lengths, device=device),
            device_rows=torch.tensor(rows, device=device),
            attention=attention,
        )

    @property
    def tables(self) -> list[torch.Tensor]:
        """Per sequence, [context_length] int32: its slots."""
        return [self.table[row, :length] for row, length in zip(self.rows, self.context_lengths, strict=True)]
