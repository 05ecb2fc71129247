"""Who runs in each step: continuous batching, chunked prefill, prefix sharing, preemption. Pure Python, no tensors.

A step is `schedule`, then the runner's work, then `update`. Running sequences are served oldest first; when the pool
runs dry the newest gives way and is recomputed later, so the oldest always goes on and every request ends.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightllm.engine.kvcache import KVCache, Lease
from lightllm.engine.request import Generate, Logprobs, Output, SamplingParams, Stats
from lightllm.interfaces import GrammarMatcher

HEADROOM = 8
"""Free slots per running sequence that an admission must leave: fewer, and it would soon be preempted again."""

AHEAD = 256
"""Slots kept clear behind a sequence, while there is room elsewhere, for it to grow into."""


class Seq:
    """One choice of a request: its tokens, and how many of them have their keys and values in the pool.

    Fulfils `lightllm.SamplingRow`.
    """

    def __init__(
        self, request: Generate, index: int, seed: int, stop_ids: tuple[int, ...], matcher: GrammarMatcher | None
    ) -> None:
        self.id = request.id
        self.index = index
        self.params: SamplingParams = request.params
        self.prompt = request.prompt
        self.output: list[int] = []
        self.seed = seed
        self.stop_ids = stop_ids
        self.matcher = matcher  # has come as far as output has; the runner moves it on
        self.row = -1  # of what is kept on the device for it, while it runs
        self.computed = 0
        self.planned = 0  # what will be computed when the steps under way are done
        self.generated = 0  # before the token that is sampled next; output may not have them all yet
        self.in_flight = 0  # tokens that were planned and are not known yet
        self.cached_tokens = 0
        self.lease: Lease | None = None
        self.done = False
        self.admitted = False  # ever
        self.followers: list[Seq] = []  # choices of the same request, waiting for this one to publish the prompt
        self.prompt_logprobs: list[Logprobs] | None = None
        self.wants_prompt = request.params.prompt_logprobs is not None and index == 0
        self.looks_back = matcher is not None or self.wants_prompt or bool(request.params.extra)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output) + self.in_flight

    @property
    def slots(self) -> list[int]:
        assert self.lease is not None
        return self.lease.slots

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens ``start:end`` of prompt and output laid end to end, as far as they are known."""
        size = len(self.prompt)
        if end <= size:
            return self.prompt[start:end]
        if start >= size:
            return self.output[start - size : end - size]
        return self.prompt[start:] + self.output[: end - size]


@dataclass(slots=True)  # not frozen: one is made for every token, and that would take twice as long
class Item:
    """Compute tokens ``start`` to ``start + count`` of ``seq``; ``samples``: that is its end, a token follows.

    ``prompt_logprobs``: those of the prompt tokens following these positions are due. ``lease``: the sequence's slots
    when this was planned, which it may lose before it is done.
    """

    seq: Seq
    start: int
    count: int
    samples: bool
    prompt_logprobs: bool
    lease: Lease


@dataclass(frozen=True)
class Plan:
    """One step's work, and what ended without any."""

    items: list[Item] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    @property
    def looks_back(self) -> bool:
        """Whether the next step needs to know the tokens that this one chooses."""
        return any(item.seq.looks_back for item in self.items)


@dataclass
class Result:
    """What the runner found for one item. ``forced``: tokens that the grammar lets follow ``token`` without a choice.

    ``ended``: the grammar allows nothing more; without a ``token``, not even one.
    Why the sequence cannot go on: ``refusal`` where that lies in the request, ``error`` where it lies here.
    """

    token: int | None = None
    forced: list[int] = field(default_factory=list)
    ended: bool = False
    refusal: str | None = None
    error: str | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: list[Logprobs] | None = None


class Scheduler:
    """`schedule`, run the plan, `update`: in turn, or with one more plan made before the one under way is done."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_batch_tokens: int,
        max_running: int,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.max_model_len = max_model_len
        self.eos_token_ids = tuple(eos_token_ids)
        self._waiting: deque[Seq] = deque()
        self._running: list[Seq] = []  # oldest first
        self._rows = list(range(max_running))[::-1]  # those that nobody has
        self._live: dict[str, list[Seq]] = {}
        self._count = 0
        self._preemptions = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    # --- requests come and go

    def add(self, request: Generate, matchers: Sequence[GrammarMatcher] = ()) -> list[Output]:
        """Queue a request. One that can never be served ends here, with an error.

        ``matchers``: of the request's grammar if it has one, for every choice its own.
        """
        size = len(request.prompt)
        problem = "" if size else "the prompt is empty"
        if size >= self.max_model_len:
            problem = f"the prompt has {size} tokens; with its answer it must fit {self.max_model_len}"
        elif size >= self.cache.slots:
            problem = f"the prompt has {size} tokens, more than the KV cache of {self.cache.slots} can serve"
        if problem:
            return [Output(request.id, i, [], finish="error", error=problem) for i in range(request.n)]
        params = request.params
        seed = random.getrandbits(64) if params.seed is None else params.seed
        stop_ids = params.stop_token_ids
        if matchers or not params.ignore_eos:  # after the end that a grammar has nothing can come
            stop_ids += self.eos_token_ids
        choices = [Seq(request, i, seed, stop_ids, matchers[i] if matchers else None) for i in range(request.n)]
        self._live[request.id] = choices
        self._count += len(choices)
        self._waiting.append(choices[0])
        if self.cache.prefix_cache:
            choices[0].followers = choices[1:]
        else:
            self._waiting.extend(choices[1:])
        return []

    def abort(self, id: str, index: int | None = None) -> list[int]:
        """Drop a request, or one choice of it, and free what it holds at once. Gives the choices that were dropped."""
        gone = [seq for seq in self._live.get(id, ()) if index is None or seq.index == index]
        for seq in reversed(gone):  # followers first, lest each in turn becomes the next leader
            self._end(seq)
        return [seq.index for seq in gone]

    @property
    def busy(self) -> bool:
        return self._count > 0

    # --- one step

    def schedule(self) -> Plan:
        """Decide the next step's work, and take slots for it. Of a sequence whose token is not known yet, as many steps
        may be planned as it surely has: those past its end, as it turns out to be, are done for nothing."""
        plan = Plan()
        counts = self._share_budget()
        at = 0
        while at < len(self._running):
            seq = self._running[at]
            count = counts.get(seq, 0)
            if count and not self._make_room(seq, seq.planned + count):
                if seq.lease is None:
                    continue  # it has left the list
                # alone, and the pool is full
                if seq.in_flight:
                    break
                plan.outputs.append(self._output(seq, [], "length"))
                continue
            at += 1
            if count:
                plan.items.append(self._item(seq, count))
        budget = self.max_batch_tokens - sum(item.count for item in plan.items)
        while budget > 0 and self._waiting and len(self._running) < self.max_running:
            seq = self._waiting[0]
            if seq.in_flight:  # preempted
                break
            if not self._admit(seq):
                if not self._running:  # it was preempted when it had the whole pool: no more of it fits
                    plan.outputs.append(self._output(seq, [], "length"))
                    continue
                break
            self._waiting.popleft()
            self._running.append(seq)
            item = self._item(seq, min(budget, len(seq) - seq.planned))
            plan.items.append(item)
            budget -= item.count
        return plan

    def update(self, plan: Plan, results: Sequence[Result]) -> list[Output]:
        """Take in what the runner found, one result per item of the plan; plans in the order they were made."""
        outputs = []
        for item, result in zip(plan.items, results, strict=True):
            seq, end = item.seq, item.start + item.count
            seq.in_flight -= item.samples
            if seq.done:
                continue  # aborted, or ended, while it ran
            if result.error is not None:
                outputs.append(self._output(seq, [], "error", error=result.error))
                continue
            if seq.lease is item.lease:  # else it was preempted
                seq.computed = end
            if item.prompt_logprobs:
                seq.prompt_logprobs = [*(seq.prompt_logprobs or ()), *(result.prompt_logprobs or ())]
            if item.start < len(seq.prompt) <= end:
                self._publish_prompt(item)
            if item.samples:
                outputs.append(self._accept(seq, result))
        return outputs

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=self._count - len(self._running),
            free_slots=self.cache.available,
            total_slots=self.cache.slots,
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
        )

    # --- inside a step

    def _share_budget(self) -> dict[Seq, int]:
        """Tokens for each running sequence: one for every decode, the rest to prefills, oldest first.

        The oldest always gets some: no more sequences run than a step has tokens, each having been admitted with one.
        """
        decodes: list[Seq] = []
        prefills: list[Seq] = []
        for seq in self._running:
            if seq.in_flight and self._room(seq) <= 0:
                continue  # what is under way ends it
            (prefills if len(seq) - seq.planned > 1 else decodes).append(seq)
        counts = dict.fromkeys(decodes, 1)
        budget = self.max_batch_tokens - len(counts)
        for seq in prefills:
            if not budget:
                break
            counts[seq] = min(budget, len(seq) - seq.planned)
            budget -= counts[seq]
        return counts

    def _item(self, seq: Seq, count: int) -> Item:
        assert seq.lease is not None
        start, end = seq.planned, seq.planned + count
        samples = end == len(seq)
        due = seq.wants_prompt and start < len(seq.prompt) - 1
        seq.planned = end
        if samples:
            seq.generated = end - len(seq.prompt)
            seq.in_flight += 1
        return Item(seq, start, count, samples, due, seq.lease)

    def _make_room(self, seq: Seq, length: int) -> bool:
        """Slots for the first ``length`` tokens, preempting newer sequences if need be. False: ``seq`` cannot go on; it
        has been preempted itself, or (its lease still there) it has the whole pool and that is not enough."""
        assert seq.lease is not None
        while not self.cache.extend(seq.lease, max(0, length - len(seq.lease.slots)), _ahead(seq)):
            newest = self._running[-1]
            if newest is seq and len(self._running) == 1:
                return False
            self._preempt(newest)
            if newest is seq:
                return False
        return True

    def _preempt(self, seq: Seq) -> None:
        """Take a sequence's slots away; it waits at the front. What it computed stays cached while there is room."""
        assert self._running.pop() is seq
        self._free(seq)
        seq.computed = seq.planned = 0
        if seq.wants_prompt:
            seq.prompt_logprobs = None
        self._waiting.appendleft(seq)
        self._preemptions += 1

    def _admit(self, seq: Seq) -> bool:
        """Give a waiting sequence what is cached of it and slots for the rest, if that leaves the others room."""
        # All of the prompt has to be computed where its log-probabilities are asked for, else all but the last token.
        lease = self.cache.acquire(seq.tokens(0, len(seq)), 0 if seq.wants_prompt else len(seq) - 1)
        need = len(seq) - lease.shared
        headroom = HEADROOM * len(self._running)
        if need + headroom > self.cache.available or not self.cache.extend(lease, need, _ahead(seq)):
            self.cache.release(lease)
            return False
        seq.lease, seq.row = lease, self._rows.pop()
        seq.computed = seq.planned = lease.shared
        if not seq.admitted:  # what it finds when it comes back after a preemption is its own
            seq.admitted = True
            seq.cached_tokens = lease.shared
            self._prompt_tokens += len(seq.prompt)
            self._cached_tokens += lease.shared
        return True

    def _publish_prompt(self, item: Item) -> None:
        seq = item.seq
        if seq.lease is item.lease:
            self.cache.commit(item.lease, seq.prompt)
        followers, seq.followers = seq.followers, []
        self._waiting.extendleft(reversed(followers))

    def _accept(self, seq: Seq, result: Result) -> Output:
        """A sampled token: append it, or end with it."""
        token = result.token
        if result.refusal is not None:
            return self._output(seq, [], "refused", error=result.refusal)
        if not seq.params.max_tokens:  # only the prompt's log-probabilities were wanted
            return self._output(seq, [], "length")
        if token is None:
            assert result.ended
            return self._output(seq, [], "stop")
        if token in seq.stop_ids and len(seq.output) >= seq.params.min_tokens:
            return self._output(seq, [], "stop", stop=token)
        room = self._room(seq) + seq.in_flight
        tokens = [token, *result.forced]
        whole = len(tokens) <= room
        seq.output += tokens[:room]
        self._generated_tokens += len(tokens[:room])
        finish = "stop" if result.ended and whole else "length" if len(tokens) >= room else None
        return self._output(seq, tokens[:room], finish, result.logprobs)

    def _room(self, seq: Seq) -> int:
        """How many more tokens can be planned for it."""
        return min(seq.params.max_tokens + len(seq.prompt), self.max_model_len) - len(seq)

    def _output(
        self,
        seq: Seq,
        tokens: list[int],
        finish: str | None = None,
        logprobs: Logprobs | None = None,
        stop: int | None = None,
        error: str | None = None,
    ) -> Output:
        """What the client is told; with ``finish``, the last of it."""
        prompt_logprobs = None
        if seq.wants_prompt:  # once, with the first token
            prompt_logprobs, seq.prompt_logprobs, seq.wants_prompt = seq.prompt_logprobs or [], None, False
        if finish:
            self._end(seq)
        entries = [logprobs] if logprobs else None
        return Output(seq.id, seq.index, tokens, finish, entries, prompt_logprobs, stop, error, seq.cached_tokens)

    def _end(self, seq: Seq) -> None:
        """Forget a sequence, wherever it is."""
        seq.done = True
        self._count -= 1
        choices = self._live[seq.id]
        choices.remove(seq)
        if not choices:
            del self._live[seq.id]
        # Where the prompt was not published yet, the next choice takes this one's place.
        heir = seq.followers.pop(0) if seq.followers else None
        if heir is not None:
            heir.followers, seq.followers = seq.followers, []
        leader = next((choice for choice in choices if seq in choice.followers), None)
        if seq.lease is not None:
            self._running.remove(seq)
            self._free(seq)
            if heir is not None:
                self._waiting.appendleft(heir)
        elif leader is not None:
            leader.followers.remove(seq)
        elif heir is not None:
            self._waiting[self._waiting.index(seq)] = heir
        else:
            self._waiting.remove(seq)

    def _free(self, seq: Seq) -> None:
        assert seq.lease is not None
        self.cache.release(seq.lease, seq.tokens(0, seq.computed))
        self._rows.append(seq.row)
        seq.lease, seq.row = None, -1


def _ahead(seq: Seq) -> int:
    return min(AHEAD, seq.params.max_tokens - len(seq.output))
