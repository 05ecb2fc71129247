"""Every slot has one owner, and what is published is found: against plain dictionaries, over random operations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm.engine.kvcache import KVCache, Lease, Node
from lightllm.engine.slots import FreeRuns


def publish(cache: KVCache, tokens: Sequence[int]) -> list[int]:
    """Run a sequence from start to end on its own; its slots."""
    lease = cache.acquire(tokens)
    assert cache.extend(lease, len(tokens) - lease.shared)
    cache.commit(lease, tokens)
    slots = list(lease.slots)
    cache.release(lease)
    return slots


def cached(cache: KVCache, tokens: Sequence[int]) -> int:
    """How many of the first tokens are cached. Counts as a use of them."""
    lease = cache.acquire(tokens)
    cache.release(lease)
    return lease.shared


def published(cache: KVCache) -> Iterator[tuple[int, ...]]:
    """Every beginning the tree holds, read token by token."""
    stack: list[tuple[Node, tuple[int, ...]]] = [(cache._root, ())]
    while stack:
        node, spelt = stack.pop()
        for token in node.tokens:
            spelt += (token,)
            yield spelt
        stack += [(child, spelt) for child in node.children.values()]


def longest(tokens: Sequence[int], known: set[tuple[int, ...]]) -> int:
    """The oracle: how many of the first tokens are among the known beginnings."""
    return max((n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in known), default=0)


# --- random operations


class Live:
    """A lease, the tokens it is for, and how many of them its slots really hold."""

    def __init__(self, lease: Lease, tokens: list[int]) -> None:
        self.lease = lease
        self.tokens = tokens
        self.written = lease.shared


class World:
    """Drives a cache with random operations. ``memory`` stands for the pool: slot -> all tokens up to the one it holds,
    which is what keys and values depend on."""

    def __init__(self, seed: int, slots: int, prefix_cache: bool = True) -> None:
        self.draw = random.Random(seed)
        self.cache = KVCache(slots, prefix_cache)
        self.memory: list[tuple[int, ...]] = [()] * slots
        self.live: list[Live] = []
        self.known: set[tuple[int, ...]] = {()}
        self.longest = max(4, slots // 4)

    def tokens(self) -> list[int]:
        """Few different tokens and a preference for what is known, so that beginnings are often shared."""
        start: list[int] = []
        if len(self.known) > 1 and self.draw.random() < 0.6:
            start = list(self.draw.choice(sorted(self.known)))
            start = start[: self.draw.randint(0, len(start))]
        return start + [self.draw.randrange(3) for _ in range(self.draw.randint(1, self.longest))]

    def acquire(self) -> None:
        tokens = self.tokens()
        limit = self.draw.choice([None, 0, len(tokens) - 1, len(tokens) // 2])
        lease = self.cache.acquire(tokens, limit)
        wanted = tokens[:limit]
        expected = longest(wanted, self.known) if self.cache.prefix_cache else 0
        assert lease.shared == len(lease.slots) == expected
        self.live.append(Live(lease, tokens))

    def extend(self, one: Live) -> None:
        count = self.draw.randint(1, self.longest)
        before, available = list(one.lease.slots), self.cache.available
        done = self.cache.extend(one.lease, count, self.draw.choice([0, 0, 3, 20]))
        assert done == (count <= available), "all or nothing, and only for want of room"
        assert one.lease.slots[: len(before)] == before
        assert len(one.lease.slots) == len(before) + count * done
        while len(one.tokens) < len(one.lease.slots):
            one.tokens.append(self.draw.randrange(3))
        for at in range(one.written, len(one.lease.slots)):
            self.memory[one.lease.slots[at]] = tuple(one.tokens[: at + 1])
        one.written = len(one.lease.slots)

    def commit(self, one: Live, release: bool) -> None:
        tokens = one.tokens[: self.draw.randint(0, one.written)]
        free, size = self.cache.free + self.cache.cached, len(one.lease.slots) - one.lease.shared
        if release:
            self.live.remove(one)
            self.cache.release(one.lease, tokens)
            assert self.cache.free + self.cache.cached == free + size, "all of it is given back, or the tree's"
        else:
            self.cache.commit(one.lease, tokens)
            if self.cache.prefix_cache:
                assert one.lease.shared >= len(tokens)
        if self.cache.prefix_cache:
            self.known |= {tuple(tokens[:n]) for n in range(len(tokens) + 1)}

    def step(self) -> None:
        action = self.draw.random()
        if action < 0.25 or not self.live:
            self.acquire()
        elif action < 0.6:
            self.extend(self.draw.choice(self.live))
        elif action < 0.998:
            self.commit(self.draw.choice(self.live), release=action > 0.75 or len(self.live) > 8)
        else:
            self.cache.reset()
            assert self.cache.evictable == 0
        self.check()

    def check(self) -> None:
        self.cache.check([one.lease for one in self.live])
        for one in self.live:
            for at in range(one.written):
                assert self.memory[one.lease.slots[at]] == tuple(one.tokens[: at + 1]), "a slot was overwritten"
        still = {()} | set(published(self.cache))
        assert still <= self.known, "nothing is found that was not published"
        self.known = still


@pytest.mark.parametrize(("slots", "prefix_cache"), [(24, True), (96, True), (400, True), (96, False)])
def test_no_slot_is_lost_shared_or_freed_twice_in_10000_random_operations(slots: int, prefix_cache: bool) -> None:
    world = World(slots, slots, prefix_cache)
    for _ in range(2500):
        world.step()
    for one in list(world.live):
        world.commit(one, release=True)
    world.check()
    assert world.cache.available == slots


def test_with_room_for_all_exactly_what_was_published_is_found() -> None:
    draw = random.Random(0)
    cache = KVCache(200_000)
    known: set[tuple[int, ...]] = {()}
    for _ in range(400):
        tokens = [draw.randrange(2) for _ in range(draw.randint(1, 60))]
        assert cached(cache, tokens) == longest(tokens, known)
        tokens = tokens[: draw.randint(1, len(tokens))]
        publish(cache, tokens)
        known |= {tuple(tokens[:n]) for n in range(len(tokens) + 1)}
        assert set(published(cache)) | {()} == known, "nothing is evicted"
    cache.check([])


# --- one behaviour at a time


def test_no_more_than_the_limit_is_shared() -> None:
    cache = KVCache(100)
    publish(cache, range(10))
    lease = cache.acquire(range(10), limit=9)
    assert lease.shared == 9
    cache.check([lease])


def test_a_split_keeps_the_slots_of_those_who_hold_the_edge() -> None:
    cache = KVCache(100)
    lease = cache.acquire([])
    cache.extend(lease, 10)
    cache.commit(lease, range(10))
    slots = list(lease.slots)
    other = cache.acquire([0, 1, 2, 3, 77])
    assert other.slots == slots[:4]
    third = cache.acquire([0, 1, 88])
    assert third.slots == slots[:2]
    assert lease.slots == slots
    cache.check([lease, other, third])
    cache.release(other)
    cache.release(third)
    cache.check([lease])
    assert cache.evictable == 0, "all of it is still held by the first"
    assert cached(cache, range(10)) == 10


def test_who_publishes_the_same_second_goes_over_to_the_first_ones_slots() -> None:
    cache = KVCache(100)
    one, two = cache.acquire(range(10)), cache.acquire(range(10))
    cache.extend(one, 10)
    cache.extend(two, 12)
    cache.commit(one, range(10))
    tail = two.slots[10:]
    cache.commit(two, range(10))
    assert two.slots == one.slots + tail
    assert (cache.free, cache.cached) == (100 - 12, 10)
    cache.release(one)
    assert cache.evictable == 0, "the second holds them now"
    cache.check([two])


def test_what_was_used_longest_ago_is_evicted_first() -> None:
    cache = KVCache(30)
    for first in (1, 2, 3):
        publish(cache, [first] * 10)
    assert cached(cache, [1] * 10) == 10
    lease = cache.acquire([])
    assert cache.extend(lease, 10)
    assert cached(cache, [1] * 10) == 10
    assert cached(cache, [3] * 10) == 10
    assert cached(cache, [2] * 10) == 0
    assert cache.extend(lease, 10)
    assert cached(cache, [3] * 10) == 10
    assert cached(cache, [1] * 10) == 0


def test_letting_go_of_a_beginning_is_a_use_of_it() -> None:
    cache = KVCache(20)
    publish(cache, [1] * 10)
    holder = cache.acquire([1] * 10)
    publish(cache, [2] * 10)
    cache.release(holder)
    lease = cache.acquire([])
    cache.extend(lease, 10)
    assert (cached(cache, [1] * 10), cached(cache, [2] * 10)) == (10, 0)


def test_a_leaf_is_evicted_from_its_end_and_before_what_it_follows() -> None:
    cache = KVCache(30)
    publish(cache, range(10))
    publish(cache, [*range(10), 50, 51])
    publish(cache, [*range(10), 60, 61])
    lease = cache.acquire([])
    cache.extend(lease, 17)
    assert cached(cache, [*range(10), 60, 61]) == 12
    assert cached(cache, [*range(10), 50, 51]) == 11
    cache.extend(lease, 7)
    assert cached(cache, range(10)) == 6
    cache.check([lease])


def test_what_a_sequence_holds_is_never_evicted() -> None:
    cache = KVCache(30)
    publish(cache, range(20))
    holder = cache.acquire(range(15))
    other = cache.acquire([])
    assert not cache.extend(other, 16)
    assert other.slots == [] and cache.available == 15 and cached(cache, range(20)) == 20
    assert cache.extend(other, 15)
    assert cached(cache, range(20)) == 15
    cache.check([holder, other])


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    cache = KVCache(30, prefix_cache=False)
    publish(cache, range(20))
    assert (cache.free, cache.cached, cached(cache, range(20))) == (30, 0, 0)


def test_reset_forgets_what_nobody_holds() -> None:
    cache = KVCache(100)
    publish(cache, range(20))
    publish(cache, range(100, 120))
    holder = cache.acquire(range(5))
    cache.reset()
    assert cache.cached == 5
    cache.check([holder])


def runs(slots: list[int]) -> int:
    return sum(b != a + 1 for a, b in itertools.pairwise(slots)) + 1


def test_sequences_that_grow_by_turns_stay_in_runs() -> None:
    cache = KVCache(10_000)
    leases = [cache.acquire([]) for _ in range(20)]
    for lease in leases:
        cache.extend(lease, 100, 256)
    for _ in range(256):
        for lease in leases:
            cache.extend(lease, 1, 256)
    assert [runs(lease.slots) for lease in leases] == [1] * 20


def test_a_sequence_goes_on_where_it_stopped_if_there_is_room() -> None:
    cache = KVCache(100)
    hole, wall, lease = (cache.acquire([]) for _ in range(3))
    for one in (hole, wall, lease):
        cache.extend(one, 10)
    cache.release(hole)
    cache.extend(lease, 10)
    assert runs(lease.slots) == 1
    cache.check([wall, lease])


def test_a_sequence_that_will_grow_starts_where_it_can() -> None:
    cache = KVCache(100)
    hole, wall = cache.acquire([]), cache.acquire([])
    cache.extend(hole, 10)
    cache.extend(wall, 10)
    cache.release(hole)
    short, growing = cache.acquire([]), cache.acquire([])
    cache.extend(growing, 10, 20)
    cache.extend(short, 10)
    assert growing.slots[0] == 20
    assert short.slots[0] == 0
    cache.check([wall, short, growing])


def test_slots_set_aside_are_given_up_before_anything_cached() -> None:
    cache = KVCache(100)
    publish(cache, range(20))
    greedy, other = cache.acquire([]), cache.acquire([])
    cache.extend(greedy, 1, 256)
    assert cache.extend(other, 79)
    assert cached(cache, range(20)) == 20
    cache.check([greedy, other])


def test_in_a_full_pool_growing_by_turns_does_not_alternate_slot_by_slot() -> None:
    cache = KVCache(8192)
    publish(cache, range(8192))
    leases = [cache.acquire([]) for _ in range(8)]
    for _ in range(512):
        for lease in leases:
            assert cache.extend(lease, 1, 64)
    assert max(runs(lease.slots) for lease in leases) < 512 / 8
    cache.check(leases)


def test_the_least_recently_used_are_found_again_after_many_uses() -> None:
    """The queue of candidates is tidied as it grows; none may be lost by that."""
    cache = KVCache(30)
    publish(cache, [1] * 10)
    publish(cache, [2] * 10)
    for _ in range(5000):
        cached(cache, [2] * 10)
    assert len(cache._leaves) <= 2048
    lease = cache.acquire([])
    cache.extend(lease, 20)
    assert cached(cache, [2] * 10) == 10
    cache.extend(lease, 10)
    cache.check([lease])


def test_thousands_of_leaves_are_evicted_in_order() -> None:
    cache = KVCache(3000)
    for token in range(3000):
        publish(cache, [token])
    lease = cache.acquire([])
    for count in range(1, 4):
        cache.extend(lease, 1000)
        held = {first for (first,) in published(cache)}
        assert held == set(range(min(held, default=3000), 3000))
        assert len(held) <= 3000 - 1000 * count


# --- free runs


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.lists(st.tuples(st.integers(0, 69), st.integers(1, 20)), max_size=60))
def test_free_runs_agree_with_a_set(slots: int, actions: list[tuple[int, int]]) -> None:
    """Each action takes a run of at least some size, or the largest, or puts some slots back."""
    free, taken = FreeRuns(slots), set[int]()
    for at, size in actions:
        if at in taken:
            end = at
            while end in taken and end < at + size:
                taken.remove(end)
                end += 1
            free.put(at, end)
        else:
            start = free.find(size) if at % 2 else free.largest()
            if start is not None:
                end = free.take(start, size)
                assert end - start == size or not at % 2
                assert not taken & set(range(start, end))
                taken |= set(range(start, end))
            elif not at % 2:
                assert len(taken) == slots
        assert sorted(free.check()) == sorted(set(range(slots)) - taken)
