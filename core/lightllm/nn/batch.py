"""One step's tensors, as models and attention backends see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightllm.interfaces import AttentionBackend, AttentionSpec


class KVPool:
    """Keys and values of every token in the cache: per layer two tensors [slots, kv_heads, head_dim].

    A slot holds one token. Which slots belong to which sequence is the scheduler's knowledge, not the pool's. The last
    slot is never handed out: it is where padding may be written and read.
    """

    def __init__(
        self, layers: Sequence[AttentionSpec], slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.slots = slots
        # Zeros, not empty: masked-out garbage could be NaN, and 0 * NaN is NaN. calloc makes them free on the CPU.
        self.k = [torch.zeros(slots + 1, s.kv_heads, s.head_dim, dtype=dtype, device=device) for s in layers]
        self.v = [torch.zeros(slots + 1, s.kv_heads, s.head_dim, dtype=dtype, device=device) for s in layers]

    @staticmethod
    def bytes_per_token(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
        return sum(2 * s.kv_heads * s.head_dim for s in layers) * dtype.itemsize


@dataclass
class Batch:
    """The sequences of one step, ragged and laid end to end.

    Sequence i brings ``query_lengths[i]`` new tokens; they are the last of its ``context_lengths[i]`` tokens, whose
    pool slots, in order of position, are ``tables[i]``.
    """

    slots: torch.Tensor
    """[tokens] int64: where each new token's key and value go."""
    query_lengths: list[int]
    context_lengths: list[int]
    tables: list[torch.Tensor]
    """Per sequence, [context_length] int64 on the pool's device."""
    attention: AttentionBackend
    plan: Any = field(default=None)
