"""A log file that rotates, and a thread that writes to it, so that nobody has to wait for a disk."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger("lightllm.observe")


class LogFile:
    """Whole lines, in a file that does not grow beyond ``max_bytes`` unless one line does.

    Before it would, it becomes ``path.1``, that ``path.2`` and so on; the last of ``keep`` is dropped. New files are
    readable by their owner only. Raises OSError where the path cannot be appended to, or is no regular file.

    `logging.handlers.RotatingFileHandler` keeps what a full disk did not take and writes it later, perhaps half.
    """

    def __init__(self, path: str, max_bytes: int, keep: int) -> None:
        self.path = os.path.realpath(os.path.expanduser(path))
        self._max_bytes, self._keep = max_bytes, keep
        self._file = _open(self.path)
        self._size = os.fstat(self._file).st_size

    def append(self, line: bytes) -> None:
        """Raises OSError; then nothing of the line is in the file."""
        if self._size and self._size + len(line) > self._max_bytes:
            self._rotate()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            if written:
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        os.close(self._file)

    def _rotate(self) -> None:
        new = f"{self.path}.new"
        file = _open(new, os.O_TRUNC)  # before anything is moved: what fails again and again must not push files out
        try:
            with contextlib.suppress(FileNotFoundError):
                for number in reversed(range(1, self._keep)):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
                if self._keep:
                    os.replace(self.path, f"{self.path}.1")
            os.replace(new, self.path)
        except OSError:
            os.close(file)
            raise
        os.close(self._file)
        self._file, self._size = file, 0


def _open(path: str, flags: int = 0) -> int:
    # O_NONBLOCK: a named pipe without a reader would hold us up; on regular files it says nothing
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError("it is no regular file")
    return file


class Writer(Generic[T]):
    """Makes lines of items in a thread and appends them. `put` never waits: what comes too fast is dropped.

    ``dropped``: items that found no room; ``lost``: lines that could not be written. The first of each is warned about.
    """

    def __init__(self, file: LogFile, line: Callable[[T], bytes], *, max_items: int, max_weight: int) -> None:
        self.written = self.lost = self.dropped = 0
        self._file, self._line = file, line
        self._max_items, self._max_weight = max_items, max_weight
        self._items: deque[tuple[T, int]] = deque()
        self._weight = self._taken = 0
        self._changed = threading.Condition()
        self._closed = False
        # a disk that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._work, name="lightllm-observe", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, item: T, weight: int = 0) -> None:
        """``weight``: about how many bytes it holds."""
        with self._changed:
            if not self._closed and len(self._items) < self._max_items and self._weight + weight <= self._max_weight:
                self._items.append((item, weight))
                self._weight += weight
                self._taken += 1
                self._changed.notify()
                return
            self.dropped += 1
        if self.dropped == 1:
            log.warning("the request log %s cannot keep up: lines are dropped and counted", self._file.path)

    def close(self, timeout: float) -> None:
        """Write what is there and close the file; give up after ``timeout`` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if missing := self.dropped + self._taken - self.written:
            log.warning("the request log %s lacks %d lines", self._file.path, missing)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if not self._items:
                    break
                item, weight = self._items.popleft()
                self._weight -= weight
            try:
                self._file.append(self._line(item))
                self.written += 1
            except Exception as error:
                self.lost += 1
                if self.lost == 1:
                    log.warning("the request log %s cannot be written, lines are lost: %s", self._file.path, error)
        self._file.close()
