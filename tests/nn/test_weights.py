"""The loader: names out of the model itself, packed layers, ties, and every fault named at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightllm import UserError
from lightllm.nn.weights import load_weights


class Source:
    """`lightllm.WeightFormat` over tensors in memory."""

    def __init__(self, *tensors: tuple[str, Tensor]) -> None:
        self.pairs = tensors
        self.expected: set[str] = set()

    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.pairs)

    def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        self.expected = set(expected)
        yield from self.pairs


class Packed(nn.Module):
    """Two parts of two rows each, and what has happened to them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self.log: list[str] = []

    def load(self, name: str, tensor: Tensor, part: int | None) -> None:
        assert name == "weight" and part is not None
        self.weight[2 * part : 2 * part + 2].copy_(tensor)
        self.log.append(f"part {part}")

    def finish(self) -> None:
        self.log.append("finish")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = Packed()
        self.norm = nn.LayerNorm(3)


class Tiny(nn.Module):
    """Plain modules, a packed one, and a parameter of the model's own."""

    weights: ClassVar[Mapping[str, tuple[str, ...]]] = {"gate_up": ("gate", "up")}
    ignored: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.zeros(3))


def complete() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {"scale": torch.randn(3)}
    for i in range(2):
        tensors |= {f"layers.{i}.{part}.weight": torch.randn(2, 3) for part in ("gate", "up")}
        tensors |= {f"layers.{i}.norm.{name}": torch.randn(3) for name in ("weight", "bias")}
    return tensors


def test_every_parameter_gets_its_tensor_whatever_their_order() -> None:
    tensors = complete()
    model, source = Tiny(), Source(*reversed(tensors.items()))
    load_weights(model, source)
    assert source.expected == set(tensors)
    assert torch.equal(model.scale, tensors["scale"])
    for i, block in enumerate(model.layers):
        packed = torch.cat([tensors[f"layers.{i}.gate.weight"], tensors[f"layers.{i}.up.weight"]])
        assert torch.equal(block.gate_up.weight, packed)
        assert torch.equal(block.norm.bias, tensors[f"layers.{i}.norm.bias"])


def test_a_module_is_finished_when_its_last_part_has_come_and_before_the_next_tensor() -> None:
    tensors = complete()
    model = Tiny()
    first = model.layers[0].gate_up

    class Watched(Source):
        def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, Tensor]]:
            yield "layers.0.up.weight", tensors.pop("layers.0.up.weight")
            assert first.log == ["part 1"]
            yield "layers.0.gate.weight", tensors.pop("layers.0.gate.weight")
            assert first.log == ["part 1", "part 0", "finish"]
            yield from tensors.items()

    load_weights(model, Watched())
    assert first.log == ["part 1", "part 0", "finish"]
    assert model.layers[1].gate_up.log == ["part 0", "part 1", "finish"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_tensors_are_converted_to_the_parameters_dtype(stored: torch.dtype) -> None:
    tensors = {name: (10 * tensor).to(stored) for name, tensor in complete().items()}
    model = Tiny()
    load_weights(model, Source(*tensors.items()))
    assert model.scale.dtype == torch.float32
    assert torch.equal(model.scale, tensors["scale"].float())


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_numbers_that_stand_for_others_are_not_converted(stored: torch.dtype) -> None:
    tensors = complete()
    tensors["scale"] = tensors["scale"].to(stored)
    what = rf"does not fit in 1 tensor \(scale holds {str(stored)[6:]}, the model expects float32\)$"
    with pytest.raises(UserError, match=what):
        load_weights(Tiny(), Source(*tensors.items()))


def test_progress_counts_bytes_up_to_the_total() -> None:
    source, seen = Source(*complete().items()), []
    load_weights(Tiny(), source, lambda done, total: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert done[0] == 0 and done == sorted(done) and done[-1] == source.nbytes()
    assert {total for _, total in seen} == {source.nbytes()}
    assert len(seen) > len(source.pairs)


def test_missing_tensors_are_named_five_at_most_with_their_count() -> None:
    tensors = [(name, tensor) for name, tensor in complete().items() if not name.startswith("layers.")]
    with pytest.raises(UserError, match=r"does not fit Tiny: it lacks 8 tensors \(.*, \.\.\.\)$") as error:
        load_weights(Tiny(), Source(*tensors))
    assert str(error.value).count("layers.") == 5
    assert "layers.0.gate.weight" in str(error.value)  # the checkpoint's name, not the packed layer's


def test_all_faults_are_told_at_once() -> None:
    tensors = complete()
    del tensors["layers.1.up.weight"]
    tensors["scale"] = torch.zeros(4)
    tensors["layers.0.norm.weight"] = torch.zeros(1)  # would broadcast
    given = [*tensors.items(), ("lm_head.weight", torch.zeros(2)), ("layers.0.norm.bias", torch.zeros(3))]
    with pytest.raises(UserError) as error:
        load_weights(Tiny(), Source(*given))
    text = str(error.value)
    assert "\n" not in text
    assert "lacks 1 tensor (layers.1.up.weight)" in text
    assert "1 tensor (lm_head.weight) that the model does not know" in text
    assert "twice 1 tensor (layers.0.norm.bias)" in text
    assert "what does not fit in 2 tensors" in text
    assert "scale has shape [4], the model expects [3]" in text


def test_buffers_of_older_checkpoints_and_what_the_model_ignores_are_skipped() -> None:
    class Ignoring(Tiny):
        ignored = ("vision.*",)

    extra = [("layers.0.rotary_emb.inv_freq", torch.zeros(2)), ("vision.patch.weight", torch.zeros(2))]
    load_weights(Ignoring(), Source(*complete().items(), *extra))
    with pytest.raises(UserError, match=r"vision\.patch\.weight"):
        load_weights(Tiny(), Source(*complete().items(), *extra))


def test_names_may_begin_otherwise_in_the_checkpoint() -> None:
    class Prefixed(Tiny):
        prefixes: ClassVar[Mapping[str, str]] = {"text.layers.": "layers.", "whole.text.": "", "whole.": "never."}

    tensors = complete()
    for old, new in (("layers.", "text.layers."), ("", "whole.text.")):
        renamed = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
        model = Prefixed()
        load_weights(model, Source(*renamed.items()))
        assert torch.equal(model.scale, tensors["scale"])
        assert torch.equal(model.layers[1].norm.weight, tensors["layers.1.norm.weight"])
    with pytest.raises(UserError, match=r"1 tensor \(whole\.sight\)"):  # by its name in the file
        load_weights(Prefixed(), Source(*tensors.items(), ("whole.sight", torch.zeros(1))))


class Head(nn.Module):
    """A head whose weight is the embedding's, with a bias of its own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(4))
        self.finished: list[Tensor] = []

    def finish(self) -> None:
        self.finished.append(self.weight.detach().clone())


class TiedModel(nn.Module):
    tied: ClassVar[Mapping[str, str]] = {"head.weight": "embed.weight"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.head = Head(self.embed.weight)


@pytest.mark.parametrize("also_stored", [False, True])
def test_a_tied_tensor_may_be_absent_and_is_ignored_when_present(also_stored: bool) -> None:
    embed = torch.randn(4, 2)
    given = [("head.weight", torch.full((4, 2), 9.0))] if also_stored else []
    model = TiedModel()
    load_weights(model, Source(*given, ("head.bias", torch.ones(4)), ("embed.weight", embed)))
    assert torch.equal(model.embed.weight, embed) and torch.equal(model.head.weight, embed)


def test_a_module_with_a_tied_parameter_is_finished_once_with_the_weight_it_shares() -> None:
    embed = torch.randn(4, 2)
    model = TiedModel()
    load_weights(model, Source(("head.bias", torch.ones(4)), ("embed.weight", embed)))
    assert len(model.head.finished) == 1
    assert torch.equal(model.head.finished[0], embed)
