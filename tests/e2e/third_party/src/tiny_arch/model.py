from typing import ClassVar

import torch
from torch import nn


class Tiny(nn.Module):
    weights: ClassVar = {}

    def __init__(self, info, make):
        super().__init__()
        size, hidden = info.config["vocab_size"], info.config["hidden_size"]
        self.embed = make.embedding(size, hidden)
        self.q = make.linear(hidden, hidden)
        self.attention = make.attention(1, 1, hidden)
        self.head = make.linear(hidden, size)

    def forward(self, tokens, positions, batch):
        x = self.embed(tokens)
        q = self.q(x).unsqueeze(1)
        seen = self.attention(q, q, q, batch)  # the pool is used as any model would; its answer weighs nothing here
        return x + 0.0 * seen

    def logits(self, hidden):
        return self.head(hidden)


def checkpoint(size):
    """Weights with which token i is followed by i + 1, and the last by itself."""
    successor = torch.zeros(size, size)
    for i in range(size):
        successor[min(i + 1, size - 1), i] = 10.0
    return {"embed.weight": torch.eye(size), "q.weight": torch.zeros(size, size), "head.weight": successor}
