"""The kernel, called; penalties and bias are the standard sampler's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from lightllm import SamplingRow
from lightllm_builtin.sampling.sampler import GREEDY, add_bias, penalize, uniform
from lightllm_builtin.triton_sampling import kernels

BLOCK = 2048
"""Logits that a program holds at a time."""

BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1: a draw must not round up to 1."""


class TritonSampler:
    """`lightllm.Sampler`. The distribution is the standard sampler's, the draws are others: there tokens lie in the
    order of their probability, here of their ids."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        penalize(logits, rows)
        add_bias(logits, rows)
        greedy = [i for i, row in enumerate(rows) if row.params.temperature < GREEDY]
        if len(greedy) == len(rows):
            return logits.argmax(-1)
        size = logits.shape[-1]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        params = [row.params for row in rows]
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        kernels.draw[(len(rows),)](
            logits,
            logits.stride(0),
            column([1 / max(p.temperature, GREEDY) for p in params]),
            column([p.top_k or size for p in params], torch.int32),
            column([p.top_p for p in params]),
            column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]),
            column([min(uniform(r.seed, r.index, len(r.output)), BELOW_ONE) for r in rows]),
            tokens,
            SIZE=size,
            B=min(BLOCK, triton.next_power_of_2(size)),
        )
        if greedy:
            where = column(greedy, torch.int64)
            tokens[where] = logits[where].argmax(-1)
        return tokens
