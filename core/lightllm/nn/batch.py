"""One step's tensors, as models and attention backends see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
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
        self.k = [_zeros((slots + 1, s.kv_heads, s.head_dim), dtype, torch.device(device)) for s in layers]
        self.v = [_zeros((slots + 1, s.kv_heads, s.head_dim), dtype, torch.device(device)) for s in layers]

    @staticmethod
    def bytes_per_token(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
        return sum(2 * s.kv_heads * s.head_dim for s in layers) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
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
