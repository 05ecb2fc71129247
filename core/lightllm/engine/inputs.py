"""What a step is given, from a plan's Python lists to numbers on the device, and what stays there between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightllm.engine.scheduler import Item
from lightllm.interfaces import AttentionBackend
from lightllm.nn.batch import Batch, zeros
from lightllm.nn.transfer import send

UNKNOWN = -1
"""Stands for a token that the step before chooses: it is on the device when it is needed."""


@dataclass
class Inputs:
    """A step in numbers. Of every new token: itself, its position, the pool slot for its key and value, and its
    sequence's row; of every sequence: row and length; of every sequence that gets a token: which of the new tokens is
    its last, and its row."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    sampled_rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, items: Sequence[Item]) -> Inputs:
        new = cls()
        for item in items:
            seq, end = item.seq, item.start + item.count
            new.tokens += seq.tokens(item.start, end)
            new.positions += range(item.start, end)
            new.tokens += [UNKNOWN] * (len(new.positions) - len(new.tokens))
            new.slots += seq.slots[item.start : end]
            new.owners += [seq.row] * item.count
            new.rows.append(seq.row)
            new.lengths.append(end)
            new.counts.append(item.count)
            if item.samples:
                new.ends.append(len(new.tokens) - 1)
                new.sampled_rows.append(seq.row)
        return new

    @property
    def decodes(self) -> bool:
        """Whether every sequence brings one token and gets one."""
        return len(self.ends) == len(self.tokens) == len(self.rows)

    def padded(self, size: int, kept: Rows) -> Inputs:
        """Decodes, made ``size`` by such as change nothing."""
        more, row = size - len(self.tokens), kept.spare
        return Inputs(
            tokens=self.tokens + [0] * more,
            positions=self.positions + [0] * more,
            slots=self.slots + [kept.spare_slot] * more,
            owners=self.owners + [row] * more,
            rows=self.rows + [row] * more,
            lengths=self.lengths + [1] * more,
            ends=list(range(size)),
            sampled_rows=self.sampled_rows + [row] * more,
            counts=[1] * size,
        )

    def send(self, device: torch.device) -> Tensor:
        """All in one [numbers] int64, for `Numbers`."""
        together = [*self.tokens, *self.positions, *self.slots, *self.owners, *self.rows, *self.lengths]
        return send([*together, *self.ends, *self.sampled_rows], torch.int64, device)


class Numbers:
    """The tensors of `Inputs`: views of ``flat``."""

    def __init__(self, flat: Tensor, inputs: Inputs) -> None:
        tokens, sequences, sampled = len(inputs.tokens), len(inputs.rows), len(inputs.ends)
        parts = flat.split([tokens] * 4 + [sequences] * 2 + [sampled] * 2)
        self.tokens, self.positions, self.slots, self.owners, self.rows, self.lengths, self.ends, self.sampled = parts


class Rows:
    """What is kept on the device for every running sequence, in the row that the scheduler gave it: its slots, its
    tokens as far as they were computed, and the token it was given last. One more row is there for padding."""

    def __init__(self, rows: int, positions: int, spare_slot: int, device: torch.device) -> None:
        self.spare, self.spare_slot = rows, spare_slot
        self.table = zeros((rows + 1, positions), torch.int32, device)
        self.table[self.spare, 0] = spare_slot
        self.tokens = zeros((rows + 1, positions), torch.int32, device)
        self.last = zeros((rows + 1,), torch.int64, device)
        self._device = device
        self._written: list[tuple[list[int], int]] = [([], 0)] * rows  # the list of slots that was written, up to where

    def prepare(self, items: Sequence[Item]) -> None:
        """Write the tokens before this step's, and their slots, that are not there yet: those found in the prefix
        cache."""
        for item in items:
            slots, row = item.seq.slots, item.seq.row
            known, end = self._written[row]
            start = end if known is slots else 0
            if start < item.start:
                found = [*slots[start : item.start], *item.seq.tokens(start, item.start)]
                self.table[row, start : item.start], self.tokens[row, start : item.start] = send(
                    found, torch.int32, self._device
                ).view(2, -1)
            self._written[row] = slots, item.start + item.count

    def batch(self, inputs: Inputs, numbers: Numbers, attention: AttentionBackend) -> tuple[Tensor, Batch]:
        """The step's tokens and the rest of it; tokens and slots are written here. Can be captured."""
        tokens = torch.where(numbers.tokens == UNKNOWN, self.last[numbers.owners], numbers.tokens)
        self.table.index_put_((numbers.owners, numbers.positions), numbers.slots.int())
        self.tokens.index_put_((numbers.owners, numbers.positions), tokens.int())
        batch = Batch(
            slots=numbers.slots,
            table=self.table,
            query_lengths=inputs.counts,
            context_lengths=inputs.lengths,
            rows=inputs.rows,
            device_context_lengths=numbers.lengths,
            device_rows=numbers.rows,
            attention=attention,
        )
        batch.plan = attention.plan(batch)
        return tokens, batch
