"""`lightllm.GrammarBackend` over llguidance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from lightllm.grammar import Grammar, GrammarError
from lightllm_builtin.grammar.lark import Lark, has_schema, modest

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


_PLACE = re.compile(r"at \d+\(\d+\): (failed to compile JSON schema: )?")
"""Where it is in the text that `Lark` made: nothing the client has seen."""


def _limits(initial: int, step: int, items: int) -> LLParserLimits:
    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=initial,
        step_lexer_fuel=step,
        step_max_items=items,
        max_lexer_states=20_000,
        verbose_errors=False,
    )


SCHEMA_LIMITS = _limits(1_000_000, 20_000, 5_000)
RULES_LIMITS = _limits(200_000, 5_000, 2_000)
"""Of grammars without a JSON Schema. With less, the worst of them take 30 ms for a mask, not 300; with more, schemas of
256 kB can be compiled."""


class Llguidance:
    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._raw = tokenizer
        if tokenizer is None:
            self._tokenizer = LLTokenizer("byte")
        else:
            size = max(vocab_size, tokenizer.get_vocab_size())
            self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=list(eos_token_ids) or None)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()] if tokenizer else []
        self._specials = re.compile("|".join(map(re.escape, added))) if added else None
        self._executor = LLExecutor()

    def compile(self, grammar: Grammar) -> Matcher:
        lark = Lark(grammar, self._special)
        limits = SCHEMA_LIMITS if has_schema(grammar) else RULES_LIMITS
        # text that looks like a special token would be forced as that token
        forcible = modest(grammar) and not (self._specials and self._specials.search(lark.body))
        reason = ""
        for forcing in (True, False) if forcible else (False,):
            # always anew: copies of a matcher share a lexer, and what one of them has used up the others lack
            matcher = Matcher(LLMatcher(self._tokenizer, lark.source(forcing=forcing), log_level=0, limits=limits))
            reason = matcher.error()
            if not reason and self._raw is None:
                reason = _trial(Matcher(matcher.raw.deep_copy()))
            if not reason:
                return matcher
        raise GrammarError(reason)

    def fill(self, matchers: Sequence[Matcher], masks: torch.Tensor) -> None:
        words = -(-self._tokenizer.vocab_size // 32)
        own = masks if masks.shape[1] == words else masks.new_empty(len(matchers), words)
        pairs = [(matcher.raw, i) for i, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(pairs, own.data_ptr(), 4 * words, len(pairs))
        if own is not masks:  # the tokenizer has more tokens than the model
            masks.copy_(own[:, : masks.shape[1]])

    def _special(self, text: str) -> int | None:
        token = self._raw.token_to_id(text) if self._raw is not None else None
        return token if token is not None and self._tokenizer.is_special_token(token) else None


TRIAL = 32
"""Steps of a random walk through a grammar that is checked."""


def _trial(matcher: Matcher) -> str:
    """What is wrong with a grammar that can be compiled but not followed: some become too costly on the way."""
    random = Random(0)
    for _ in range(TRIAL):
        mask = int.from_bytes(matcher.raw.compute_bitmask(), "little")
        tokens = [token for token in range(mask.bit_length()) if mask >> token & 1]
        if not tokens or not matcher.accept(random.choice(tokens)) or matcher.finished():
            break
    return matcher.error()


class Matcher:
    """`lightllm.GrammarMatcher`."""

    def __init__(self, raw: LLMatcher) -> None:
        self.raw = raw

    def accept(self, token: int) -> bool:
        return self.raw.consume_token(token)

    def forced(self) -> list[int]:
        return self.raw.compute_ff_tokens()

    def error(self) -> str:
        if not self.raw.is_error():
            return ""
        first, *more = _PLACE.sub("", self.raw.get_error()).splitlines()
        if first.startswith("NoExtension"):
            return "nothing can match it"
        # of a regular expression, which is shown in between
        cause = next((line for line in more if line.startswith("error: ")), "")
        return re.sub(r"( \(in regex\))?:? ?regex parse error:$", "", first) + cause.replace("error", "", 1)

    def finished(self) -> bool:
        return self.raw.is_stopped() and not self.raw.is_error()
