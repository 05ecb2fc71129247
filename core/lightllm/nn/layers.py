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

from lightllm.checks import Wrong
from lightllm.interfaces import AttentionSpec, LinearMethod, ModelInfo, Operators, UserError
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


class DtypeError(ValueError):
    """A checkpoint tensor whose numbers do not mean what its parameter's do."""

    def __init__(self, expected: torch.dtype, found: torch.dtype) -> None:
        super().__init__(f"holds {_short(found)}, the model expects {_short(expected)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint8)
"""Dtypes of numbers that stand for others: converted they would mean something else."""


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy, converting dtype and device, refusing another shape, and to convert from or to `CODES`."""
    if parameter.shape != tensor.shape:
        raise ShapeError(parameter.shape, tensor.shape)
    if parameter.dtype != tensor.dtype and not {parameter.dtype, tensor.dtype}.isdisjoint(CODES):
        raise DtypeError(parameter.dtype, tensor.dtype)
    parameter.copy_(tensor)


@dataclass(frozen=True)
class Outputs:
    """A dimension along a layer's outputs. ``per``: how many share an element, as in a packed word or a block that has
    one scale; what is left over at the end of a part has one of its own."""

    per: int = 1


@dataclass(frozen=True)
class Inputs:
    """A dimension along a layer's inputs; ``per`` as for `Outputs`."""

    per: int = 1


@dataclass(frozen=True)
class Parts:
    """A dimension of one element for each of a layer's parts, whose tensors may come without it."""


Dim = Outputs | Inputs | Parts | int
"""What a dimension of a linear layer's parameter runs along. A number: along nothing, that many elements, of which
every rank has all. There, parts of one layer are loaded into the same place unless another dimension is `Outputs` or
`Parts`."""


class Linear(nn.Module):
    """y = x W^T + b, the weight held as a `LinearMethod` likes.

    ``outs``: full sizes of the parts packed along the output (one for a plain layer). ``split`` "columns": each rank
    holds a slice of every part's outputs; "rows": a slice of the inputs, and the results are summed over the ranks.
    ``tied``: the embedding's weight, if this is a head that shares it.

    Parameters come with `create`, when the model is whole. ``names``: the parts' paths in the model, which are their
    names in the checkpoint. ``head``: whether it gives logits. ``optional``: parameters that may be missing.
    """

    bias: nn.Parameter | None

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
        tied: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.split, self.shard, self.method, self.head = split, make.shard, method, head
        self.dtype, self.device = make.dtype, make.device
        self.full_inputs, self.full_outs = inputs, tuple(outs)
        self.inputs = self.shard.share(inputs, "input size") if split == "rows" else inputs
        self.outs = [self.shard.share(o, "output size") if split == "columns" else o for o in outs]
        self.outputs = sum(self.outs)
        self.names: tuple[str, ...] = ()
        self.optional: set[str] = set()
        self._biased, self._tied = bias, (tied,) if tied is not None else ()  # in a tuple: no parameter of its own yet
        self._dims: dict[str, tuple[Dim, ...]] = {}
        self._came: set[str] = set()
        self.register_parameter("bias", None)

    @property
    def tied(self) -> bool:
        """Whether its weight is the embedding's: a parameter ``weight`` of [outputs, inputs]."""
        return bool(self._tied)

    def count(self) -> int:
        """Weights and biases of its own, whatever holds them."""
        return (0 if self.tied else self.inputs * self.outputs) + (self.outputs if self._biased else 0)

    def create(self, names: tuple[str, ...]) -> None:
        """Make the parameters that are to be loaded. Called once, before any is."""
        self.names = names
        self.method.create(self)
        unknown = [name for name, _ in self.named_parameters(recurse=False) if name not in self._dims]
        if unknown:
            raise self._wrong(f"{', '.join(unknown)} is made without layer.hold")
        if self._tied and self._parameters.get("weight") is not self._tied[0]:
            raise self._wrong("a tied layer holds no weight along outputs and inputs")
        if self._biased:
            self.hold("bias", Outputs())

    def _wrong(self, what: str) -> Wrong:
        return Wrong(f"create of the linear method {type(self.method).__name__} is wrong: {what}")

    def hold(
        self,
        name: str,
        *dims: Dim,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        optional: bool = False,
    ) -> None:
        """For a method's `create`: a parameter to be loaded, uninitialised, of this rank's size; ``dtype`` and
        ``device``: the layer's unless given. Checkpoint tensors of any part are then cut and placed by ``dims``. A tied
        layer's ``weight`` is the embedding's.

        ``optional``: it may be missing from the checkpoint, and is None then; the layer is finished when all has been
        read. Raises UserError if a rank's share would cut through what several inputs or outputs have in common.
        """
        shape = []
        for dim in dims:
            if isinstance(dim, (Outputs, Inputs)):
                split, sizes = ("columns", self.outs) if isinstance(dim, Outputs) else ("rows", [self.inputs])
                if self.split == split and self.shard.size > 1 and any(size % dim.per for size in sizes):
                    what = "outputs" if isinstance(dim, Outputs) else "inputs"
                    raise UserError(
                        f"{', '.join(self.names)}: {self.shard.size} tensor-parallel ranks get {sizes} {what} each, "
                        f"but {name} holds {dim.per} {what} together"
                    )
                shape.append(sum(_cells(size, dim) for size in sizes))
            else:
                shape.append(dim if isinstance(dim, int) else len(self.outs))
        if self._tied and (name, dims) == ("weight", (Outputs(), Inputs())):
            self.register_parameter(name, self._tied[0])
        else:
            empty = torch.empty(shape, dtype=dtype or self.dtype, device=device or self.device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self._dims[name] = dims
        if optional:
            self.optional.add(name)

    def load(self, name: str, tensor: Tensor, part: int | None) -> None:
        """Copy a checkpoint tensor (full size, unsharded) into part ``part`` of parameter ``name``."""
        place: Tensor = self.get_parameter(name)
        dims, index = self._dims[name], part or 0
        expected: list[int] = []
        for axis, dim in enumerate(dims):
            if isinstance(dim, Parts) and tensor.dim() < len(dims):
                tensor = tensor.unsqueeze(axis)
            full = self.full_outs[index] if isinstance(dim, Outputs) else self.full_inputs
            expected.append(dim if isinstance(dim, int) else 1 if isinstance(dim, Parts) else _cells(full, dim))
        if list(tensor.shape) != expected:
            raise ShapeError(expected, tensor.shape)
        for axis, dim in enumerate(dims):
            if isinstance(dim, Parts):
                place = place.narrow(axis, index, 1)
            elif isinstance(dim, Outputs):
                before = sum(_cells(size, dim) for size in self.outs[:index])
                place = place.narrow(axis, before, _cells(self.outs[index], dim))
                tensor = self.shard.cut(tensor, axis) if self.split == "columns" else tensor
            elif isinstance(dim, Inputs) and self.split == "rows":
                tensor = self.shard.cut(tensor, axis)
        if name == "bias" and self.split == "rows" and self.shard.rank:
            tensor = torch.zeros_like(tensor)  # it is added once: the ranks' results are summed
        copy_into(place, tensor)
        self._came.add(name)

    def finish(self) -> None:
        for name in self.optional - self._came:
            self.register_parameter(name, None)
        self.method.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.method.apply(self, x)
        return self.shard.all_reduce(y) if self.split == "rows" else y

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outs}, split={self.split}, method={type(self.method).__name__}"


def _cells(size: int, dim: Outputs | Inputs) -> int:
    return -(-size // dim.per)


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
        shared = embedding.weight if tied else None
        return Linear(hidden, [vocabulary], bias, None, self, self._linear_method(), head=True, tied=shared)

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
