"""Models: every log-probability is the reference's, however the work was batched, cached or interrupted."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightllm.assemble import build_engine, open_checkpoint
from lightllm.config import Config
from lightllm.engine.engine import Engine
from lightllm.engine.request import Generate, Logprobs, Output, SamplingParams
from lightllm.plugins import Plugins, Recipe
from lightllm.testing.rules import broken, shown

Reference = Callable[[list[int]], Any]

PROMPTS = (1, 2, 7, 15, 16, 17, 40, 90)
ANSWER = 30
"""Lengths in tokens that are drawn from, as far as the model reaches."""


def check_model(
    folder: str | Path,
    reference: Reference,
    *,
    plugins: Sequence[str | Path] = (),
    tolerance: float = 1e-3,
    world_size: int = 1,
    device: str = "cpu",
) -> None:
    """The model on disk, in float32, gives the reference's log-probabilities for every token of prompts and answers:
    alone, in batches of mixed lengths, with its prefill in chunks, after a prefix-cache hit and after a preemption.

    ``folder``: a checkpoint as any installed weight format reads it; small, with random weights that are not too small
    (a model that gives all tokens the same probability proves nothing). ``reference``: token ids -> log-probabilities
    or logits [tokens, vocabulary], row i being of what follows token i; a transformers model may be given as it is.
    ``plugins``: modules or .py files to load besides the installed ones.
    """
    if world_size != 1:
        raise NotImplementedError(f"world_size={world_size}: tensor parallelism is not there yet, only 1")
    check = _Check(Path(folder), reference, [str(p) for p in plugins], tolerance, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a small model several would only wait for each other
    try:
        check.alone()
        check.batched()
        check.chunked()
        check.joining()
        check.cached()
        check.preempted()
    finally:
        torch.set_num_threads(threads)


class _Check:
    def __init__(
        self, folder: Path, reference: Reference, plugins: Sequence[str], tolerance: float, device: str
    ) -> None:
        self.folder = folder
        self.plugins = Plugins.discover(Recipe(given=tuple(plugins)), quiet=True)
        self.tolerance = tolerance
        self.device = device
        _, _, info = open_checkpoint(self.plugins, folder)
        self.vocabulary: int = info.config["vocab_size"]
        self.reference = _of_transformers(reference) if isinstance(reference, torch.nn.Module) else reference

    # --- the circumstances

    def alone(self) -> None:
        with self.engine() as engine:
            for request in self.requests(4, engine, seed=1):
                self.check("alone", request, _run(engine, [request])[request.id])

    def batched(self) -> None:
        with self.engine(max_batch_tokens=4096) as engine:
            self.check_all("in a batch of mixed lengths", engine, self.requests(8, engine, seed=6))

    def chunked(self) -> None:
        with self.engine(max_batch_tokens=16) as engine:
            self.check_all("with its prefill in chunks of 16 tokens", engine, self.requests(6, engine, seed=3))

    def joining(self) -> None:
        with self.engine(max_batch_tokens=200) as engine:
            self.check_all("joining a batch that is being decoded", engine, self.requests(32, engine, seed=2))

    def cached(self) -> None:
        draw = random.Random(4)
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
        with self.engine() as engine:
            size = min(50, (engine.ready.max_model_len - 20) // 2)
            shared = [draw.randrange(self.vocabulary) for _ in range(size)]
            first = Generate(id="first", prompt=shared, params=params)
            answer = _run(engine, [first])["first"]
            self.check("before a prefix-cache hit", first, answer)
            at = size * 5 // 8
            other = [(token + 1) % self.vocabulary for token in shared[at : at + 3]]
            prompts = {"again": shared, "turn": shared + answer.tokens + other, "fork": shared[:at] + other}
            cached = {"again": size - 1, "turn": size + len(answer.tokens) - 1, "fork": at}
            requests = [Generate(id=id, prompt=prompt, params=params) for id, prompt in prompts.items()]
            outputs = _run(engine, requests)
        for request in requests:
            self.check("after a prefix-cache hit", request, outputs[request.id])
            assert outputs[request.id].cached_tokens >= cached[request.id], "the prefix cache was not used"

    def preempted(self) -> None:
        with self.engine() as roomy:
            requests = self.requests(12, roomy, seed=5)
        most = max(len(request.prompt) + ANSWER for request in requests)
        with self.engine(max_total_tokens=most + 40, max_batch_tokens=64) as engine:
            self.check_all("after a preemption", engine, requests)
            assert engine.scheduler.stats().preemptions > 0, "nothing was preempted"

    # --- what they share

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[Engine]:
        config = Config(dtype="float32", device=self.device, **{"max_total_tokens": 4096} | settings)  # type: ignore[arg-type]
        with closing(build_engine(config, self.plugins, self.folder)) as engine:
            yield engine

    def requests(self, count: int, engine: Engine, seed: int) -> list[Generate]:
        draw = random.Random(seed)
        lengths = [length for length in PROMPTS if length + ANSWER <= engine.ready.max_model_len]
        return [
            Generate(
                id=str(i),
                prompt=[draw.randrange(self.vocabulary) for _ in range(draw.choice(lengths))],
                params=SamplingParams(
                    max_tokens=draw.randint(1, ANSWER),
                    temperature=draw.choice([0.0, 0.8, 1.3]),
                    seed=i,
                    logprobs=3,
                    prompt_logprobs=2,
                    ignore_eos=True,
                ),
            )
            for i in range(count)
        ]

    def check_all(self, how: str, engine: Engine, requests: list[Generate]) -> None:
        outputs = _run(engine, requests)
        for request in requests:
            self.check(how, request, outputs[request.id])

    def check(self, how: str, request: Generate, output: Output) -> None:
        prompt, rule = request.prompt, f"a model's log-probabilities are the reference's: {how}"
        if output.error is not None:
            raise broken(rule, f"prompt of {len(prompt)} tokens", f"it failed: {output.error}")
        sequence = prompt + output.tokens
        expected = self.expected(sequence)
        for position, entry in _entries(request, output):
            row = expected[position - 1]
            best = row.topk(len(entry.top)).values.tolist()
            pairs = [
                (entry.logprob, row[entry.token].item()),
                *((value, row[token].item()) for token, value in entry.top),
            ]
            pairs += zip([value for _, value in entry.top], best, strict=True)
            wrong = max(abs(found - wanted) for found, wanted in pairs)
            if entry.token != sequence[position] or not wrong <= self.tolerance:
                what = "prompt" if position < len(prompt) else "answer"
                raise broken(
                    rule,
                    f"prompt of {len(prompt)} tokens, answer of {len(output.tokens)}: {shown(sequence, 200)}",
                    f"off by {wrong:.3g}, tolerance {self.tolerance:.3g}, at token {position}, in the {what}",
                    f"expected: {row[entry.token].item():.5f} for token {entry.token}; the likeliest {_round(best)}",
                    f"found:    {entry.logprob:.5f}; the likeliest {_round([value for _, value in entry.top])}",
                )

    def expected(self, tokens: list[int]) -> Tensor:
        """Log-probabilities [tokens, vocabulary] in float32."""
        answer = torch.as_tensor(self.reference(tokens)).detach().float().cpu()
        if answer.shape != (len(tokens), self.vocabulary):
            wanted = f"{len(tokens)} tokens of a vocabulary of {self.vocabulary}"
            raise ValueError(f"the reference gave {list(answer.shape)} for {wanted}: it must give [tokens, vocabulary]")
        return answer.log_softmax(-1)


def _entries(request: Generate, output: Output) -> Iterator[tuple[int, Logprobs]]:
    """(position in prompt and answer, what was said of the token there)."""
    assert len(output.tokens) == request.params.max_tokens == len(output.logprobs or ())
    if request.params.prompt_logprobs is not None:
        assert len(output.prompt_logprobs or ()) == len(request.prompt) - 1
        yield from enumerate(output.prompt_logprobs or (), 1)
    yield from enumerate(output.logprobs or (), len(request.prompt))


def _run(engine: Engine, requests: list[Generate]) -> dict[str, Output]:
    return {id: output for (id, _), output in engine.generate(*requests).items()}


def _round(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]


def _of_transformers(model: Any) -> Reference:
    """A causal language model of transformers as a reference. Dynamic RoPE is fed token by token, which is how
    transformers itself generates."""
    rope = getattr(model.config, "rope_parameters", None) or {}

    @torch.no_grad()
    def whole(tokens: list[int]) -> Tensor:
        logits: Tensor = model(torch.tensor([tokens], device=model.device)).logits[0]
        return logits

    @torch.no_grad()
    def one_by_one(tokens: list[int]) -> Tensor:
        rows, cache = [], None
        for token in tokens:
            with warnings.catch_warnings():  # newer transformers renames the argument
                warnings.simplefilter("ignore", FutureWarning)
                out = model(torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1])
        return torch.stack(rows)

    return one_by_one if rope.get("rope_type") == "dynamic" else whole
