"""The scripted model. Its prompt holds two marks, ``... <|script|> the script <|answer|> ...``: what follows the answer
mark follows the script, whoever has written it so far, and then ends.

``script_token_id`` and ``answer_token_id`` of config.json are the marks; the last of each count.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightllm import ModelInfo
from lightllm.nn.batch import Batch
from lightllm.nn.layers import Make

SURE = 30.0
"""The logit of what the script says. All others have 0 to 1, so that at temperature 1 too nothing else is drawn."""

SIZE = 8


class Scripted(nn.Module):
    """`lightllm.Model`. Where the script's token is ruled out, the lowest id left is the likeliest."""

    weights: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, info: ModelInfo, make: Make) -> None:
        super().__init__()
        self.vocab_size: int = info.config["vocab_size"]
        self.script, self.answer = info.config["script_token_id"], info.config["answer_token_id"]
        self.end = info.eos_token_ids()[0]
        self.embed = make.embedding(self.vocab_size, SIZE)
        self.attention = make.attention(1, 1, SIZE)
        self.memory = torch.zeros(0, dtype=torch.int64, device=make.device)  # the token in each of the pool's slots

    def forward(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """The hidden state of a token is the id of the next; only the last of each sequence is worked out."""
        x = self.embed(tokens).unsqueeze(1)
        self.attention(x, x, x, batch)  # the pool is used as by any model; what comes of it is not needed
        lacking = int(batch.slots.max()) + 1 - len(self.memory)
        if lacking > 0:
            self.memory = F.pad(self.memory, (0, lacking + len(self.memory)))
        self.memory[batch.slots] = tokens
        hidden = torch.full_like(tokens, self.end).unsqueeze(1)
        for end, table in zip(accumulate(batch.query_lengths), batch.tables, strict=True):
            hidden[end - 1] = self.next_token(self.memory[table].tolist())
        return hidden

    def next_token(self, text: list[int]) -> int:
        """``text``: a sequence's tokens so far."""
        if self.answer not in text:
            return self.end
        answer = _last(text, self.answer)
        script = text[_last(text[:answer], self.script) + 1 : answer] if self.script in text[:answer] else []
        written = len(text) - answer - 1
        return script[written] if written < len(script) else self.end

    def logits(self, hidden: Tensor) -> Tensor:
        others = torch.linspace(1, 0, self.vocab_size, device=hidden.device)
        return others.repeat(len(hidden), 1).scatter_(1, hidden, SURE)


def _last(text: list[int], token: int) -> int:
    return len(text) - 1 - text[::-1].index(token)
