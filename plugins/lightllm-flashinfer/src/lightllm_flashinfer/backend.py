"""FlashInfer's attention over the pool's slots, as a paged cache whose pages hold one token.

FlashInfer plans on the host, by the lengths, which are there. Which pages a sequence has stays on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from msgspec.structs import replace
from torch import Tensor

from lightllm import AttentionJob, AttentionSpec
from lightllm.nn.batch import Batch, KVPool
from lightllm.nn.transfer import send

log = logging.getLogger("lightllm")

WORKSPACE_BYTES = 128 * 2**20
"""For partial results; what FlashInfer recommends. Its kernels share it: they run one after the other."""

PAGE_SIZE = 1


@dataclass(frozen=True)
class Part:
    """The decodes of a step, or its prefills. ``tokens``: their rows in q; None: all of them."""

    wrappers: Mapping[AttentionSpec, Any]
    tokens: Tensor | None


class FlashInferAttention:
    """`lightllm.AttentionBackend`.

    Layers that differ in heads, scale, window or cap need a plan each. FlashInfer keeps it in a wrapper, of which there
    is one for decodes and one for prefills, so a plan is good until the next one is made. It is made on the host, of
    the lengths of one step: a captured step could not be replayed with others, so this is not ``capturable``.
    """

    capturable: ClassVar[bool] = False

    def __init__(self, job: AttentionJob, pool: KVPool) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

        self.pool, self.dtype = pool, getattr(torch, job.dtype)
        device = pool.k[0].device
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.kinds = {layer.layer: replace(layer, layer=0) for layer in job.layers}
        kinds = dict.fromkeys(self.kinds.values())
        # Tensor cores, as the other kernel knows only some numbers of heads to a kv head (not the 7 of Qwen2.5 7B), and
        # fa2 by name, as other implementations want pages of more tokens. Prefills: fa3 on Hopper, else fa2.
        self.decodes = {
            kind: BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=True, backend="fa2") for kind in kinds
        }
        self.prefills = {kind: BatchPrefillWithPagedKVCacheWrapper(workspace) for kind in kinds}
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

        log.info("flashinfer: loading kernels; those that are not compiled yet take minutes")
        spare = torch.tensor([pool.slots, pool.slots], dtype=torch.int32, device=device)
        self.plan(Batch.of([spare[:1], spare], [1, 2], self))

    def plan(self, batch: Batch) -> list[Part]:
        if self.copied is not None:
            # FlashInfer writes a plan into pinned memory and has the device copy it when it comes to it: the last plan
            # must have been. That is how the last step begins, so the host gets a step ahead all the same.
            self.copied.synchronize()
        decodes = [i for i, new in enumerate(batch.query_lengths) if new == 1]
        prefills = [i for i, new in enumerate(batch.query_lengths) if new > 1]
        parts = []
        if decodes:
            parts.append(self._part(self.decodes, batch, decodes))
        if prefills:
            queries = _begins([batch.query_lengths[i] for i in prefills])
            parts.append(self._part(self.prefills, batch, prefills, queries, causal=True))
        if self.copied is not None:
            self.copied.record()
        return parts

    def _part(
        self, wrappers: Mapping[AttentionSpec, Any], batch: Batch, which: Sequence[int], *queries: Tensor, **mask: bool
    ) -> Part:
        """The sequences ``which``, planned."""
        pages = self._pages(batch, which)
        for kind, wrapper in wrappers.items():
            wrapper.plan(
                *queries, *pages, kind.heads, kind.kv_heads, kind.head_dim, PAGE_SIZE,
                window_left=-1 if kind.window is None else kind.window - 1,  # theirs is without the token itself
                logits_soft_cap=kind.softcap, sm_scale=kind.scale,
                q_data_type=self.dtype, kv_data_type=self.dtype, **mask,
            )  # fmt: skip
        return Part(wrappers, self._tokens(batch, which))

    @staticmethod
    def _pages(batch: Batch, which: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of these sequences: where in the second tensor their pages begin, the pages, how full each one's last is.
        The first and the third are on the host, where FlashInfer reads them."""
        begins = _begins([batch.context_lengths[i] for i in which])
        device, total = batch.slots.device, int(begins[-1])
        rows, lengths = batch.device_rows, batch.device_context_lengths
        if len(which) < len(batch.rows):
            chosen = send(which, torch.int64, device)
            rows, lengths = rows[chosen], lengths[chosen]
        sequence = torch.repeat_interleave(lengths, output_size=total)
        position = torch.arange(total, device=device) - (lengths.cumsum(0) - lengths)[sequence]
        return begins, batch.table[rows[sequence], position], torch.ones(len(which), dtype=torch.int32)

    @staticmethod
    def _tokens(batch: Batch, which: Sequence[int]) -> Tensor | None:
        if len(which) == len(batch.rows):
            return None
        starts = [0, *accumulate(batch.query_lengths)]
        return send([at for i in which for at in range(starts[i], starts[i + 1])], torch.int64, batch.slots.device)

    def attend(self, layer: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        pool_k, pool_v = self.pool.k[layer.layer], self.pool.v[layer.layer]
        pool_k.index_copy_(0, batch.slots, k)
        pool_v.index_copy_(0, batch.slots, v)
        cache = pool_k.unsqueeze(1), pool_v.unsqueeze(1)  # [pages, PAGE_SIZE, kv_heads, head_dim]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for part in batch.plan:
            wrapper = part.wrappers[self.kinds[layer.layer]]
            if part.tokens is None:
                wrapper.run(q, cache, out=out)
            else:
                out[part.tokens] = wrapper.run(q[part.tokens], cache)
        return out


def _begins(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
