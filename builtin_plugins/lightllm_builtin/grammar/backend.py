"""`lightllm.GrammarBackend` over llguidance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from lightllm.grammar import Grammar, GrammarError
from lightllm_builtin.grammar.lark import written

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


_PLACE = re.compile(r"at \d+\(\d+\): (failed to compile JSON schema: )?")
"""Where it is in the text that `written` made: nothing the client has seen."""


class Llguidance:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._size = max(vocab_size, tokenizer.get_vocab_size())
        self._raw = tokenizer
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=self._size, eos_token=list(eos_token_ids) or None)
        self._limits = LLParserLimits(verbose_errors=False)
        self._executor = LLExecutor()

    def compile(self, grammar: Grammar) -> Matcher:
        matcher = Matcher(LLMatcher(self._tokenizer, written(grammar, self._special), log_level=0, limits=self._limits))
        if not matcher.error():
            matcher.raw.compute_bitmask()  # some are found too costly only now
        if reason := matcher.error():
            raise GrammarError(reason)
        return matcher

    def fill(self, matchers: Sequence[Matcher], masks: torch.Tensor) -> None:
        words = -(-self._size // 32)
        own = masks if masks.shape[1] == words else masks.new_empty(len(matchers), words)
        pairs = [(matcher.raw, i) for i, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(pairs, own.data_ptr(), 4 * words, len(pairs))
        if own is not masks:  # the tokenizer has more tokens than the model
            masks.copy_(own[:, : masks.shape[1]])

    def _special(self, text: str) -> int | None:
        token = self._raw.token_to_id(text)
        return token if token is not None and self._tokenizer.is_special_token(token) else None


class Matcher:
    """`lightllm.GrammarMatcher`."""

    def __init__(self, raw: LLMatcher) -> None:
        self.raw = raw

    def fork(self) -> Matcher:
        return Matcher(self.raw.deep_copy())

    def accept(self, token: int) -> bool:
        return self.raw.consume_token(token)

    def error(self) -> str:
        return _PLACE.sub("", self.raw.get_error().partition("\n")[0]) if self.raw.is_error() else ""

    def finished(self) -> bool:
        return self.raw.is_stopped()
