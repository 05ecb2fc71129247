"""Linear layers whose methods hold what they like: tensors of any layout are cut and placed by their dimensions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightllm import UserError
from lightllm.nn.layers import Dim, Inputs, Linear, Make, Outputs, Parts, ShapeError, Shard
from lightllm.nn.weights import count_parameters, load_weights
from lightllm_builtin.linear.dense import Dense

INPUTS = 16
OUTS = (8, 4, 12)

Held = Mapping[str, tuple[tuple[Dim, ...], torch.dtype]]


class Holding:
    """Holds ``parameters`` and multiplies by nothing."""

    def __init__(self, parameters: Held, optional: Collection[str] = ()) -> None:
        self.parameters, self.optional = parameters, optional
        self.finished: list[dict[str, Tensor | None]] = []

    def create(self, layer: Linear) -> None:
        for name, (dims, dtype) in self.parameters.items():
            layer.hold(name, *dims, dtype=dtype, optional=name in self.optional)

    def finish(self, layer: Linear) -> None:
        self.finished.append({name: getattr(layer, name) for name in self.parameters})

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        raise NotImplementedError


def make(method: Callable[[], Any], shard: Shard | None = None) -> Make:
    return Make(dtype=torch.float32, device="cpu", linear_method=method, shard=shard)


def layer(shard: Shard | None = None, outs: tuple[int, ...] = OUTS, split: Any = None, **held: Any) -> Linear:
    made = make(lambda: Holding(held), shard).linear(INPUTS, outs, split=split)
    made.create(tuple(f"m.{part}" for part in "abc"[: len(outs)]))
    return made


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All different."""
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype)


def parts(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [1000 * i + numbers(*shape, dtype=dtype) for i, shape in enumerate(shapes)]


def load(made: Linear, name: str, tensors: list[Tensor]) -> Tensor:
    for part, tensor in enumerate(tensors):
        made.load(name, tensor, part)
    return made.get_parameter(name).data


def test_parts_are_placed_along_the_outputs_wherever_these_run() -> None:
    made = layer(w=((Outputs(), Inputs()), torch.float32), t=((Inputs(2), Outputs()), torch.int32))
    tensors = parts(*((out, INPUTS) for out in OUTS))
    assert torch.equal(load(made, "w", tensors), torch.cat(tensors))
    tensors = parts(*((INPUTS // 2, out) for out in OUTS), dtype=torch.int32)
    assert torch.equal(load(made, "t", tensors), torch.cat(tensors, 1))


def test_outputs_that_do_not_fill_a_word_have_one_of_their_own() -> None:
    made = layer(outs=(5, 8, 1), z=((3, Outputs(8)), torch.int32))
    tensors = parts((3, 1), (3, 1), (3, 1), dtype=torch.int32)
    assert torch.equal(load(made, "z", tensors), torch.cat(tensors, 1))


def test_a_dimension_of_parts_may_be_absent_from_the_tensors() -> None:
    """As scales of FP8 come: one a part, with one dimension or none."""
    made = layer(
        weight=((Outputs(), Inputs()), torch.float8_e4m3fn),
        weight_scale=((Parts(),), torch.float32),
        order=((Parts(), Inputs()), torch.int64),
        shape=((Parts(), 2), torch.int64),
        channel=((Outputs(), 1), torch.float32),
    )
    weights = [t.to(torch.float8_e4m3fn) for t in parts(*((out, INPUTS) for out in OUTS))]
    assert torch.equal(load(made, "weight", weights).float(), torch.cat([t.float() for t in weights]))
    scales = [torch.tensor(1.5), torch.tensor([2.5]), torch.tensor(3.5)]
    assert load(made, "weight_scale", scales).tolist() == [1.5, 2.5, 3.5]
    orders = parts((INPUTS,), (INPUTS,), (INPUTS,), dtype=torch.int64)
    assert torch.equal(load(made, "order", orders), torch.stack(orders))
    assert load(made, "shape", parts((2,), (2,), (2,))).tolist() == [[1, 2], [1001, 1002], [2001, 2002]]
    channels = parts(*((out, 1) for out in OUTS))
    assert torch.equal(load(made, "channel", channels), torch.cat(channels))


def test_ranks_that_share_the_outputs_have_their_slice_of_each_part() -> None:
    held = {
        "t": ((Inputs(2), Outputs()), torch.float32),
        "z": ((3, Outputs(2)), torch.float32),
        "s": ((Parts(),), torch.float32),
    }
    for rank in range(2):
        made = layer(Shard(rank, 2), split="columns", **held)
        tensors = parts(*((INPUTS // 2, out) for out in OUTS))
        assert torch.equal(load(made, "t", tensors), torch.cat([t.chunk(2, 1)[rank] for t in tensors], 1))
        tensors = parts(*((3, out // 2) for out in OUTS))
        assert torch.equal(load(made, "z", tensors), torch.cat([t.chunk(2, 1)[rank] for t in tensors], 1))
        assert load(made, "s", parts((1,), (1,), (1,))).tolist() == [1, 1001, 2001]


def test_ranks_that_share_the_inputs_have_a_slice_of_what_runs_along_them() -> None:
    held = {
        "t": ((Inputs(4), Outputs()), torch.float32),
        "g": ((Inputs(),), torch.float32),
        "z": ((3, Outputs()), torch.float32),
    }
    for rank in range(2):
        made = layer(Shard(rank, 2), outs=(6,), split="rows", **held)
        for name, tensor, dim in (("t", numbers(4, 6), 0), ("g", numbers(INPUTS), 0), ("z", numbers(3, 6), None)):
            made.load(name, tensor, None)
            expected = tensor if dim is None else tensor.chunk(2, dim)[rank]
            assert torch.equal(made.get_parameter(name), expected)


@pytest.mark.parametrize(("split", "dim"), [("columns", Outputs(4)), ("rows", Inputs(16))])
def test_ranks_do_not_cut_through_what_is_held_together(split: str, dim: Dim) -> None:
    layer(split=split, z=((dim,), torch.int32))
    reason = (
        r"^m\.a, m\.b, m\.c: 2 tensor-parallel ranks get \[.*\] (outputs|inputs) each, but z holds \d+ \w+ together$"
    )
    with pytest.raises(UserError, match=reason):
        layer(Shard(0, 2), split=split, z=((dim,), torch.int32))


@pytest.mark.parametrize("shape", [(INPUTS, 8), (8, INPUTS, 1), (8,), (1, INPUTS), (8, 1)])
def test_a_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    made = layer(w=((Outputs(), Inputs()), torch.float32))
    with pytest.raises(ShapeError, match=r"the model expects \[8, 16\]"):
        made.load("w", torch.zeros(shape), 0)


class Source:
    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = named

    def nbytes(self) -> int:
        return 1

    def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        yield from self.named.items()


class Model(nn.Module):
    weights: ClassVar[Mapping[str, tuple[str, ...]]] = {"ab": ("a", "b")}

    def __init__(self, make: Make, tied: bool = False) -> None:
        super().__init__()
        self.embed = make.embedding(10, 4)
        self.block = nn.Module()
        self.block.ab = make.linear(4, (2, 3), bias=True)
        self.head = make.head(self.embed, tied=tied)


def held() -> Holding:
    dims = (Outputs(), Inputs()), torch.float32
    return Holding({"weight": dims, "more": dims}, optional=("more",))


TENSORS = {
    "block.a.weight": numbers(2, 4),
    "block.a.bias": numbers(2),
    "block.b.weight": numbers(3, 4),
    "block.b.bias": numbers(3),
    "embed.weight": numbers(10, 4),
    "head.weight": numbers(10, 4),
}


def test_a_method_is_told_which_layer_it_is() -> None:
    model = Model(make(held))
    load_weights(model, Source(TENSORS))
    assert (model.block.ab.names, model.block.ab.head) == (("block.a", "block.b"), False)
    assert (model.head.names, model.head.head, model.head.tied) == (("head",), True, False)
    assert Model(make(held), tied=True).head.tied


def test_an_optional_tensor_may_be_missing_from_all_parts() -> None:
    model = Model(make(held))
    more = {"block.a.more": numbers(2, 4), "block.b.more": numbers(3, 4)}
    load_weights(model, Source(TENSORS | more))
    (finished,), (head,) = model.block.ab.method.finished, model.head.method.finished
    assert finished["more"] is not None and torch.equal(finished["more"], torch.cat(list(more.values())))
    assert head["more"] is None and "more" not in dict(model.head.named_parameters())
    del more["block.a.more"]
    with pytest.raises(UserError, match=r"it lacks 1 tensor \(block\.a\.more\)$"):
        load_weights(Model(make(held)), Source(TENSORS | more))


def test_parameters_are_counted_as_the_model_has_them_and_not_as_they_are_held() -> None:
    def words() -> Holding:
        return Holding({"weight": ((Outputs(), Inputs()), torch.float32), "words": ((Outputs(8),), torch.int32)})

    for method in (words, held):
        assert count_parameters(Model(make(method))) == 10 * 4 + (5 * 4 + 5) + 10 * 4
        assert count_parameters(Model(make(method), tied=True)) == 10 * 4 + (5 * 4 + 5)


def test_a_bias_of_zeros_that_the_model_does_not_know_is_skipped() -> None:
    info: Any = None
    model = Model(make(lambda: Dense(info)))
    load_weights(model, Source(TENSORS | {"head.bias": torch.zeros(10)}))
    with pytest.raises(UserError, match=r"it has 1 tensor \(head\.bias\) that the model does not know"):
        load_weights(Model(make(lambda: Dense(info))), Source(TENSORS | {"head.bias": torch.ones(10)}))
