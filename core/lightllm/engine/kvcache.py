"""Who owns which slot of the KV pool: a token-granular pool with a radix-tree prefix cache.

A slot holds the key and value of one token. It is free, or owned by one live `Lease`, or by the tree: finished and
published beginnings stay there until the room is needed, the least recently used leaves going first (as LightLLM's
TokenAttention and SGLang's RadixAttention do it). Pure Python; knows no tensor and no request.

What always holds, and `KVCache.check` asserts: every slot has one owner; a lease's shared slots are those of its path
in the tree, and no node of a path is evicted; no two children of a node begin alike.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence

from lightllm.engine.slots import FreeRuns

EVICT_AHEAD = 32
"""Slots evicted per live lease beyond what is needed: evicted one by one, they would lie scattered."""


class Node:
    """An edge of the tree and what follows it: ``tokens`` after its parent's, with their slots.

    ``refs``: leases that hold this node or one below it; 0 means its slots may be evicted. ``used``: when one last
    let go of it.
    """

    __slots__ = ("children", "parent", "refs", "slots", "tokens", "used")

    def __init__(self, parent: Node | None, tokens: list[int], slots: list[int]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.slots = slots
        self.children: dict[int, Node] = {}
        self.refs = 0
        self.used = 0


class Lease:
    """One sequence's slots, by position. The first ``shared`` belong to the tree, up to ``node``; it owns the rest.
    As long as ``slots`` is the same list, it has only grown at its end.

    From ``room`` to ``room_end`` are free slots set aside for it to grow into, while there is room elsewhere.
    """

    __slots__ = ("node", "room", "room_end", "shared", "slots")

    def __init__(self, node: Node, slots: list[int]) -> None:
        self.node = node
        self.slots = slots
        self.shared = len(slots)
        self.room = self.room_end = 0


class KVCache:
    """``slots``: the pool's size in tokens."""

    def __init__(self, slots: int, prefix_cache: bool = True) -> None:
        self.slots = slots
        self.prefix_cache = prefix_cache
        self.cached = 0  # slots the tree owns
        self.evictable = 0  # of these, the ones no lease holds
        self._root = Node(None, [], [])
        self._root.refs = 1
        self._clock = itertools.count(1)
        self._leaves: list[tuple[int, int, Node]] = []  # a heap; entries of nodes that changed since are skipped
        self._leaves_limit = 1024
        self._order = itertools.count()
        self.free = slots  # slots nobody owns: in runs, or set aside
        self._runs = FreeRuns(slots)
        self._rooms: dict[Lease, None] = {}  # leases with slots set aside; first the one next to give some up
        self._live = 0  # leases

    @property
    def available(self) -> int:
        """Slots that can be had: free, or cached and held by nobody."""
        return self.free + self.evictable

    def acquire(self, tokens: Sequence[int], limit: int | None = None) -> Lease:
        """A lease on the longest published beginning of ``tokens``, at most ``limit`` of them."""
        self._live += 1
        if not self.prefix_cache:
            return self._lock(Lease(self._root, []))
        wanted = list(tokens[:limit])
        node, slots = self._root, []
        for node, _ in self._walk(self._root, wanted, 0):
            slots += node.slots
        return self._lock(Lease(node, slots))

    def extend(self, lease: Lease, count: int, ahead: int = 0) -> bool:
        """Give the lease ``count`` more slots of its own; False, and nothing done, when they cannot be had.

        They follow its last one, or each other, where there is room: attention reads a run without copying it.
        ``ahead``: how many more the sequence may come to need; they are set aside for it as long as there is room
        elsewhere.
        """
        if count > self.available:
            return False
        if count > self.free:
            self._evict(count - self.free)
        self.free -= count
        while count:
            if lease.room == lease.room_end:
                self._set_aside(lease, count, ahead)
            end = min(lease.room + count, lease.room_end)
            count -= end - lease.room
            lease.slots += range(lease.room, end)
            lease.room = end
            if end == lease.room_end:
                del self._rooms[lease]
        return True

    def _set_aside(self, lease: Lease, count: int, ahead: int) -> None:
        """Room for the lease, whose old one is used up: just after its last slot, else where all of it fits, else as
        much as there is in one place, else what another has: half of it, lest two take turns slot by slot."""
        after = lease.slots[-1] + 1 if lease.slots else -1
        start: int | None = after
        if after not in self._runs:
            start = self._runs.find(count + ahead)
            if start is None:
                start = self._runs.find(count)
            if start is None:
                start = self._runs.largest()
        if start is not None:
            lease.room, lease.room_end = start, self._runs.take(start, count + ahead)
        else:
            other = next(iter(self._rooms))
            del self._rooms[other]
            size = other.room_end - other.room
            lease.room_end = other.room_end
            lease.room = other.room_end = other.room if size <= count else other.room + size // 2
            if other.room < other.room_end:
                self._rooms[other] = None
        self._rooms[lease] = None

    def commit(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Publish: ``tokens``, whose keys and values the lease's first slots hold, may be shared from now on.

        Where the tree holds the same tokens already, our duplicates are freed and the lease goes over to the tree's.
        """
        if not self.prefix_cache or len(tokens) <= lease.shared:
            return
        tokens = list(tokens)
        old, node, at = lease.node, lease.node, lease.shared
        for node, end in self._walk(lease.node, tokens, at):
            self._give_back(lease.slots[at:end])
            lease.slots = lease.slots[:at] + node.slots + lease.slots[end:]
            at = end
        if at < len(tokens):
            child = Node(node, tokens[at:], lease.slots[at : len(tokens)])
            node.children[tokens[at]] = child
            self.cached += len(child.slots)
            self.evictable += len(child.slots)
            node = child
        lease.node, lease.shared = node, len(tokens)
        self._lock(lease)
        self._unlock(old)

    def release(self, lease: Lease, tokens: Sequence[int] = ()) -> None:
        """Give everything back, publishing ``tokens`` first. The lease must not be used again."""
        self.commit(lease, tokens)
        self._give_back(lease.slots[lease.shared :])
        if lease in self._rooms:
            del self._rooms[lease]
            self._runs.put(lease.room, lease.room_end)
        lease.slots = []
        self._live -= 1
        self._unlock(lease.node)

    def reset(self) -> None:
        """Forget all that is cached and held by no lease."""
        self._evict(self.evictable)

    # --- the tree

    def _walk(self, node: Node, tokens: list[int], at: int) -> Iterator[tuple[Node, int]]:
        """The nodes below ``node`` that spell ``tokens[at:]`` as far as the tree goes, each with the position it ends
        at. A node that only begins alike is split there, so that every node given is wholly a match."""
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            same = _common(child.tokens, tokens, at)
            if same < len(child.tokens):
                child = self._split(child, same)
            at += same
            yield child, at
            node = child

    def _split(self, node: Node, at: int) -> Node:
        """Put a new node before ``node`` that takes its first ``at`` tokens. Leases on ``node`` stay valid."""
        upper = Node(node.parent, node.tokens[:at], node.slots[:at])
        upper.refs, upper.used = node.refs, node.used
        upper.children[node.tokens[at]] = node
        assert node.parent is not None
        node.parent.children[node.tokens[0]] = upper
        node.parent, node.tokens, node.slots = upper, node.tokens[at:], node.slots[at:]
        return upper

    def _lock(self, lease: Lease) -> Lease:
        node: Node | None = lease.node
        while node is not None:
            if node.refs == 0:
                self.evictable -= len(node.slots)
            node.refs += 1
            node = node.parent
        return lease

    def _unlock(self, node: Node | None) -> None:
        now = next(self._clock)
        while node is not None:
            node.refs -= 1
            node.used = now
            if node.refs == 0:
                self.evictable += len(node.slots)
                self._offer(node)
            node = node.parent

    def _offer(self, node: Node) -> None:
        """Note a node as a candidate for eviction, if it is one."""
        if node.refs or node.children:
            return
        heapq.heappush(self._leaves, (node.used, next(self._order), node))
        if len(self._leaves) > self._leaves_limit:  # mostly entries of nodes that were used again since
            self._leaves = [entry for entry in self._leaves if _current(entry)]
            heapq.heapify(self._leaves)
            self._leaves_limit = max(1024, 2 * len(self._leaves))

    def _evict(self, count: int) -> None:
        """Free ``count`` cached slots that nobody holds, and some ahead. The caller knows there are as many."""
        # Not much of a small pool, where what is cached is worth more than long runs.
        count = min(count + min(EVICT_AHEAD * self._live, self.slots // 32), self.evictable)
        while count > 0:
            entry = heapq.heappop(self._leaves)
            if not _current(entry):
                continue
            node = entry[2]
            # From the end of the leaf, and no more than needed: what is left of it is still a beginning.
            cut = max(0, len(node.slots) - count)
            freed = node.slots[cut:]
            count -= len(freed)
            self.cached -= len(freed)
            self.evictable -= len(freed)
            self._give_back(freed)
            first = node.tokens[0]
            del node.slots[cut:], node.tokens[cut:]
            if cut:
                self._offer(node)
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[first]
            self._offer(parent)

    def _give_back(self, slots: list[int]) -> None:
        self.free += len(slots)
        at = 0
        while at < len(slots):
            start, size = slots[at], _run(slots, at)
            self._runs.put(start, start + size)
            at += size

    # --- for tests

    def check(self, leases: Sequence[Lease]) -> None:
        """Raise AssertionError unless every slot has one owner and every count is right."""
        owned = self._runs.check()
        for lease in self._rooms:
            assert lease in leases and lease.room < lease.room_end
            owned += range(lease.room, lease.room_end)
        assert len(owned) == self.free
        assert len(leases) == self._live
        refs: dict[int, int] = {}
        for lease in leases:
            owned += lease.slots[lease.shared :]
            path: list[int] = []
            node: Node | None = lease.node
            while node is not None:
                refs[id(node)] = refs.get(id(node), 0) + 1
                path[:0] = node.slots
                node = node.parent
            assert path == lease.slots[: lease.shared], "a lease's shared slots are those of its path"
        cached = evictable = 0
        stack = [self._root]
        while stack:
            node = stack.pop()
            expected = refs.get(id(node), 0) + (node is self._root)
            assert node.refs == expected, f"node holds {node.refs} references, {expected} leases are below it"
            assert len(node.tokens) == len(node.slots)
            owned += node.slots
            cached += len(node.slots)
            evictable += len(node.slots) if node.refs == 0 else 0
            for first, child in node.children.items():
                assert child.parent is node and child.tokens[0] == first
                stack.append(child)
        assert (cached, evictable) == (self.cached, self.evictable)
        assert sorted(owned) == list(range(self.slots)), "every slot has exactly one owner"


def _current(entry: tuple[int, int, Node]) -> bool:
    """Whether a candidate for eviction still is one, and has not been used since."""
    used, _, node = entry
    return not node.refs and not node.children and node.used == used and bool(node.slots)


def _common(edge: list[int], tokens: list[int], at: int) -> int:
    """How many of ``edge``'s tokens are ``tokens[at:]``'s first ones. Compares slices: that is C, not Python."""
    length = min(len(edge), len(tokens) - at)
    if edge[:length] == tokens[at : at + length]:
        return length
    low, high = 0, length  # the first ``low`` are alike, the first ``high`` are not
    while high - low > 1:
        middle = (low + high) // 2
        if edge[low:middle] == tokens[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low


def _run(slots: list[int], at: int) -> int:
    """How many of ``slots[at:]`` follow each other, from the first on."""
    start, size, most = slots[at], 1, len(slots) - at
    while size < most:
        more = list(range(start + size, start + min(2 * size, most)))
        same = _common(more, slots, at + size)
        size += same
        if same < len(more):
            break
    return size
