"""The kernel, called; penalties and bias are the standard sampler's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import triton
from torch import Tensor

from lightllm import SamplingRow
from lightllm.nn.batch import History
from lightllm.nn.transfer import send
from lightllm_builtin.sampling.sampler import GREEDY, add_bias, penalize, uniform
from lightllm_builtin.triton_sampling import kernels

BLOCK = 2048
"""Logits that a program holds at a time."""

WARPS = 16
"""Of a program. Compiled for sm_90 its threads then need 116 registers, with 4 warps 245 of 255. Neither was timed: on
a device, time `draw` over WARPS 4, 8, 16 and BLOCK 1024, 2048, 4096, for 1 and 256 rows of 128,256 logits."""


class TritonSampler:
    """`lightllm.Sampler`. A draw is the standard sampler's wherever tokens lie in the same order: here always that of
    their ids, there that of their probability for rows with top-k or top-p. Such rows have its distribution, but for
    tokens as likely as the last one kept, all of which are kept here."""

    overlaps: ClassVar[bool] = True

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], history: History) -> Tensor:
        penalize(logits, rows, history)
        add_bias(logits, rows)
        greedy = [i for i, row in enumerate(rows) if row.params.temperature < GREEDY]
        if len(greedy) == len(rows):
            return logits.argmax(-1)
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        size = logits.shape[-1]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return send(values, dtype, logits.device)

        params = [row.params for row in rows]
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        kernels.draw[(len(rows),)](
            logits,
            logits.stride(0),
            column([1 / max(p.temperature, GREEDY) for p in params]),
            column([p.top_k or size for p in params], torch.int32),
            column([p.top_p for p in params]),
            column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]),
            column([uniform(r.seed, r.index, r.generated) for r in rows], torch.float64),
            tokens,
            SIZE=size,
            B=min(BLOCK, triton.next_power_of_2(size)),
            num_warps=WARPS,
        )
        if greedy:
            where = column(greedy, torch.int64)
            tokens[where] = logits[where].argmax(-1)
        return tokens
