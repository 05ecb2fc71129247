"""A grammar is put into the library's language, and its matcher into ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightllm.grammar import Fixed, Grammar, GrammarError, Joined, Json, Marker, OneOf, Regex, Repeated
from llguidance import LLMatcher, LLTokenizer, regex_to_lark

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


class ExamplePluginBackend:
    """`lightllm.GrammarBackend`."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.raw = tokenizer
        if tokenizer is None:  # where grammars are only checked: any tokens will do
            self.tokenizer = LLTokenizer("byte")
        else:
            size = max(vocab_size, tokenizer.get_vocab_size())
            self.tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=list(eos_token_ids) or None)

    def compile(self, grammar: Grammar) -> ExamplePluginMatcher:
        source = LLMatcher.grammar_from_lark(f"start: {self._lark(grammar)}")
        matcher = ExamplePluginMatcher(LLMatcher(self.tokenizer, source, log_level=0))
        if matcher.error():
            raise GrammarError(matcher.error())
        return matcher

    def fill(self, matchers: Sequence[ExamplePluginMatcher], masks: torch.Tensor) -> None:
        import torch

        for mask, matcher in zip(masks, matchers, strict=True):
            bits = torch.frombuffer(bytearray(matcher.raw.compute_bitmask()), dtype=torch.int32)
            mask.copy_(bits[: len(mask)])  # a tokenizer may have more tokens than its model

    def _lark(self, grammar: Grammar) -> str:
        match grammar:
            case Fixed(text):
                return json.dumps(text, ensure_ascii=False)
            case Marker(text):
                token = self._special(text)
                return self._lark(Fixed(text)) if token is None else f"<[{token}]>"
            case Json(schema):
                return f"%json {_json(schema)}"
            case Regex(pattern):
                return f"/{regex_to_lark(pattern, 'dw')}/"
            case Joined(parts):
                return f"( {' '.join(map(self._lark, parts))} )"
            case OneOf(options):
                return f"( {' | '.join(map(self._lark, options))} )"
            case Repeated(part, least, most):
                return f"( {self._lark(part)} ){{{least},{'' if most is None else most}}}"
        raise GrammarError(f"the grammar backend example-plugin knows no {type(grammar).__name__}")

    def _special(self, text: str) -> int | None:
        token = None if self.raw is None else self.raw.token_to_id(text)
        return token if token is not None and self.tokenizer.is_special_token(token) else None


def _json(schema: str) -> str:
    """A JSON Schema with what the library has to know besides: JSON comes without whitespace."""
    content = json.loads(schema)
    if not isinstance(content, dict):
        raise GrammarError(f"a JSON Schema must be an object, not {schema}")
    spaces = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    return json.dumps({**content, "x-guidance": spaces})


class ExamplePluginMatcher:
    """`lightllm.GrammarMatcher`."""

    def __init__(self, raw: LLMatcher) -> None:
        self.raw = raw

    def accept(self, token: int) -> bool:
        return bool(self.raw.consume_token(token))

    def forced(self) -> list[int]:
        return list(self.raw.compute_ff_tokens())

    def error(self) -> str:
        return str(self.raw.get_error()) if self.raw.is_error() else ""

    def finished(self) -> bool:
        return bool(self.raw.is_stopped()) and not self.raw.is_error()
