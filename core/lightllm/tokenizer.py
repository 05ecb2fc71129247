"""Text to token ids and back. Knows no model and no HTTP; everything here is linear in the text.

`IncrementalDecoder` never emits half a character and `StopStrings` never any part of a stop string: both give the
same text however the tokens are cut into pushes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

MAX_TOKEN_ID = 2**32 - 1


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a server needs of it. Special tokens are added as its post-processor says."""

    def __init__(self, raw: RawTokenizer, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        raw.no_truncation()
        raw.no_padding()
        self.raw = raw
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_id = raw.token_to_id(bos_token) if bos_token else None
        self.eos_id = raw.token_to_id(eos_token) if eos_token else None
        added = raw.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size: int = raw.get_vocab_size(with_added_tokens=True)
        self._added = {id: token.content for id, token in added.items()}
        self.alphabet = _Alphabet(raw.decoder)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Lets other threads run meanwhile, so that long texts may be encoded in one of their own."""
        # encode() would hold the interpreter lock throughout; the batch form gives it back
        ids: list[int] = self.raw.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids that are no token decode to nothing."""
        text: str = self.raw.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for, special tokens included; it may be a part of a character."""
        known = self._bytes.get(id)
        if known is None:
            text = self._added.get(id)
            known = text.encode() if text is not None else self.alphabet.token_bytes(self.raw.id_to_token(id) or "")
            self._bytes[id] = known
        return known

    def token_text(self, id: int) -> str:
        """`token_bytes` as text; what is no whole character shows as U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def decoder(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        return IncrementalDecoder(self, skip_special_tokens=skip_special_tokens)


class _Alphabet:
    """How a tokenizer writes bytes as text, read off its decoder."""

    def __init__(self, decoder: Any) -> None:
        steps = _steps(decoder)
        kinds = [step["type"] for step in steps]
        self.byte_level = "ByteLevel" in kinds
        self.pure_byte_level = set(kinds) <= {"ByteLevel", "Fuse"} and self.byte_level
        self.byte_fallback = "ByteFallback" in kinds
        self._replace: list[tuple[str, str]] = []
        for step in steps:
            if step["type"] == "Replace" and "String" in step.get("pattern", {}):
                self._replace.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Metaspace":
                self._replace.append((step["replacement"], " "))
            elif step["type"] == "BPEDecoder":
                self._replace.append((step["suffix"], " "))

    def fallback_byte(self, token: str) -> int | None:
        """The byte of a byte-fallback token such as <0xE4>."""
        match = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return int(match[1], 16) if match else None

    def token_bytes(self, token: str) -> bytes:
        if self.byte_level:
            return level_bytes(token)
        byte = self.fallback_byte(token)
        if byte is not None:
            return bytes([byte])
        for old, new in self._replace:
            token = token.replace(old, new)
        return token.encode()


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [s for part in step["decoders"] for s in flat(part)] if step["type"] == "Sequence" else [step]

    return flat(state)


def _level_alphabet() -> Mapping[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves, the other bytes for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_LEVEL = _level_alphabet()


def level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. One that uses any other character is meant literally, as the decoder has it."""
    try:
        return bytes([_LEVEL[char] for char in token])
    except KeyError:
        return token.encode()


# ---------------------------------------------------------------------------------------------------------------------


class IncrementalDecoder:
    """Tokens in, text out as soon as it is certain. All pushes and `close` joined are ``decode(all ids)``.

    One exception: of a run of byte-fallback tokens that is not UTF-8 as a whole, ``decode`` replaces every byte. Here
    its whole characters are out before that can be known, and only its bad bytes are replaced. At most one unfinished
    character is held back (three bytes), also when the model goes on with invalid bytes for ever.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._level: dict[int, bytes] = {}
        self._pure = tokenizer.alphabet.pure_byte_level
        self._partial = bytearray()  # byte-fallback tokens so far: the beginning of one character
        self._context: list[int] = []  # tokens whose text is out, for the next one's spacing to be right
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        if self._pure:
            return self._utf8.decode(b"".join([self._level_bytes(id) for id in ids]))
        out: list[str] = []
        alphabet, raw = self._tokenizer.alphabet, self._tokenizer.raw
        for id in ids:
            token = raw.id_to_token(id)
            if id in self._skip or token is None:
                continue
            byte = alphabet.fallback_byte(token) if alphabet.byte_fallback else None
            if byte is None:
                out.append(self._drop_partial())
                self._held.append(id)
            else:
                out.append(self._windowed(final=True))
                out.append(self._byte(byte, id))
        out.append(self._windowed(final=False))
        return "".join(out)

    def close(self) -> str:
        """The rest, with what is no whole character replaced. The decoder is spent afterwards."""
        if self._pure:
            return self._utf8.decode(b"", final=True)
        return self._drop_partial() + self._windowed(final=True)

    def _level_bytes(self, id: int) -> bytes:
        known = self._level.get(id)
        if known is None:
            token = None if id in self._skip else self._tokenizer.raw.id_to_token(id)
            known = self._level[id] = level_bytes(token) if token is not None else b""
        return known

    def _byte(self, byte: int, id: int) -> str:
        """One byte-fallback token: the character it completes, if any."""
        first = not self._context
        self._partial.append(byte)
        text = ""
        while self._partial:
            try:
                text += self._partial.decode()
                self._partial.clear()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                # nothing whole precedes it, or it would have been out already
                text += "\ufffd" * (error.end - error.start)
                del self._partial[: error.end]
        if text and first:
            # the decoder may strip a space at the very start
            self._context = [id]
            text = self._tokenizer.raw.decode([id]) if len(text.encode()) == 1 else text
        return text

    def _drop_partial(self) -> str:
        text = "\ufffd" * len(self._partial)
        self._partial.clear()
        return text

    def _windowed(self, *, final: bool) -> str:
        """The held tokens' text after that of their context."""
        if not self._held:
            return ""
        decode = self._tokenizer.decode
        before = decode(self._context, skip_special_tokens=False) if self._context else ""
        text = decode(self._context + self._held, skip_special_tokens=False)
        if not final and self._tokenizer.alphabet.byte_level and text.endswith("\ufffd") and len(self._held) < 8:
            return ""
        # the last token is context enough, provided it has any text
        last = self._held[-1:]
        self._context = last if decode(last, skip_special_tokens=False) else [*self._context, *self._held][-8:]
        self._held = []
        return text[len(before) :]


class StopStrings:
    """Finds the stop string that is complete first; the longest of those complete at once.

    Text is held back only while it could be the beginning of a stop string, so no part of one is ever emitted.
    ``include``: emit the matched stop string itself. An Aho-Corasick automaton (CACM 18(6), 1975): its depth is at
    all times the length of the longest such beginning.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._include = include
        self._held = ""
        self._state = 0
        self._matched: str | None = None
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fail = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to emit, the stop string that was found or None). After a match there is nothing more."""
        if self._matched is not None:
            return "", self._matched
        state = self._state
        for position, char in enumerate(text, 1):
            state = self._step(state, char)
            stop = self._match[state]
            if stop is not None:
                self._matched = stop
                seen = self._held + text[:position]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(stop)], stop
        self._state = state
        seen = self._held + text
        sure = len(seen) - self._depth[state]
        self._held = seen[sure:]
        return seen[:sure], None

    def close(self) -> str:
        """What was held back, when no stop string came of it."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, char: str) -> int:
        while True:
            following = self._next[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fail[state]

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fail.append(0)
                self._match.append(None)
            state = self._next[state][char]
        self._match[state] = stop

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self._next[state].items():
                self._fail[following] = self._step(self._fail[state], char)
                queue.append(following)
            if self._match[state] is None:
                # a shorter stop string that ends here as well
                self._match[state] = self._match[self._fail[state]]
