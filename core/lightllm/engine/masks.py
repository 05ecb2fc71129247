"""Holding sequences to their grammars: which tokens may come is worked out while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightllm.checks import INTERRUPTS, describe
from lightllm.engine.grammars import Grammars
from lightllm.engine.scheduler import Result, Seq
from lightllm.interfaces import GrammarMatcher
from lightllm.nn.transfer import send


@dataclass(frozen=True)
class Held:
    """A sequence with a grammar that gets a token in this step, and its row among the logits."""

    row: int
    seq: Seq
    matcher: GrammarMatcher
    result: Result


class Masks:
    """A step calls `start`, runs the model, calls `apply`, samples, and calls `follow` when the tokens are known."""

    def __init__(self, grammars: Grammars, vocab_size: int, device: torch.device) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
        # byte of a mask -> what to add to the logits of its 8 tokens
        self._bias = torch.where(bits == 1, 0.0, float("-inf")).to(device)

    def start(self, held: Sequence[Held]) -> Future[Tensor]:
        return self._thread.submit(self._fill, held)

    def _fill(self, held: Sequence[Held]) -> Tensor:
        masks = torch.empty(len(held), -(-self._vocab_size // 32), dtype=torch.int32)
        self._grammars.backend.fill([h.matcher for h in held], masks)
        return masks

    def apply(self, started: Future[Tensor], logits: Tensor, held: Sequence[Held]) -> None:
        """Rule out what the grammars do not allow; logits [rows, vocabulary] are changed in place."""
        try:
            masks = started.result()
        except INTERRUPTS:
            raise
        except BaseException as error:
            for h in held:
                h.result.error = f"{self._grammars.name} failed: {describe(error)}"
            return
        entries = masks.to(self._device).view(torch.uint8).int()
        bias = F.embedding(entries, self._bias).view(len(held), -1)[:, : logits.shape[1]]
        if len(held) == len(logits):
            logits += bias
        else:
            logits.index_add_(0, send([h.row for h in held], torch.int64, self._device), bias)
        for h in held:
            h.result.refusal = h.matcher.error() or None
            if len(h.seq.output) < h.seq.params.min_tokens:
                # too early for the tokens that end it; where nothing else is left it ends all the same
                stops = send(h.seq.stop_ids, torch.int64, self._device)
                others = logits[h.row].index_fill(0, stops, float("-inf"))
                h.result.ended = not bool((others > float("-inf")).any())

    def follow(self, held: Sequence[Held]) -> None:
        """Go on by the tokens that were chosen. Sequences that cannot are marked in their results."""
        for h in held:
            if h.result.error is None and h.result.refusal is None:
                try:
                    self._follow(h)
                except INTERRUPTS:
                    raise
                except BaseException as error:
                    h.result.error = f"{self._grammars.name} failed: {describe(error)}"

    def _follow(self, h: Held) -> None:
        result = h.result
        assert result.token is not None
        if result.ended:
            result.token = None
        elif h.matcher.accept(result.token):
            if h.seq.params.logprobs is None:  # these will have none
                result.forced = self._forced(h)
            result.refusal = h.matcher.error() or None
            result.ended = h.matcher.finished()
        else:
            result.refusal = h.matcher.error() or "no token is left that the grammar and the request both allow"

    def _forced(self, h: Held) -> list[int]:
        """Tokens that need no model to be chosen."""
        forced = []
        for token in h.matcher.forced():
            if token in h.seq.stop_ids or not h.matcher.accept(token):
                break
            forced.append(token)
        return forced
