"""Grammars against texts: what a grammar backend lets through, whatever tokens it comes in."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from lightllm.grammar import Fixed, Grammar, Marker, Regex
from lightllm.interfaces import GrammarBackend, GrammarMatcher
from lightllm.testing.checkpoints import byte_tokenizer
from lightllm.testing.rules import broken, shown

if TYPE_CHECKING:
    import torch

WORDS = ('{"', '":', ', "', '"}', "}\n", "</", ": ", "true", "ab", "l>", "天气", '{"name": "')
"""Some that are one token."""

END = "<eos>"

CLOSING = (END, '"', "}", "]", "0", "\n")
"""What ends most things that may go on for ever."""

ROUNDS = 4
"""Times that a way is taken which leads on to the same place again, before another is."""

Backend = Callable[[Any, int, Sequence[int]], GrammarBackend]


@cache
def builtin_backend() -> Backend:
    """llguidance's, which parsers' grammars are tried with."""
    from lightllm.plugins import Plugins

    plugins = Plugins.discover(quiet=True)
    backend: Backend = plugins.load(plugins.find("grammar_backends", "grammar/llguidance"))
    return backend


class TextMatcher:
    """A grammar backend over a byte-level tokenizer with ``special`` and other ``added`` tokens."""

    def __init__(self, backend: Backend | None = None, special: Sequence[str] = (), added: Sequence[str] = ()) -> None:
        self.raw = byte_tokenizer(special=(END, *special), added=added, words=WORDS)
        self.size = self.raw.get_vocab_size()
        self.eos = self.id(END)
        self._names = re.compile(f"({'|'.join(map(re.escape, (END, *special, *added)))})")
        self.backend = (backend or builtin_backend())(self.raw, self.size, [self.eos])
        self.compile = self.backend.compile

    def id(self, text: str) -> int:
        token = self.raw.token_to_id(text)
        assert token is not None
        return token

    def text(self, tokens: Sequence[int]) -> str:
        return self.raw.decode(tokens, skip_special_tokens=False)

    def cuts(self, text: str, *, spelled: bool = False) -> list[list[int]]:
        """The text in the tokenizer's own tokens, and in bytes. ``spelled``: special tokens' names are text, too."""
        if spelled:
            return [list(text.encode())]
        cuts: list[list[int]] = [[], []]
        for i, part in enumerate(self._names.split(text)):
            ways = [[self.id(part)]] * 2 if i % 2 else [self.raw.encode(part).ids, list(part.encode())]
            for cut, way in zip(cuts, ways, strict=True):
                cut += way
        return cuts

    def allowed(self, matcher: GrammarMatcher) -> list[int]:
        """The tokens that may come next."""
        import torch

        masks = torch.zeros(1, -(-self.size // 32), dtype=torch.int32)
        self.backend.fill([matcher], masks)
        return bits(masks[0])

    def follow(self, matcher: GrammarMatcher, tokens: Iterable[int], *, own: bool = True) -> bool:
        """Whether the matcher goes on by all of them. Where only one text can follow, masks may offer nothing but the
        tokenizer's ``own`` cut of it; others can still be accepted."""
        for token in tokens:
            allowed = self.allowed(matcher)
            if token not in allowed and (own or matcher.forced()[:1] != allowed):
                return False
            if not matcher.accept(token):
                return False
        return True

    def fits(self, grammar: Grammar, text: str, *, spelled: bool = False) -> bool:
        """Whether the text is a whole answer; the same in all its cuts."""
        found = []
        for i, tokens in enumerate(self.cuts(text, spelled=spelled)):
            matcher = self.compile(grammar)
            going = self.follow(matcher, tokens, own=i == 0 and not spelled)
            found.append(going and (matcher.finished() or self.eos in self.allowed(matcher)))
        if len(set(found)) > 1:
            raise broken(
                "a text fits or not, whatever tokens it comes in", f"grammar: {shown(grammar)}", f"text: {text!r}"
            )
        return found[0]

    def walk(self, grammar: Grammar, draw: random.Random, *, hints: Sequence[str] = (), longest: int = 150) -> str:
        """A text that the grammar allows. Of the choices some follow a hint as far as it leads, some hasten the end."""
        haste = draw.choice([0.1, 0.3, 0.6])
        matcher = self.compile(grammar)
        closing = [self.cuts(text)[0] for text in (*CLOSING, *literals(grammar))]
        tried: Counter[tuple[tuple[int, ...], int]] = Counter()
        tokens: list[int] = []
        allowed = self.allowed(matcher)
        while not matcher.finished():
            here = tuple(allowed)
            if not here or len(tokens) >= 3 * longest:
                raise broken(
                    "wherever a grammar leads, the texts and characters it names lead to its end",
                    f"grammar: {shown(grammar)}",
                    f"no end of: {shown(self.text(tokens))}",
                    "a pattern takes all it can: what follows it must begin with something else",
                    *filter(None, [matcher.error()]),
                )
            number = None
            if len(tokens) > longest or draw.random() < haste:
                # the last: what has come least; of two ways one may go round again
                ways = [*(way for way in closing if way[0] in allowed), [min(allowed, key=tokens.count)]]
                number = min(range(len(ways)), key=lambda i: tried[here, i] // ROUNDS)
                way = ways[number]
            else:
                way = self.cuts(draw.choice(hints))[0] if hints and draw.random() < 0.4 else [draw.choice(allowed)]
            if way == [self.eos]:
                break
            for token in way:
                if token not in allowed:
                    break
                if not matcher.accept(token):
                    raise broken("accept takes a token that the mask allows", f"grammar: {shown(grammar)}")
                tokens.append(token)
                allowed = self.allowed(matcher)
            if number is not None:
                tried[here, number] += 1 if tuple(allowed) != here else ROUNDS
        return self.text(tokens)


def bits(mask: torch.Tensor) -> list[int]:
    """The tokens of a mask [words] int32."""
    import torch

    return ((mask[:, None] >> torch.arange(32)) & 1).flatten().nonzero().flatten().tolist()


def nodes(grammar: Any) -> Iterator[Any]:
    """It and all its parts."""
    if isinstance(grammar, tuple):
        for part in grammar:
            yield from nodes(part)
    elif isinstance(grammar, msgspec.Struct):
        yield grammar
        for name in grammar.__struct_fields__:
            yield from nodes(getattr(grammar, name))


def markers(grammar: Any) -> Iterator[str]:
    """The names of its special tokens."""
    return (node.text for node in nodes(grammar) if isinstance(node, Marker))


def literals(grammar: Any) -> list[str]:
    """Its fixed texts, and the characters of its patterns, which are literal or do no harm."""
    texts = [node.text for node in nodes(grammar) if isinstance(node, Fixed)]
    characters = [character for node in nodes(grammar) if isinstance(node, Regex) for character in node.pattern]
    return list(dict.fromkeys(filter(None, (*texts, *characters))))


def matchers_for(grammar: Grammar) -> dict[str, TextMatcher]:
    """The built-in backend over tokenizers of every kind: what the grammar's markers are there -> it."""
    names = tuple(dict.fromkeys(markers(grammar)))
    return {"special tokens": _matcher(names, ()), "added tokens": _matcher((), names), "text": _matcher((), ())}


@cache
def _matcher(special: tuple[str, ...], added: tuple[str, ...]) -> TextMatcher:
    return TextMatcher(special=special, added=added)
