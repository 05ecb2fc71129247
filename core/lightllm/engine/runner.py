"""Runs model and sampler over a scheduler's plan, and gives back plain Python numbers.

Knows no queue and no request, only the sequences in the plan. A step waits for the device once, when its results are
read: all that goes there or comes from there before does so in the device's own time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightllm.checks import INTERRUPTS, Wrong, culprit, describe
from lightllm.engine.graphs import Capture, Graphs
from lightllm.engine.inputs import Inputs, Numbers, Rows
from lightllm.engine.masks import Held, Masks
from lightllm.engine.request import Generate, Logprobs, Ready, SamplingParams
from lightllm.engine.scheduler import Plan, Result, Seq
from lightllm.interfaces import AttentionBackend, LogitsProcessor, Operators, Sampler, WorkerLost
from lightllm.nn.batch import History
from lightllm.nn.transfer import Fetch, send

log = logging.getLogger("lightllm.engine")

LOGIT_ROWS = 256
"""Prompt log-probabilities are computed this many positions at a time: a whole vocabulary wide, they are large."""

LONG = 512
"""Tokens of a long prompt, for kernels."""


class Runner:
    """The `lightllm.Worker` of this process. ``processors``: claimed request field -> the logits processor that claims
    it. ``names``: class of a plugin's part -> whom to blame for what it raises."""

    def __init__(
        self,
        ready: Ready,
        model: Any,
        operators: Operators,
        attention: AttentionBackend,
        sampler: Sampler,
        processors: Mapping[str, LogitsProcessor],
        masks: Masks,
        rows: Rows,
        device: torch.device,
        names: Mapping[type, str],
    ) -> None:
        self.ready = ready
        self.model = model
        self.operators = operators
        self.attention = attention
        self.sampler = sampler
        self.processors = processors
        self.masks = masks
        self.rows = rows
        self.device = device
        self.graphs: Graphs | None = None
        self._names = names

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], capture: Capture, progress: Callable[[int, int], None]) -> None:
        """From now on replay steps of decodes alone."""

        def step(inputs: Inputs, flat: Tensor, logits: Tensor) -> None:
            logits.copy_(self.model.logits(self._hidden(inputs, Numbers(flat, inputs))))

        self.graphs = Graphs(step, sizes, self.ready.vocab_size, self.rows, self.device, capture, progress)

    @torch.inference_mode()
    def warm(self) -> None:
        """Compute steps that are nobody's, so that no request waits for kernels to be compiled: a short prompt's and a
        long one's, for which some take other tiles."""
        spare, slot = self.rows.spare, self.rows.spare_slot
        nobody = Seq(Generate(id="", prompt=[0], params=SamplingParams(top_k=1, top_p=0.5)), 0, 0, (), None)
        for size in (2, min(LONG, self.ready.max_model_len)):
            inputs = Inputs(
                tokens=[0] * size, positions=[*range(size)], slots=[slot] * size, owners=[spare] * size,
                rows=[spare], lengths=[size], ends=[size - 1], sampled_rows=[spare], counts=[size],
            )  # fmt: skip
            numbers = Numbers(inputs.send(self.device), inputs)
            logits = self._logits(self.operators.gather(self._hidden(inputs, numbers), numbers.ends))
            self.sampler.sample(logits, [nobody], History(self.rows.tokens, numbers.sampled))

    def start(self, plan: Plan) -> Callable[[], list[Result]]:
        """Begin one forward pass over the plan; what is given back waits for its results. Both raise `Wrong`, with the
        plugin's name, for what a plugin raises; the plan can then be tried again."""
        with self._blaming():
            step = self._start(plan)

        def results() -> list[Result]:
            with self._blaming():
                found = step.arrived()
                self.masks.follow(step.held)  # last: a matcher does not go back, and until here a step can be redone
                return found

        return results

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        try:
            yield
        except torch.AcceleratorError as error:  # memory that ran out is another error, after which one can go on
            raise WorkerLost(f"the device failed: {error}") from error
        except INTERRUPTS:
            raise
        except BaseException as error:
            name = culprit(error, self._names)
            if name is None:
                raise
            raise Wrong(f"{name} failed: {describe(error)}") from error

    @torch.inference_mode()
    def _start(self, plan: Plan) -> Underway:
        results = [Result() for _ in plan.items]
        sampled = [(result, item.seq) for result, item in zip(results, plan.items, strict=True) if item.samples]
        held = [Held(i, seq, seq.matcher, result) for i, (result, seq) in enumerate(sampled) if seq.matcher is not None]
        masks = self.masks.start(held) if held else None
        step = Underway(results, held, Fetch(self.device))
        inputs = Inputs.of(plan.items)
        self.rows.prepare(plan.items)
        logits: Tensor | None = None
        if self.graphs and inputs.decodes and (replayed := self.graphs.run(inputs)):
            logits, rows = replayed
        else:
            numbers = Numbers(inputs.send(self.device), inputs)
            rows = numbers.sampled
            hidden = self._hidden(inputs, numbers)
            self._prompt_logprobs(hidden, plan, step)
            if sampled:
                logits = self._logits(hidden if inputs.decodes else self.operators.gather(hidden, numbers.ends))
        if logits is not None:
            seqs = [seq for _, seq in sampled]
            logprobs = self._logprobs(logits, seqs)
            self._process(logits, seqs, [result for result, _ in sampled])
            if masks is not None:
                self.masks.apply(masks, logits, held)
            tokens = self.sampler.sample(logits, seqs, History(self.rows.tokens, rows))
            step.sampled = [result for result, _ in sampled], step.fetch.take(tokens)
            for i, (values, top) in logprobs.items():
                step.logprobs.append((sampled[i][0], Entries.of(values, tokens[i : i + 1], top, step.fetch)))
            self.rows.last[rows] = tokens  # last: a step that fails before is done again, and needs what was there
        return step

    def _hidden(self, inputs: Inputs, numbers: Numbers) -> Tensor:
        tokens, batch = self.rows.batch(inputs, numbers, self.attention)
        hidden: Tensor = self.model(tokens, numbers.positions, batch)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.logits(hidden).float()
        return logits

    def _logprobs(self, logits: Tensor, rows: Sequence[Seq]) -> dict[int, tuple[Tensor, int]]:
        """Row -> (its log-probabilities [1, vocabulary], how many of the likeliest to show), where asked for."""
        wanted = [(i, row.params.logprobs) for i, row in enumerate(rows) if row.params.logprobs is not None]
        return {i: (logits[i : i + 1].log_softmax(-1), top) for i, top in wanted}

    def _prompt_logprobs(self, hidden: Tensor, plan: Plan, step: Underway) -> None:
        """Of the prompt tokens that follow those computed, where they are due."""
        end = 0
        for item, result in zip(plan.items, step.results, strict=True):
            start, end = end, end + item.count
            targets = item.seq.prompt[item.start + 1 : item.start + 1 + item.count] if item.prompt_logprobs else []
            for i in range(0, len(targets), LOGIT_ROWS):
                part = targets[i : i + LOGIT_ROWS]
                values = self._logits(hidden[start + i : start + i + len(part)]).log_softmax(-1)
                tokens = send(part, torch.int64, self.device)
                entries = Entries.of(values, tokens, item.seq.params.prompt_logprobs or 0, step.fetch)
                step.prompt_logprobs.append((result, entries))

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
            except INTERRUPTS:
                raise
            except BaseException:  # one row's fault is not to be another's
                for i in indices:
                    try:
                        self._apply(processor, logits, rows, [i])
                    except INTERRUPTS:
                        raise
                    except BaseException as error:
                        log.exception("a logits processor failed")
                        results[i].error = f"{self._names[type(processor)]} failed: {describe(error)}"

    def _apply(self, processor: LogitsProcessor, logits: Tensor, rows: Sequence[Seq], indices: list[int]) -> None:
        part = logits[indices]
        processor.apply(part, [rows[i] for i in indices])
        logits[indices] = part


@dataclass
class Underway:
    """A step that has begun: its results, and what is on its way for them. ``sampled``: those that get a token, and the
    tokens."""

    results: list[Result]
    held: Sequence[Held]
    fetch: Fetch
    sampled: tuple[list[Result], Tensor] | None = None
    logprobs: list[tuple[Result, Entries]] = field(default_factory=list)
    prompt_logprobs: list[tuple[Result, Entries]] = field(default_factory=list)

    def arrived(self) -> list[Result]:
        self.fetch.wait()
        if self.sampled is not None:
            for result, token in zip(self.sampled[0], self.sampled[1].tolist(), strict=True):
                result.token = token
        for result, entries in self.logprobs:
            (result.logprobs,) = entries.read()
        for result, entries in self.prompt_logprobs:
            result.prompt_logprobs = [*(result.prompt_logprobs or ()), *entries.read()]
        return self.results


@dataclass(frozen=True)
class Entries:
    """Log-probabilities on their way to the host: of one token a row, and of its likeliest tokens if asked for."""

    tokens: Tensor
    chosen: Tensor
    best: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, values: Tensor, tokens: Tensor, top: int, fetch: Fetch) -> Entries:
        """values [rows, vocabulary] log-probabilities, tokens [rows]."""
        best = None
        if top:
            likeliest = values.topk(min(top, values.shape[-1]), -1)
            best = fetch.take(likeliest.indices), fetch.take(likeliest.values)
        return cls(fetch.take(tokens), fetch.take(values.gather(1, tokens.unsqueeze(1)).squeeze(1)), best)

    def read(self) -> list[Logprobs]:
        pairs = zip(self.tokens.tolist(), self.chosen.tolist(), strict=True)
        if self.best is None:
            return [Logprobs(token, value) for token, value in pairs]
        ids, values = self.best
        rows = zip(pairs, ids.tolist(), values.tolist(), strict=True)
        return [Logprobs(*pair, list(zip(top, tops, strict=True))) for pair, top, tops in rows]
