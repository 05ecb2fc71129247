"""Turns a scheduler's plan into tensors, runs model and sampler, and gives back plain Python numbers.

The only part of the engine that touches tensors. Knows no queue and no request, only the sequences in the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightllm.checks import Wrong, culprit, describe
from lightllm.engine.masks import Held, Masks
from lightllm.engine.request import Logprobs, Ready
from lightllm.engine.scheduler import Plan, Result, Seq
from lightllm.interfaces import AttentionBackend, LogitsProcessor, Sampler
from lightllm.nn.batch import Batch

log = logging.getLogger("lightllm.engine")

LOGIT_ROWS = 256
"""Prompt log-probabilities are computed this many positions at a time: a whole vocabulary wide, they are large."""


class Runner:
    """The `lightllm.Worker` of this process. ``processors``: claimed request field -> the logits processor that claims
    it. ``names``: class of a plugin's part -> whom to blame for what it raises."""

    def __init__(
        self,
        ready: Ready,
        model: Any,
        attention: AttentionBackend,
        sampler: Sampler,
        processors: Mapping[str, LogitsProcessor],
        masks: Masks,
        device: torch.device,
        names: Mapping[type, str],
    ) -> None:
        self.ready = ready
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self.processors = processors
        self.masks = masks
        self.device = device
        self._names = names

    def run(self, plan: Plan) -> list[Result]:
        """One forward pass over the plan. One result per item, in the plan's order. Raises `Wrong`, with the plugin's
        name, for what a plugin raises; the plan can then be tried again."""
        try:
            return self._run(plan)
        except Exception as error:
            name = culprit(error, self._names)
            if name is None:
                raise
            raise Wrong(f"{name} failed: {describe(error)}") from error

    @torch.inference_mode()
    def _run(self, plan: Plan) -> list[Result]:
        results = [Result() for _ in plan.items]
        sampled = [i for i, item in enumerate(plan.items) if item.samples]
        rows = [plan.items[i].seq for i in sampled]
        held = [
            Held(row, seq, seq.matcher, results[i])
            for row, (i, seq) in enumerate(zip(sampled, rows, strict=True))
            if seq.matcher is not None
        ]
        masks = self.masks.start(held) if held else None

        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        batch = Batch(torch.empty(0), [], [], [], self.attention)
        for item in plan.items:
            end = item.start + item.count
            tokens += item.seq.tokens(item.start, end)
            positions += range(item.start, end)
            slots += item.seq.slots[item.start : end]
            batch.query_lengths.append(item.count)
            batch.context_lengths.append(end)
            batch.tables.append(self._tensor(item.seq.slots[:end]))
        batch.slots = self._tensor(slots)
        batch.plan = self.attention.plan(batch)
        hidden = self.model(self._tensor(tokens), self._tensor(positions), batch)

        last = torch.tensor(batch.query_lengths).cumsum(0) - 1
        for i, item in enumerate(plan.items):
            if item.prompt_logprobs:
                end = int(last[i]) + 1
                results[i].prompt_logprobs = self._prompt_logprobs(hidden[end - item.count : end], item.seq, item.start)
        if sampled:
            logits = self._logits(hidden[last[sampled].to(self.device)])
            logprobs = self._logprobs(logits, rows)
            self._process(logits, rows, [results[i] for i in sampled])
            if masks is not None:
                self.masks.apply(masks, logits, held)
            chosen = self.sampler.sample(logits, rows)
            for row, (i, token) in enumerate(zip(sampled, chosen.tolist(), strict=True)):
                results[i].token = token
                if row in logprobs:
                    values, wanted = logprobs[row]
                    results[i].logprobs = _entries(values, [token], wanted)[0]
            self.masks.follow(held)  # last: a matcher does not go back, and until here a step can be done again
        return results

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.logits(hidden).float()
        return logits

    def _logprobs(self, logits: Tensor, rows: Sequence[Seq]) -> dict[int, tuple[Tensor, int]]:
        """Row -> (its log-probabilities [1, vocabulary], how many of the likeliest to show), where asked for."""
        wanted = [(i, row.params.logprobs) for i, row in enumerate(rows) if row.params.logprobs is not None]
        return {i: (logits[i : i + 1].log_softmax(-1), top) for i, top in wanted}

    def _prompt_logprobs(self, hidden: Tensor, seq: Seq, start: int) -> list[Logprobs]:
        """Of the prompt tokens that follow positions ``start``, ``start + 1``, ... whose hidden states are given."""
        targets = seq.prompt[start + 1 : start + 1 + len(hidden)]
        entries: list[Logprobs] = []
        for i in range(0, len(targets), LOGIT_ROWS):
            part = targets[i : i + LOGIT_ROWS]
            values = self._logits(hidden[i : i + len(part)]).log_softmax(-1)
            entries += _entries(values, part, seq.params.prompt_logprobs or 0)
        return entries

    def _process(self, logits: Tensor, rows: Sequence[Seq], results: Sequence[Result]) -> None:
        """Let each logits processor change the rows that set one of its fields."""
        if not self.processors:
            return
        claims: dict[int, tuple[LogitsProcessor, list[int]]] = {}
        for i, row in enumerate(rows):
            for processor in {id(p): p for f, p in self.processors.items() if f in row.params.extra}.values():
                claims.setdefault(id(processor), (processor, []))[1].append(i)
        for processor, indices in claims.values():
            try:
                self._apply(processor, logits, rows, indices)
            except Exception:  # one row's fault is not to be another's
                for i in indices:
                    try:
                        self._apply(processor, logits, rows, [i])
                    except Exception as error:
                        log.exception("a logits processor failed")
                        results[i].error = f"{self._names[type(processor)]} failed: {describe(error)}"

    def _apply(self, processor: LogitsProcessor, logits: Tensor, rows: Sequence[Seq], indices: list[int]) -> None:
        part = logits[indices]
        processor.apply(part, [rows[i] for i in indices])
        logits[indices] = part


def _entries(values: Tensor, tokens: Sequence[int], top: int) -> list[Logprobs]:
    """values [rows, vocabulary] log-probabilities; one entry a row for its token and the ``top`` likeliest."""
    chosen = values.gather(1, torch.tensor(tokens, device=values.device).unsqueeze(1)).squeeze(1).tolist()
    if not top:
        return [Logprobs(token, value) for token, value in zip(tokens, chosen, strict=True)]
    best = values.topk(min(top, values.shape[-1]), -1)
    rows = zip(tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [Logprobs(t, value, list(zip(ids, tops, strict=True))) for t, value, ids, tops in rows]
