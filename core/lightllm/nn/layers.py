"""The layers model plugins are made of, and `Make`, which binds dtype, device, shard and quantization to them.

A model names its sizes as in config.json; what a rank holds of them is decided here, so that tensor parallelism is
no model's business. Checkpoint tensors arrive through ``load(name, tensor, part)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightllm.interfaces import AttentionSpec, LinearMethod, ModelInfo, Operators
from lightllm.nn.operators import TorchOperators
from lightllm.nn.rope import Rope

if TYPE_CHECKING:
    from lightllm.nn.batch import Batch

Split = Literal["columns", "rows"]


@dataclass(frozen=True)
class Shard:
    """This process's place among the tensor-parallel ranks."""

    rank: int = 0
    size: int = 1

    def share(self, total: int, what: str) -> int:
        if total % self.size:
            raise ValueError(f"{what} ({total}) does not divide by {self.size} tensor-parallel ranks")
        return total // self.size

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's equal part of a full tensor."""
        if self.size == 1:
            return tensor
        step = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * step, step)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x


class ShapeError(ValueError):
    """A checkpoint tensor that does not fit its parameter."""

    def __init__(self, expected: Sequence[int], found: Sequence[int]) -> None:
        super().__init__(f"has shape {list(found)}, the model expects {list(expected)}")


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy, converting dtype and device, refusing another shape."""
    if parameter.shape != tensor.shape:
        raise ShapeError(parameter.shape, tensor.shape)
    parameter.copy_(tensor)


class Linear(nn.Module):
    """y = x W^T + b, the weight held as a `LinearMethod` likes.

    ``outs``: full sizes of the parts packed along the output (one for a plain layer). ``split`` "columns": each rank
    holds a slice of every part's outputs; "rows": a slice of the inputs, and the results are summed over the ranks.
    ``head``: it gives the logits, which suffer most from rounded weights.
    """

    def __init__(
        self,
        inputs: int,
        outs: Sequence[int],
        bias: bool,
        split: Split | None,
        make: Make,
        method: LinearMethod,
        *,
        head: bool = False,
    ) -> None:
        super().__init__()
        self.split, self.shard, self.method, self.head = split, make.shard, method, head
        self.dtype, self.device = make.dtype, make.device
        self.full_inputs, self.full_outs = inputs, tuple(outs)
        self.inputs = self.shard.share(inputs, "input size") if split == "rows" else inputs
        self.outs = [self.shard.share(o, "output size") if split == "columns" else o for o in outs]
        self.outputs = sum(self.outs)
        method.create(self)
        self.bias = make.parameter(self.outputs) if bias else None

    def load(self, name: str, tensor: Tensor, part: int | None) -> None:
        """Copy a checkpoint tensor (full size, unsharded) into part ``part`` of parameter ``name``."""
        parameter = self.get_parameter(name)
        index = part or 0
        full = (self.full_outs[index], self.full_inputs)[: tensor.dim()]
        if tuple(tensor.shape) != full[: parameter.dim()] or tensor.dim() != parameter.dim():
            raise ShapeError(full[: parameter.dim()], tensor.shape)
        if self.split == "columns":
            tensor = self.shard.cut(tensor, 0)
        elif self.split == "rows" and tensor.dim() == 2:
            tensor = self.shard.cut(tensor, 1)
        elif self.split == "rows" and self.shard.rank:
            tensor = torch.zeros_like(tensor)  # the bias is added once: the ranks' results are summed
        copy_into(parameter.narrow(0, sum(self.outs[:index]), self.outs[index]), tensor)

    def finish(self) -> None:
        self.method.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.method.apply(self, x)
        return self.shard.all_reduce(y) if self.split == "rows" else y

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outs}, split={self.split}, method={type(self.method).__name__}"


class Embedding(nn.Module):
    """Token ids [tokens] -> [tokens, hidden]."""

    def __init__(self, vocabulary: int, hidden: int, make: Make) -> None:
        super().__init__()
        self.weight = make.parameter(vocabulary, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32.

    ``offset``: what is multiplied is the checkpoint's weight plus this. The sum is then held, and multiplied, in
    float32, as bfloat16 has no room for what is small beside 1.
    """

    def __init__(self, size: int, eps: float, offset: float, make: Make) -> None:
        super().__init__()
        self.eps, self.offset, self.operators = eps, offset, make.operators
        self.weight = make.parameter(size, dtype=torch.float32 if offset else None)

    def load(self, name: str, tensor: Tensor, part: int | None) -> None:
        copy_into(self.weight, tensor)
        if self.offset:
            self.weight.add_(self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Norm of ``x + residual`` over the last dimension, and that sum: what the next residual connection needs."""
        return self.operators.rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """One layer's attention over the KV pool; the backend comes with the batch."""

    def __init__(self, spec: AttentionSpec, operators: Operators) -> None:
        super().__init__()
        self.spec, self.operators = spec, operators

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]."""
        return batch.attention.attend(self.spec, q, k, v, batch).flatten(1)

    def packed(self, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """qkv [tokens, heads + 2 kv_heads, head_dim], whose queries and keys are yet to be rotated by `Rope`'s numbers
        -> [tokens, heads * head_dim]."""
        fused = getattr(batch.attention, "attend_packed", None)
        if fused is not None:
            y: Tensor = fused(self.spec, qkv, cos_sin, batch)
            return y.flatten(1)
        heads, both = self.spec.heads, self.spec.heads + self.spec.kv_heads
        qk = self.operators.rotate(qkv[:, :both], cos_sin)
        return self(qk[:, :heads], qk[:, heads:], qkv[:, both:], batch)


class Make:
    """Builds layers for one rank. ``attention_layers`` lists the attention layers built so far; ``operators`` are for
    what a model computes between its layers."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        linear_method: Callable[[], LinearMethod],
        shard: Shard | None = None,
        operators: Operators | None = None,
    ) -> None:
        self.operators: Operators = operators or TorchOperators()
        self.dtype, self.device = dtype, torch.device(device)
        self.shard = shard or Shard()
        self.attention_layers: list[AttentionSpec] = []
        self._linear_method = linear_method

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter, to be loaded."""
        return nn.Parameter(torch.empty(shape, dtype=dtype or self.dtype, device=self.device), requires_grad=False)

    def linear(
        self, inputs: int, outputs: int | Sequence[int], *, bias: bool = False, split: Split | None = None
    ) -> Linear:
        """``outputs``: one size, or those of the parts packed into this layer."""
        outs = [outputs] if isinstance(outputs, int) else outputs
        return Linear(inputs, outs, bias, split, self, self._linear_method())

    def head(self, embedding: Embedding, *, tied: bool, bias: bool = False) -> Linear:
        """Hidden states -> logits. ``tied``: by the embedding's own weight."""
        vocabulary, hidden = embedding.weight.shape
        head = Linear(hidden, [vocabulary], bias, None, self, self._linear_method(), head=True)
        if tied:
            head.weight = embedding.weight
        return head

    def embedding(self, vocabulary: int, hidden: int) -> Embedding:
        return Embedding(vocabulary, hidden, self)

    def norm(self, size: int, eps: float, *, offset: float = 0.0) -> RMSNorm:
        """``offset``: added to the checkpoint's weight."""
        return RMSNorm(size, eps, offset, self)

    def rope(self, info: ModelInfo, head_dim: int, **overrides: Any) -> Rope:
        """Rotary embedding as config.json describes it; ``overrides`` replace its parameters."""
        return Rope(info, head_dim, self.device, **overrides)

    def attention(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Attention:
        """The next attention layer; see `AttentionSpec`. ``scale``: head_dim**-0.5 unless given."""
        spec = AttentionSpec(
            layer=len(self.attention_layers),
            heads=self.shard.share(heads, "attention heads"),
            kv_heads=self.shard.share(kv_heads, "key/value heads"),
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            window=window,
            softcap=softcap,
        )
        self.attention_layers.append(spec)
        return Attention(spec, self.operators)
