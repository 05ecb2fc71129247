"""Reading text that comes in pieces as if it were all there.

The methods of `Scanner` are generators: they yield when the text at hand does not decide what is next, and are resumed
when there is more. What they decide depends on the characters alone, never on where a piece ended. Each character is
looked at once and passed on to a ``sink`` at once, so time is linear and nothing waits but a marker not yet whole.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")
E = TypeVar("E")
Steps = Generator[None, None, T]
Sink = Callable[[str], object]

SPACE = re.compile(r"[ \t\r\n]+")
_SCALAR = re.compile(r"[-+.\w]+")

JSON = re.compile(r'["{}\[\]<]')
"""What matters outside of strings. JSON has no ``<`` there: it begins a tag, and a bracket was forgotten."""
PYTHON = re.compile(r"""["'(){}\[\]]""")

_CLOSER = {"{": "}", "[": "]", "(": ")"}
_STRING = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}


class Fault(Exception):
    """What is next, or the end, does not belong there. It is left unread; no parser lets this out."""


def first_of(*words: str) -> re.Pattern[str]:
    """Finds the first of ``words`` (group 1), or the beginning of one at the very end of the text (no group)."""
    beginnings = {word[:length] for word in words for length in range(1, len(word))}
    longest_first = sorted(map(re.escape, beginnings), key=len, reverse=True)
    partial = rf"|(?:{'|'.join(longest_first)})\Z" if beginnings else ""
    return re.compile(rf"({'|'.join(map(re.escape, words))}){partial}")


class Scanner:
    """``syntax``: `JSON` or `PYTHON`. ``ended``: set when no more will be fed; then no method waits."""

    def __init__(self, syntax: re.Pattern[str] = JSON) -> None:
        self.ended = False
        self._syntax = syntax
        self._text = ""
        self._at = 0

    def feed(self, text: str) -> None:
        """More text. What is still unread is never longer than a marker, so this copies little."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def more(self) -> Steps[bool]:
        """Whether anything is left."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._at < len(self._text)

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        return self._text[self._at] if (yield from self.more()) else ""

    def find(self, pattern: re.Pattern[str], sink: Sink) -> Steps[str]:
        """Pass on what comes before the next of a `first_of`, and read and return that; empty at the end."""
        while True:
            found = pattern.search(self._text, self._at)
            end = found.start() if found else len(self._text)
            sink(self._text[self._at : end])
            if found and found[1]:
                self._at = found.end()
                return found[1]
            self._at = end
            if self.ended:
                sink(self._text[end:])
                self._at = len(self._text)
                return ""
            yield

    def literal(self, word: str, sink: Sink) -> Steps[bool]:
        """Read ``word`` if it is next."""
        while True:
            have = self._text[self._at : self._at + len(word)]
            if have == word:
                self._at += len(word)
                sink(word)
                return True
            if self.ended or not word.startswith(have):
                return False
            yield

    def run(self, characters: re.Pattern[str], sink: Sink) -> Steps[bool]:
        """Read all that is of one class (``[...]+``); whether there was any."""
        some = False
        while (yield from self.more()):
            found = characters.match(self._text, self._at)
            if found is None:
                break
            self._at = found.end()
            sink(found[0])
            some = True
        return some

    def value(self, sink: Sink) -> Steps[None]:
        """A string, a number, a word, or all between two brackets. Raises `Fault`."""
        first = yield from self.peek()
        if self._syntax.match(first):
            yield from self.string(sink) if first in _STRING else self.nested(sink)
        elif not (yield from self.run(_SCALAR, sink)):
            raise Fault

    def string(self, sink: Sink) -> Steps[None]:
        """From the quote that is next to its partner; in between a backslash protects any character. Raises `Fault`.

        Python has strings between three quotes, too.
        """
        quote = self._text[self._at]
        special = _STRING[quote]
        tripled = self._syntax is PYTHON and (yield from self.literal(3 * quote, sink))
        start, self._at = self._at, self._at + (not tripled)
        while True:
            found = special.search(self._text, self._at)
            if found and found[0] == quote:
                self._at = found.start() if tripled else found.end()
                sink(self._text[start : self._at])
                if not tripled or (yield from self.literal(3 * quote, sink)):
                    return
                start, self._at = self._at, self._at + 1
                continue
            after = found.end() + 1 if found else len(self._text)
            if after < len(self._text):
                self._at = after
                continue
            protected = after - len(self._text)  # 1 when the character after a backslash is yet to come
            sink(self._text[start:])
            self._at = len(self._text)
            if not (yield from self.more()):
                raise Fault
            start, self._at = self._at, self._at + protected

    def nested(self, sink: Sink, closers: str = "") -> Steps[None]:
        """From the bracket that is next to its partner; or, inside already, up to the last of ``closers``.

        Raises `Fault` where a bracket closes another than it should. What else is inside is not judged.
        """
        open_ = list(closers)
        start = self._at
        while True:
            found = self._syntax.search(self._text, self._at)
            if found is None:
                sink(self._text[start:])
                self._at = len(self._text)
                if not (yield from self.more()):
                    raise Fault
                start = self._at
                continue
            char, self._at = found[0], found.start()
            if char in _STRING:
                sink(self._text[start : self._at])
                yield from self.string(sink)
                start = self._at
                continue
            if char in _CLOSER:
                open_.append(_CLOSER[char])
            elif open_ and char == open_[-1]:
                open_.pop()
            else:
                sink(self._text[start : self._at])
                raise Fault
            self._at += 1
            if not open_:
                sink(self._text[start : self._at])
                return


class Machine(ABC, Generic[E]):
    """A parser whose reading is one generator, `_read`: pushed text, it goes on as far as the text decides.

    What it finds it adds to ``_pieces``, which `_flush` makes an event of, or to ``_events``.
    """

    def __init__(self, syntax: re.Pattern[str] = JSON) -> None:
        self.source = Scanner(syntax)
        self._pieces: list[str] = []
        self._events: list[E] = []
        self._steps = self._read()

    def push(self, text: str) -> list[E]:
        self.source.feed(text)
        return self._step()

    def close(self) -> list[E]:
        self.source.ended = True
        return self._step()

    @abstractmethod
    def _read(self) -> Steps[None]: ...

    @abstractmethod
    def _event(self, text: str) -> E:
        """Of the pieces so far."""

    def _step(self) -> list[E]:
        next(self._steps, None)
        self._flush()
        events, self._events = self._events, []
        return events

    def _flush(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        if text:
            self._events.append(self._event(text))
