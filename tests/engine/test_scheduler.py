"""Sequences are served in turn, share what they may, and never mix: on a simulated model that reads its slots."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm.engine.kvcache import KVCache
from lightllm.engine.request import Generate, Logprobs, Output, SamplingParams
from lightllm.engine.scheduler import Plan, Result, Scheduler, Seq

EOS = 0
VOCABULARY = 12


def following(state: int, token: int) -> int:
    """What one slot holds: a digest of all tokens up to its own."""
    return hash((state, token))


def predict(state: int, index: int) -> int:
    return hash((state, index, "next")) % VOCABULARY


def digest(tokens: Iterable[int]) -> int:
    state = 0
    for token in tokens:
        state = following(state, token)
    return state


def alone(request: Generate, index: int, most: int) -> tuple[list[int], str]:
    """A request's tokens and finish reason by the definition, without slots or scheduler; at most ``most`` tokens."""
    params = request.params
    output: list[int] = []
    stops = params.stop_token_ids + (() if params.ignore_eos else (EOS,))
    while True:
        token = predict(digest([*request.prompt, *output]), index)
        if token in stops and len(output) >= params.min_tokens:
            return output, "stop"
        output.append(token)
        if len(output) >= min(most, params.max_tokens):
            return output, "length"


class Simulation:
    """A scheduler with a model that knows only slots and rows. Every step checks every invariant there is.

    ``overlap``: a step's results are given back when the next one has begun. ``faults``: how often, of 1, a sequence's
    step fails and leaves its slots in disorder.
    """

    def __init__(
        self,
        slots: int = 1000,
        budget: int = 64,
        max_running: int = 16,
        max_model_len: int = 500,
        prefix_cache: bool = True,
        overlap: bool = False,
        faults: float = 0.0,
    ) -> None:
        self.overlap, self.faults, self.dice = overlap, faults, random.Random(0)
        self.flying: tuple[Plan, list[Result]] | None = None
        self.last: dict[int, int] = {}  # row -> the token it was given last
        self.failed: set[tuple[str, int]] = set()
        self.cache = KVCache(slots, prefix_cache)
        self.scheduler = Scheduler(
            self.cache,
            max_batch_tokens=budget,
            max_running=max_running,
            max_model_len=max_model_len,
            eos_token_ids=[EOS],
        )
        self.memory: list[tuple[int, int, int] | None] = [None] * slots  # slot -> token, position, digest
        self.requests: dict[str, Generate] = {}
        self.outputs: dict[tuple[str, int], list[Output]] = {}
        self.aborted: set[tuple[str, int]] = set()
        self.plans: list[Plan] = []
        self.finished: set[tuple[str, int]] = set()

    def add(self, prompt: list[int], id: str | None = None, n: int = 1, **params: Any) -> str:
        request = Generate(
            id=id or str(len(self.requests)), prompt=prompt, n=n, params=SamplingParams(**{"ignore_eos": True} | params)
        )
        self.requests[request.id] = request
        self._take(self.scheduler.add(request))
        return request.id

    def abort(self, id: str, index: int | None = None) -> None:
        gone = self.scheduler.abort(id, index)
        self.aborted |= {(id, i) for i in gone}
        self.check()

    def step(self, between: tuple[str, int | None] | None = None) -> Plan:
        """One step; ``between``: what to abort while the model runs."""
        oldest = self.scheduler._running[0] if self.scheduler._running else None
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        self._take(plan.outputs)
        work = plan.items or plan.outputs or self.flying
        assert work or not self.scheduler.busy, "a step that does nothing would be one forever"
        assert sum(item.count for item in plan.items) <= self.scheduler.max_batch_tokens
        assert len(self.scheduler._running) <= self.scheduler.max_running
        assert len({item.seq for item in plan.items}) == len(plan.items)
        rows = [seq.row for seq in self.scheduler._running]
        assert sorted(rows + self.scheduler._rows) == list(range(self.scheduler.max_running)), "each has its row"
        goes_on = oldest is None or oldest.done or oldest in [item.seq for item in plan.items]
        assert goes_on or oldest.in_flight, "the oldest goes on"  # type: ignore[union-attr]
        results = [self._compute(item.seq, item) for item in plan.items]
        if between:
            self.abort(*between)
        flying, self.flying = self.flying, (plan, results) if plan.items else None
        if flying:
            self._take(self.scheduler.update(*flying))
        if self.flying and (plan.looks_back or not self.overlap):
            flying, self.flying = self.flying, None
            self._take(self.scheduler.update(*flying))
        self.check()
        return plan

    def _compute(self, seq: Seq, item: Any) -> Result:
        end = item.start + item.count
        if (seq.id, seq.index) in self.failed or self.dice.random() < self.faults:
            self.failed.add((seq.id, seq.index))
            for slot in seq.slots[item.start : end]:
                self.memory[slot] = None
            return Result(error="a fault")
        tokens = seq.tokens(0, end)
        if len(tokens) < end:
            tokens.append(self.last[seq.row])
        self._verify(seq, item.start)
        for position in range(item.start, end):
            before = self.memory[seq.slots[position - 1]] if position else (0, -1, 0)
            assert before is not None
            entry = (tokens[position], position, following(before[2], tokens[position]))
            self.memory[seq.slots[position]] = entry
        self._verify(seq, end)
        assert item.samples == (end == len(seq) - item.samples)
        result = Result()
        states = [self.memory[slot] for slot in seq.slots[:end]]
        if item.samples:
            assert states[-1] is not None
            result.token = self.last[seq.row] = predict(states[-1][2], seq.index)
            assert seq.generated == end - len(seq.prompt)
            result.logprobs = Logprobs(result.token, float(states[-1][2]))
        if item.prompt_logprobs:
            targets = seq.prompt[item.start + 1 : end + 1]
            result.prompt_logprobs = [
                Logprobs(token, float(state[2]))
                for token, state in zip(targets, states[item.start :], strict=False)
                if state is not None
            ]
        return result

    def _verify(self, seq: Seq, end: int) -> None:
        """Every slot of the sequence holds what belongs there."""
        state = 0
        for position, token in enumerate(seq.tokens(0, end)):
            state = following(state, token)
            assert self.memory[seq.slots[position]] == (token, position, state), "another's token in our slot"

    def check(self) -> None:
        running = self.scheduler._running
        self.cache.check([seq.lease for seq in running if seq.lease is not None])
        assert all(seq.lease is None and not seq.done and not seq.computed for seq in self.scheduler._waiting)
        for seq in running:
            self._verify(seq, seq.computed)
        stats = self.scheduler.stats()
        following = [f for seq in [*running, *self.scheduler._waiting] for f in seq.followers]
        assert (stats.running, stats.waiting) == (len(running), len(self.scheduler._waiting) + len(following))
        assert self.scheduler.busy == bool(running or self.scheduler._waiting)

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            key = output.id, output.index
            assert key not in self.finished, "nothing follows the last"
            assert key not in self.aborted, "nothing follows an abort"
            self.outputs.setdefault(key, []).append(output)
            if output.finish:
                self.finished.add(key)

    def run(self, most: int = 20_000) -> None:
        for _ in range(most):
            if not (self.scheduler.busy or self.flying):
                break
            self.step()
        assert not self.scheduler.busy, "it never ends"
        assert self.cache.available == self.cache.slots, "everything is given back"
        assert not self.scheduler._live
        for request in self.requests.values():
            for index in range(request.n):
                if (request.id, index) in self.aborted:
                    continue
                if self.outputs[request.id, index][-1].finish == "error":
                    assert (request.id, index) in self.failed
                else:  # where it failed, too, in a step past its end
                    self.check_answer(request, index)

    def check_answer(self, request: Generate, index: int) -> None:
        """It is what the request gets alone, whatever happened around it."""
        outputs = self.outputs[request.id, index]
        most = min(self.scheduler.max_model_len - len(request.prompt), self.cache.slots - len(request.prompt) + 1)
        expected, finish = alone(request, index, most)
        assert ([t for o in outputs for t in o.tokens], outputs[-1].finish) == (expected, finish)
        assert [o.finish for o in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert all((o.stop_token is not None) == (o.finish == "stop") for o in outputs)
        logprobs = [entry for o in outputs for entry in o.logprobs or ()]
        sequence = [*request.prompt, *expected]
        start = len(request.prompt)
        assert [e.token for e in logprobs[: len(expected)]] == expected
        for at, entry in enumerate(logprobs):
            assert entry.logprob == float(digest(sequence[: start + at]))
        given = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
        if request.params.prompt_logprobs is None or index:
            assert not given
        else:
            assert given == [[Logprobs(request.prompt[i], float(digest(request.prompt[:i]))) for i in range(1, start)]]

    def answer(self, id: str, index: int = 0) -> list[int]:
        return [token for output in self.outputs[id, index] for token in output.tokens]


def make_prompt(draw: random.Random, length: int) -> list[int]:
    """Often beginning like others."""
    shared = draw.choice([0, 0, length // 2, length - 1, length])
    return [i % VOCABULARY for i in range(shared)] + [draw.randrange(VOCABULARY) for _ in range(length - shared)]


# --- everything at once


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32))
def test_under_any_load_every_answer_is_the_one_given_alone(seed: int) -> None:
    draw = random.Random(seed)
    slots = draw.choice([40, 60, 100, 300])
    sim = Simulation(
        slots=slots,
        budget=draw.choice([1, 2, 3, 8, 16, 64, 500]),
        max_running=draw.choice([1, 2, 4, 16]),
        max_model_len=draw.choice([slots // 2, slots, 2 * slots]),
        prefix_cache=draw.random() < 0.8,
        overlap=draw.random() < 0.5,
        faults=draw.choice([0, 0, 0.02]),
    )
    longest = min(slots, sim.scheduler.max_model_len) - 1
    for _ in range(draw.randint(1, 80)):
        action = draw.random()
        if action < 0.35:
            sim.add(
                make_prompt(draw, draw.randint(1, draw.choice([4, longest // 2, longest]))),
                n=draw.choice([1, 1, 1, 2, 4]),
                max_tokens=draw.randint(1, 40),
                min_tokens=draw.choice([0, 0, 5]),
                ignore_eos=draw.random() < 0.5,
                stop_token_ids=draw.choice([(), (), (5,), (3, 7)]),
                logprobs=0,
                prompt_logprobs=draw.choice([None, None, 0]),
            )
        elif action < 0.45 and sim.requests:
            sim.abort(draw.choice(list(sim.requests)), draw.choice([None, 0, 1, 2]))
        else:
            aborts = sim.requests and draw.random() < 0.1
            sim.step(between=(draw.choice(list(sim.requests)), draw.choice([None, 0, 1])) if aborts else None)
    sim.run()


@pytest.mark.parametrize("overlap", [False, True])
def test_10000_steps_of_traffic_in_a_pool_too_small(overlap: bool) -> None:
    draw = random.Random(7)
    sim = Simulation(slots=200, budget=24, max_running=12, max_model_len=200, overlap=overlap)
    for _ in range(4000):
        if sim.scheduler.stats().waiting < 6:
            sim.add(make_prompt(draw, draw.randint(1, 60)), n=draw.choice([1, 1, 3]), max_tokens=draw.randint(1, 60))
        if draw.random() < 0.02:
            sim.abort(draw.choice(list(sim.requests)[-20:]))
        sim.step()
    sim.run()
    assert sim.scheduler.stats().preemptions > 100


# --- one behaviour at a time


def test_a_prompt_is_computed_in_chunks_while_others_go_on_decoding() -> None:
    sim = Simulation(budget=16)
    first = sim.add([1] * 5, max_tokens=20)
    sim.step()
    second = sim.add(list(range(11)) * 4, max_tokens=3)
    chunks = []
    for _ in range(3):
        plan = sim.step()
        assert [item.seq.id for item in plan.items] == [first, second]
        assert plan.items[0].count == 1
        chunks.append(plan.items[1].count)
    assert chunks == [15, 15, 14]
    sim.run()


def test_decodes_and_prefills_do_not_hold_each_other_up() -> None:
    sim = Simulation(budget=4)
    for i in range(3):
        sim.add([i], max_tokens=400)
    last = sim.add([9] * 20, max_tokens=1)
    sim.add([8], max_tokens=1)
    for _ in range(20):
        assert len(sim.step().items) == 4
    assert len(sim.answer(last)) == 1
    assert [len(sim.answer(str(i))) for i in range(3)] == [20, 20, 20]


def test_none_is_admitted_that_would_soon_have_to_give_way() -> None:
    sim = Simulation(slots=64)
    sim.add([1] * 39, max_tokens=10)
    sim.add([2] * 24, max_tokens=10)
    assert len(sim.step().items) == 1
    sim.run()
    assert sim.scheduler.stats().preemptions == 0


def test_requests_start_in_the_order_they_came() -> None:
    draw = random.Random(1)
    sim = Simulation(slots=100, budget=10, max_running=3)
    for _ in range(30):
        sim.add(make_prompt(draw, draw.randint(1, 60)), max_tokens=8)
    sim.run()
    started: list[str] = []
    for plan in sim.plans:
        started += [item.seq.id for item in plan.items if item.seq.id not in started]
    assert started == [str(i) for i in range(30)]


def test_choices_share_their_prompt() -> None:
    sim = Simulation()
    id = sim.add([*range(10), *range(10)], n=4, max_tokens=5)
    assert [(i.seq.index, i.count) for i in sim.step().items] == [(0, 20)]
    assert [(i.seq.index, i.count) for i in sim.step().items] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    held = {slot for seq in sim.scheduler._running for slot in seq.slots[:20]}
    assert len(held) == 20, "every token of the prompt is held once"
    sim.run()
    assert [sim.outputs[id, i][0].cached_tokens for i in range(4)] == [0, 19, 19, 19]
    assert len({tuple(sim.answer(id, i)) for i in range(4)}) == 4


def test_choices_go_before_requests_that_came_later() -> None:
    sim = Simulation(max_running=1)
    sim.add([1, 2], n=2, max_tokens=3)
    sim.add([3], max_tokens=3)
    sim.run()
    assert list(sim.outputs) == [("0", 0), ("0", 1), ("1", 0)]


def test_the_next_choice_leads_when_the_first_is_aborted_before_the_prompt_is_done() -> None:
    sim = Simulation(budget=8)
    id = sim.add([*range(10), *range(10)], n=3, max_tokens=5)
    sim.step()
    sim.abort(id, 0)
    assert [(i.seq.index, i.start) for i in sim.step().items] == [(1, 8)], "what was computed is not lost"
    sim.run()


def test_a_waiting_choice_that_is_aborted_leaves_its_turn_to_the_next() -> None:
    sim = Simulation(max_running=1)
    sim.add([1], max_tokens=5)
    sim.add([2], max_tokens=5)
    sim.add([3, 3], n=2, max_tokens=5)
    sim.add([4], max_tokens=5)
    sim.step()
    sim.abort("2", 0)
    sim.run()
    assert list(sim.outputs) == [("0", 0), ("1", 0), ("2", 1), ("3", 0)]


def test_the_newest_gives_way_and_comes_back_before_those_who_wait() -> None:
    sim = Simulation(slots=64, max_running=2)
    old = sim.add([1] * 20, max_tokens=40)
    new = sim.add([2] * 20, max_tokens=20)
    sim.add([3] * 20, max_tokens=20)
    while not sim.scheduler.stats().preemptions:
        sim.step()
    assert [seq.id for seq in sim.scheduler._running] == [old]
    assert [seq.id for seq in sim.scheduler._waiting] == [new, "2"]
    sim.run()
    finished = [id for id, _ in sim.outputs]
    assert finished == [old, new, "2"]


def test_what_a_preempted_sequence_finds_of_its_own_is_not_reported_as_cached() -> None:
    sim = Simulation(slots=400, max_running=8)
    for i in range(8):
        sim.add([i] * 30, max_tokens=60)
    sim.run()
    stats = sim.scheduler.stats()
    assert stats.preemptions > 0
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (8 * 30, 0, 8 * 60)
    assert {output.cached_tokens for outputs in sim.outputs.values() for output in outputs} == {0}


def test_a_prefill_that_is_preempted_is_counted_once() -> None:
    sim = Simulation(slots=60, budget=2)
    sim.add([1] * 10, max_tokens=30)
    new = sim.add([2] * 40, max_tokens=2)
    while not sim.scheduler.stats().preemptions:
        sim.step()
    assert (new, 0) not in sim.outputs
    sim.run()
    stats = sim.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (50, 0)
    assert any(item.seq.id == new and item.start for item in sim.plans[-3].items), "its own beginning was found"


def test_a_second_request_computes_only_what_is_new() -> None:
    sim = Simulation()
    sim.add([1, 2, 3, 4, 5], max_tokens=3)
    sim.run()
    answer = sim.answer("0")
    sim.add([1, 2, 3, 4, 5, *answer, 7, 8], max_tokens=3)
    (item,) = sim.step().items
    assert (item.start, item.count) == (7, 3), "the last token of the answer was never computed"
    sim.run()
    assert sim.outputs["1", 0][0].cached_tokens == 7


def test_prompt_logprobs_compute_the_whole_prompt_even_where_it_is_cached() -> None:
    sim = Simulation(budget=8)
    sim.add([1] * 20, max_tokens=3)
    sim.run()
    sim.add([1] * 20, max_tokens=3, prompt_logprobs=0)
    items = [sim.step().items[0] for _ in range(4)]
    assert [(i.start, i.count, i.prompt_logprobs) for i in items] == [
        (0, 8, True),
        (8, 8, True),
        (16, 4, True),
        (20, 1, False),
    ]
    sim.run()


def test_prompt_logprobs_once_given_are_not_computed_again_after_a_preemption() -> None:
    sim = Simulation(slots=60, max_running=2)
    sim.add([1] * 20, max_tokens=16)
    id = sim.add([2] * 20, max_tokens=20, prompt_logprobs=0)
    sim.run()
    assert sim.scheduler.stats().preemptions == 1
    items = [item for plan in sim.plans for item in plan.items if item.seq.id == id]
    assert [item.prompt_logprobs for item in items] == [True] + [False] * (len(items) - 1)
    assert all(item.start for item in items[1:]), "what is still cached of it is used"


@pytest.mark.parametrize(
    ("size", "slots", "text"),
    [(0, 100, "empty"), (50, 100, "must fit 50"), (30, 30, "KV cache of 30"), (49, 40, "KV cache of 40")],
)
def test_a_request_that_can_never_fit_is_told_so(size: int, slots: int, text: str) -> None:
    sim = Simulation(slots=slots, max_model_len=50)
    id = sim.add([1] * size, n=2)
    for index in range(2):
        (output,) = sim.outputs[id, index]
        assert output.finish == "error" and output.error is not None and text in output.error
    assert not sim.scheduler.busy


def test_an_answer_longer_than_the_pool_ends_with_length() -> None:
    sim = Simulation(slots=30)
    sim.add([1] * 29, max_tokens=100)
    sim.add([2] * 10, max_tokens=100)
    sim.run()
    assert [len(sim.answer(id)) for id in "01"] == [2, 21]


def test_max_model_len_counts_prompt_and_answer() -> None:
    sim = Simulation(max_model_len=20)
    sim.add([1] * 15, max_tokens=100)
    sim.run()
    assert len(sim.answer("0")) == 5


def test_no_token_at_all_is_given_when_none_is_wanted() -> None:
    sim = Simulation()
    id = sim.add([1, 2, 3], max_tokens=0, prompt_logprobs=0)
    while sim.scheduler.busy:
        sim.step()
    (output,) = sim.outputs[id, 0]
    assert (output.tokens, output.finish) == ([], "length")
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 2


def feed(scheduler: Scheduler, *tokens: int) -> list[Output]:
    outputs = []
    for token in tokens:
        plan = scheduler.schedule()
        outputs += scheduler.update(plan, [Result(token) for _ in plan.items])
    return outputs


@pytest.mark.parametrize(
    ("params", "tokens", "finish", "stop"),
    [
        ({}, [4, EOS], "stop", EOS),
        ({"ignore_eos": True}, [4, EOS, 4], None, None),
        ({"min_tokens": 2}, [EOS, 4, EOS], "stop", EOS),
        ({"stop_token_ids": (9,)}, [4, 9], "stop", 9),
        ({"stop_token_ids": (9,)}, [4, EOS], "stop", EOS),
        ({"stop_token_ids": (9,), "ignore_eos": True}, [EOS, 9], "stop", 9),
        ({"max_tokens": 2}, [4, 4], "length", None),
        ({"max_tokens": 1}, [EOS], "stop", EOS),
    ],
)
def test_an_answer_ends_where_it_should(
    params: dict[str, Any], tokens: list[int], finish: str | None, stop: int | None
) -> None:
    scheduler = Simulation().scheduler
    scheduler.add(Generate(id="a", prompt=[1, 2], params=SamplingParams(**params)))
    outputs = feed(scheduler, *tokens)
    assert (outputs[-1].finish, outputs[-1].stop_token) == (finish, stop)
    given = [token for output in outputs for token in output.tokens]
    assert given == (tokens if stop is None else tokens[:-1])
    assert scheduler.busy == (finish is None)


def test_a_seed_is_kept_and_choices_without_one_share_a_drawn_one() -> None:
    sim = Simulation()
    sim.add([1], seed=5)
    sim.add([1], n=2)
    seeds = [[seq.seed for seq in sim.scheduler._live[id]] for id in "01"]
    assert seeds[0] == [5]
    assert len(set(seeds[1])) == 1


@pytest.mark.parametrize("index", [None, 0, 1])
@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("between", [False, True])
def test_an_abort_frees_at_once_at_every_stage(index: int | None, steps: int, between: bool) -> None:
    sim = Simulation(budget=8)
    id = sim.add([1] * 20, n=3, max_tokens=4)  # three chunks, then all three decode
    for _ in range(steps):
        sim.step()
    if between:
        sim.step(between=(id, index))
    else:
        sim.abort(id, index)
    if index is None:
        assert not sim.scheduler.busy
        assert sim.cache.available == sim.cache.slots
    sim.run()


def test_aborting_what_is_unknown_or_over_does_nothing() -> None:
    sim = Simulation()
    sim.add([1], max_tokens=1)
    sim.run()
    assert sim.scheduler.abort("0") == sim.scheduler.abort("nobody", 3) == []


def test_a_preempted_sequence_can_be_aborted() -> None:
    sim = Simulation(slots=64)
    sim.add([1] * 20, max_tokens=40)
    new = sim.add([2] * 20, max_tokens=40)
    while not sim.scheduler.stats().preemptions:
        sim.step()
    sim.abort(new)
    sim.run()
