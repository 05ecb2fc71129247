"""Linear methods against `torch.nn.functional.linear`, through the layers that models are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightllm.checks import Wrong
from lightllm.interfaces import ModelInfo, UserError
from lightllm.nn.layers import Linear, Make, Shard
from lightllm.nn.weights import load_weights
from lightllm.testing.rules import broken, resolve, shown

INPUTS = 64
PARTS = (64, 32, 32)
VOCABULARY = 96
SHAPES = ((INPUTS,), (1, INPUTS), (7, INPUTS), (2, 3, INPUTS), (0, INPUTS))


class _Source:
    """A `lightllm.WeightFormat` that holds these tensors."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = named

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.named.values())

    def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        yield from self.named.items()


class _Model(nn.Module):
    weights: ClassVar[Mapping[str, tuple[str, ...]]] = {"packed": ("a", "b", "c")}

    def __init__(self, make: Make, bias: bool) -> None:
        super().__init__()
        self.plain = make.linear(INPUTS, PARTS[0], bias=bias)
        self.packed = make.linear(INPUTS, PARTS, bias=bias, split="columns")
        self.rows = make.linear(INPUTS, PARTS[0], bias=bias, split="rows")
        self.embed = make.embedding(VOCABULARY, INPUTS)
        self.head = make.head(self.embed, tied=True)
        self.tied = {"head.weight": "embed.weight"}


Pack = Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]]


def _plain(weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    return {"weight": weight}, weight


def check_linear_method(
    method: Any,
    *,
    config: Mapping[str, Any] | None = None,
    pack: Pack = _plain,
    tolerance: float = 1e-4,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Layers held by it give x W^T + b: of one part and of several packed ones, with a bias and without, for any number
    of rows, as a head tied to an embedding, and as the shards of tensor-parallel ranks.

    ``method``: the class, or its record. For one that reads quantized checkpoints, ``config`` is their config.json, and
    ``pack`` makes of a weight [out, in] what such a checkpoint has of it, by name, and what these stand for.
    ``tolerance``: the largest error over the largest magnitude of the right answer.
    """
    info = ModelInfo(path="", architecture="", config=dict(config or {}))
    target = resolve(method)
    check = _Check(lambda: target(info), pack, tolerance, device, getattr(torch, dtype))
    for bias in (False, True):
        check.whole(bias)
        check.shards(bias)


class _Check:
    def __init__(self, method: Any, pack: Pack, tolerance: float, device: str, dtype: torch.dtype) -> None:
        self.method = method
        self.pack = pack
        self.tolerance = tolerance
        self.device = device
        self.dtype = dtype

    def make(self, shard: Shard | None = None) -> Make:
        return Make(dtype=self.dtype, device=self.device, linear_method=self.method, shard=shard)

    def normal(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype).to(self.device)

    @torch.inference_mode()
    def whole(self, bias: bool) -> None:
        model = _Model(self.make(), bias)
        sizes = {"plain": PARTS[0], "rows": PARTS[0], **dict(zip("abc", PARTS, strict=True)), "embed": VOCABULARY}
        packed = {name: self.pack(self.normal(i, out, INPUTS)) for i, (name, out) in enumerate(sizes.items())}
        packed["embed"] = _plain(self.normal(4, VOCABULARY, INPUTS))
        tensors = {f"{name}.{kind}": tensor for name, (held, _) in packed.items() for kind, tensor in held.items()}
        if bias:
            biases = {f"{name}.bias": self.normal(9 + i, out) for i, (name, out) in enumerate(sizes.items())}
            tensors |= {name: tensor for name, tensor in biases.items() if name != "embed.bias"}
        try:
            load_weights(model, _Source({name: tensor.clone() for name, tensor in tensors.items()}))
        except (UserError, Wrong) as error:
            raise broken("create holds what is to be loaded, with layer.hold", f"{error}") from error
        for layer, names in ((model.plain, ["plain"]), (model.packed, [*"abc"]), (model.rows, ["rows"])):
            what = f"a layer of {len(names)} part{'s' if len(names) > 1 else ''}, {'with' if bias else 'without'} bias"
            weight = torch.cat([packed[name][1] for name in names])
            self.compare(layer, weight, torch.cat([tensors[f"{name}.bias"] for name in names]) if bias else None, what)
        self.compare(model.head, tensors["embed.weight"], None, "a head tied to the embedding")
        if not torch.equal(model.embed(torch.arange(VOCABULARY, device=self.device)), tensors["embed.weight"]):
            raise broken("a head tied to an embedding leaves it its weight", "the embedding has changed after finish")

    def compare(self, layer: Linear, weight: Tensor, bias: Tensor | None, what: str) -> None:
        for seed, shape in enumerate(SHAPES):
            x = self.normal(20 + seed, *shape)
            self.same(layer(x), F.linear(x.double(), weight.double(), None if bias is None else bias.double()), x, what)

    def same(self, found: Any, expected: Tensor, x: Tensor, what: str) -> None:
        where = f"{what}; x is {list(x.shape)} {x.dtype}"
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, x.dtype):
            got = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else shown(found)
            raise broken(
                "apply gives [..., layer.outputs] in x's dtype",
                where,
                f"expected: {list(expected.shape)}",
                f"found: {got}",
            )
        if not expected.numel():
            return
        off = ((found.double() - expected).abs().max() / expected.abs().max()).item()
        if not off <= self.tolerance:
            raise broken(
                "apply gives x W^T + b, the bias included",
                where,
                f"off by {off:.3g} of the largest magnitude, tolerance {self.tolerance:.3g}",
                f"expected: {shown(expected.flatten()[:4].tolist())}, ...",
                f"found:    {shown(found.flatten()[:4].tolist())}, ...",
            )

    @torch.inference_mode()
    def shards(self, bias: bool, ranks: int = 2) -> None:
        """What each rank holds, put together without a network."""
        held = [self.pack(self.normal(40 + i, out, INPUTS)) for i, out in enumerate(PARTS)]
        weights = [weight for _, weight in held]
        biases = [self.normal(50 + i, out) for i, out in enumerate(PARTS)]
        x = self.normal(60, 5, INPUTS)
        rows, columns = [], []
        for rank in range(ranks):
            shard = Shard(rank, ranks)
            packed = self.make(shard).linear(INPUTS, PARTS, bias=bias, split="columns")
            summed = self.make(shard).linear(INPUTS, PARTS[0], bias=bias, split="rows")
            try:
                for layer, names in ((packed, ("a", "b", "c")), (summed, ("rows",))):
                    layer.create(names)
                    parts = len(names)
                    for part in range(parts):
                        for name, tensor in held[part][0].items():
                            layer.load(name, tensor, part if parts > 1 else None)
                        if bias:
                            layer.load("bias", biases[part], part if parts > 1 else None)
                    layer.finish()
                columns.append(packed.method.apply(packed, x).split(packed.outs, -1))
                rows.append(summed.method.apply(summed, shard.cut(x, 1).contiguous()))
            except Exception as error:
                raise broken(
                    "a method holds this rank's part: layer.inputs and layer.outs, not the full sizes",
                    f"rank {rank} of {ranks}, {'with' if bias else 'without'} bias",
                    f"it raised {type(error).__name__}: {error}",
                ) from error
        for part, (weight, each) in enumerate(zip(weights, zip(*columns, strict=True), strict=True)):
            expected = F.linear(x.double(), weight.double(), biases[part].double() if bias else None)
            self.same(torch.cat(each, -1), expected, x, f"part {part} of a packed layer that {ranks} ranks share")
        expected = F.linear(x.double(), weights[0].double(), biases[0].double() if bias else None)
        self.same(sum(rows), expected, x, f"a layer whose inputs {ranks} ranks share, summed")
