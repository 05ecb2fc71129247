"""Where the free slots of the KV pool are. Pure Python; knows no sequence and no tree."""

from __future__ import annotations


class FreeRuns:
    """The free slots as maximal runs. Everything but `check` takes constant time, however scattered they are.

    Runs are known by both ends, so that neighbours join, and by the bit length of their size (boundary tags and size
    classes: Knuth, The Art of Computer Programming 1, section 2.5).
    """

    def __init__(self, slots: int) -> None:
        self._ends: dict[int, int] = {}  # start -> end
        self._starts: dict[int, int] = {}  # end -> start
        self._classes: list[dict[int, None]] = [{} for _ in range(slots.bit_length() + 1)]
        self._filled = 0  # bit i: class i has a run
        if slots:
            self._insert(0, slots)

    def __contains__(self, start: int) -> bool:
        """Whether a run begins there."""
        return start in self._ends

    def put(self, start: int, end: int) -> None:
        before, after = self._starts.get(start), self._ends.get(end)
        if before is not None:
            self._remove(before)
            start = before
        if after is not None:
            self._remove(end)
            end = after
        self._insert(start, end)

    def take(self, start: int, most: int) -> int:
        """Take at most ``most`` slots of the run that begins at ``start``; where the piece taken ends."""
        end = self._remove(start)
        if end - start > most:
            self._insert(start + most, end)
            return start + most
        return end

    def find(self, size: int) -> int | None:
        """The start of a run of at least ``size``, not much larger if there is such. May overlook a run whose size has
        the same bit length."""
        width = size.bit_length()
        if width < len(self._classes) and self._classes[width]:
            start = _last(self._classes[width])
            if self._ends[start] - start >= size:
                return start
        larger = self._filled >> (width + 1)
        return _last(self._classes[width + (larger & -larger).bit_length()]) if larger else None

    def largest(self) -> int | None:
        """The start of a run than which none is twice as large."""
        return _last(self._classes[self._filled.bit_length() - 1]) if self._filled else None

    def _insert(self, start: int, end: int) -> None:
        self._ends[start] = end
        self._starts[end] = start
        width = (end - start).bit_length()
        self._classes[width][start] = None
        self._filled |= 1 << width

    def _remove(self, start: int) -> int:
        end = self._ends.pop(start)
        del self._starts[end]
        width = (end - start).bit_length()
        del self._classes[width][start]
        if not self._classes[width]:
            self._filled ^= 1 << width
        return end

    def check(self) -> list[int]:
        """All free slots. Raise AssertionError unless the indexes agree."""
        assert self._starts == {end: start for start, end in self._ends.items()}
        assert not self._starts.keys() & self._ends.keys(), "runs that touch are one"
        for width, starts in enumerate(self._classes):
            assert bool(starts) == bool(self._filled >> width & 1)
            assert all((self._ends[start] - start).bit_length() == width for start in starts)
        assert sum(map(len, self._classes)) == len(self._ends)
        return [slot for start, end in self._ends.items() for slot in range(start, end)]


def _last(keys: dict[int, None]) -> int:
    """The key put in last. Taken out and put back, which is constant time where iterating may pass many old gaps."""
    key, _ = keys.popitem()
    keys[key] = None
    return key
