"""What a server has done since its start, in a few numbers."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

RECENT = 1000
"""Requests that the percentiles are of."""


def utc(seconds: float) -> str:
    """ISO 8601, in milliseconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Totals:
    def __init__(self) -> None:
        self._since = utc(time.time())
        self._requests: Counter[str] = Counter(ok=0, error=0, aborted=0)
        self._tokens: Counter[str] = Counter(prompt=0, completion=0, cached=0)
        self._first: deque[float] = deque(maxlen=RECENT)
        self._durations: deque[float] = deque(maxlen=RECENT)

    def add(self, facts: Mapping[str, Any]) -> None:
        """What a listener's ``on_finish`` is told."""
        self._requests[facts["status"]] += 1
        for kind in self._tokens:
            self._tokens[kind] += facts[f"{kind}_tokens"]
        self._durations.append(facts["duration"])
        if facts["time_to_first_token"] is not None:
            self._first.append(facts["time_to_first_token"])

    def show(self) -> dict[str, Any]:
        """Latencies in seconds, of the last `RECENT` requests."""
        return {
            "since": self._since,
            "requests": dict(self._requests),
            "tokens": dict(self._tokens),
            "time_to_first_token": percentiles(self._first),
            "duration": percentiles(self._durations),
        }


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """By the nearest rank; null where there are no values."""
    ordered = sorted(values)
    ranks = {p: math.ceil(p / 100 * len(ordered)) for p in (50, 90, 99)}
    return {f"p{p}": round(ordered[rank - 1], 6) if ordered else None for p, rank in ranks.items()}
