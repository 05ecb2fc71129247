"""The kit's checks of what touches tensors: of wrong parts each breaks one rule, which is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightllm import AttentionBackendRecord, AttentionSpec, LogitsProcessorRecord, ModelInfo
from lightllm.nn.batch import History
from lightllm.nn.layers import Inputs, Outputs
from lightllm.nn.operators import TorchOperators
from lightllm.testing import (
    check_attention_backend,
    check_linear_method,
    check_logits_processor,
    check_sampler,
)
from lightllm_builtin.linear.dense import Dense
from lightllm_builtin.sampling.sampler import StandardSampler
from lightllm_builtin.torch_attention.backend import TorchAttention


def broken(check: Callable[..., None], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(AssertionError, match=r"^this rule is broken: ") as failure:
        check(*arguments, **keywords)
    return str(failure.value)


# --- attention


class NoWindow(TorchAttention):
    def __init__(self, job: Any, pool: Any) -> None:
        super().__init__(job, pool)
        self.windows = {None}

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        spec = AttentionSpec(**{name: getattr(layer, name) for name in layer.__struct_fields__} | {"window": None})
        return super().attend(spec, q, k, v, batch)


class NoSoftcap(TorchAttention):
    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        spec = AttentionSpec(**{name: getattr(layer, name) for name in layer.__struct_fields__} | {"softcap": None})
        return super().attend(spec, q, k, v, batch)


class Flat(TorchAttention):
    def attend(self, *arguments: Any) -> Tensor:
        return super().attend(*arguments).flatten(1)


class Lazy(TorchAttention):
    """Leaves the last row as it was allocated."""

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        done = super().attend(layer, q, k, v, batch)
        out = torch.empty_like(q)
        out[:-1] = done[:-1]
        return out


class Forgetful(TorchAttention):
    """Leaves the pool as it was."""

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        held = self.pool.k[layer.layer]
        before = held.clone()
        out = super().attend(layer, q, k, v, batch)
        held.copy_(before)
        return out


class Spilling(TorchAttention):
    """Writes values beside the slots it was given."""

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        out = super().attend(layer, q, k, v, batch)
        self.pool.v[layer.layer][:-1] += 1
        self.pool.v[layer.layer][batch.slots] = v
        return out


class FirstLayer(TorchAttention):
    """All layers in the first one's part of the pool."""

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        spec = AttentionSpec(**{name: getattr(layer, name) for name in layer.__struct_fields__} | {"layer": 0})
        return super().attend(spec, q, k, v, batch)


class Dense2(TorchAttention):
    """Takes q for contiguous."""

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        plain = torch.as_strided(q, q.shape, torch.empty(q.shape).stride())
        return super().attend(layer, plain, k, v, batch)


class Unsaid(TorchAttention):
    capturable: ClassVar[Any] = None


class ByLists(TorchAttention):
    """Says that it goes by the batch's tensors, and does not."""

    capturable: ClassVar[bool] = True


class Packed(TorchAttention):
    def attend_packed(self, layer: Any, qkv: Tensor, cos_sin: Any, batch: Any) -> Tensor:
        q, k, v = qkv.split((layer.heads, layer.kv_heads, layer.kv_heads), 1)
        return self.attend(layer, self.turned(q, cos_sin), self.turned(k, cos_sin), v, batch)

    def turned(self, x: Tensor, cos_sin: Any) -> Tensor:
        return TorchOperators().rotate(x, cos_sin)


class Unturned(Packed):
    def turned(self, x: Tensor, cos_sin: Any) -> Tensor:
        return x


class HalfTurned(Packed):
    """Takes all dimensions for rotated."""

    def turned(self, x: Tensor, cos_sin: Any) -> Tensor:
        return super().turned(x, [F.pad(t, (0, x.shape[-1] - t.shape[-1])) for t in cos_sin])


class QueriesUnturned(Packed):
    def attend_packed(self, layer: Any, qkv: Tensor, cos_sin: Any, batch: Any) -> Tensor:
        q, k, v = qkv.split((layer.heads, layer.kv_heads, layer.kv_heads), 1)
        return self.attend(layer, q, self.turned(k, cos_sin), v, batch)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        (NoWindow, "attend gives attention over the keys that a query may see"),
        (NoSoftcap, "attend gives attention over the keys that a query may see"),
        (Lazy, "attend gives attention over the keys that a query may see"),
        (Dense2, "attend gives attention over the keys that a query may see"),
        (Flat, "attend gives a tensor like q: [tokens, heads, head_dim]"),
        (Forgetful, "attend writes each new token's keys to its slot"),
        (FirstLayer, "attend writes each new token's keys to its slot"),
        (Spilling, "attend changes no slot of the pool but the new tokens'"),
        (ByLists, "as a replayed CUDA graph: context_lengths and rows are not this step's"),
        (Unturned, "attend_packed writes each new token's key, rotated, to its slot"),
        (HalfTurned, "attend_packed writes each new token's key, rotated, to its slot"),
        (QueriesUnturned, "attend_packed gives attention over the keys that a query may see"),
        (Unsaid, "a backend says on its class whether attend may be captured"),
    ],
)
def test_a_wrong_attention_backend_is_told_why(backend: Any, rule: str) -> None:
    assert rule in broken(check_attention_backend, backend)


def test_a_backend_that_rotates_passes() -> None:
    check_attention_backend(Packed, cases=20)
    check_attention_backend(Packed, cases=20, dtype="bfloat16")


def test_what_a_backend_does_not_support_is_passed_over() -> None:
    def no_softcap(job: Any) -> str | None:
        return "no softcap" if any(layer.softcap for layer in job.layers) else None

    check_attention_backend(NoSoftcap, supports=no_softcap)
    record = AttentionBackendRecord(name="a", target=f"{__name__}:NoSoftcap", supports=no_softcap)
    check_attention_backend(record, dtype="bfloat16")
    assert "refused: never" in broken(check_attention_backend, NoSoftcap, supports=lambda job: "never")


# --- samplers


def with_rows(change: Callable[[Any], dict[str, Any]]) -> type:
    """A standard sampler that sees rows with other parameters, as if it had none of its own."""
    import msgspec

    class Changed(StandardSampler):
        def sample(self, logits: Tensor, rows: Any, history: Any) -> Tensor:
            seen = []
            for row in rows:
                copy = type(row)(**vars(row))
                copy.params = msgspec.structs.replace(row.params, **change(row))
                seen.append(copy)
            return super().sample(logits, seen, history)

    return Changed


class Torch32(StandardSampler):
    def sample(self, logits: Tensor, rows: Any, history: Any) -> Tensor:
        return super().sample(logits, rows, history).int()


class Undecided(StandardSampler):
    overlaps: ClassVar[Any] = "maybe"


class ByOutput(StandardSampler):
    """Counts what it can see."""

    def sample(self, logits: Tensor, rows: Any, history: Any) -> Tensor:
        return super().sample(logits, [type(row)(**vars(row) | {"unknown": 0}) for row in rows], history)


class PenalizesOutput(StandardSampler):
    """Of which the last tokens may be missing."""

    def sample(self, logits: Tensor, rows: Any, history: Any) -> Tensor:
        return super().sample(logits, rows, History.of(rows, logits.device))


class ByBatch(StandardSampler):
    """Its draws depend on the place in the batch."""

    def sample(self, logits: Tensor, rows: Any, history: Any) -> Tensor:
        changed = [type(row)(**vars(row) | {"seed": row.seed + i}) for i, row in enumerate(rows)]
        return super().sample(logits, changed, history)


class SeedOnly(StandardSampler):
    def sample(self, logits: Tensor, rows: Any, history: Any) -> Tensor:
        changed = [type(row)(**vars(row) | {"index": 0, "output": []}) for row in rows]
        return super().sample(logits, changed, history)


class Generator(StandardSampler):
    """A generator's state in place of a function."""

    def sample(self, logits: Tensor, rows: Any, history: Any) -> Tensor:
        cold = [row.params.temperature == 0 for row in rows]
        drawn = torch.multinomial(torch.softmax(logits, -1), 1).squeeze(1)
        return torch.where(torch.tensor(cold), logits.argmax(-1), drawn)


@pytest.mark.parametrize(
    ("sampler", "rule"),
    [
        (Torch32, "sample gives a token a row: [rows] int64"),
        (with_rows(lambda row: {"temperature": 1.0}), "temperature 0 takes the likeliest token"),
        (with_rows(lambda row: {"temperature": row.params.temperature * 0.9}), "draws follow the distribution"),
        (with_rows(lambda row: {"top_k": 0}), "draws follow the distribution"),
        (with_rows(lambda row: {"top_p": 1.0}), "draws follow the distribution"),
        (with_rows(lambda row: {"min_p": 0.0}), "draws follow the distribution"),
        (SeedOnly, "draws follow the distribution"),
        (ByBatch, "a draw is decided by (seed, index, generated)"),
        (ByOutput, "a sampler that overlaps counts by row.generated, and finds the tokens in history"),
        (PenalizesOutput, "a sampler that overlaps counts by row.generated, and finds the tokens in history"),
        (Undecided, "a sampler says on its class whether steps may overlap"),
        (Generator, "draws follow the distribution"),
        (with_rows(lambda row: {"logit_bias": {}}), "logit_bias is added before the choice"),
        (with_rows(lambda row: {"min_tokens": 0}), "a row's stop_ids wait until it has min_tokens"),
        (
            with_rows(lambda row: {"min_tokens": row.params.min_tokens + 1}),
            "stop_ids wait until it has min_tokens, and",
        ),
    ],
)
def test_a_wrong_sampler_is_told_why(sampler: Any, rule: str) -> None:
    assert rule in broken(check_sampler, sampler)


def test_what_a_sampler_is_said_to_be_without_is_not_asked_for() -> None:
    without = ("top_k", "top_p", "min_p", "temperature", "logit_bias", "min_tokens")
    plain = with_rows(lambda row: {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "logit_bias": {}, "min_tokens": 0})
    check_sampler(plain, without=without)
    # what is left is asked for: the same draw again
    assert "a draw is decided by" in broken(check_sampler, Generator, without=without)
    with pytest.raises(ValueError, match="there are no such parameters"):
        check_sampler(StandardSampler, without=["minp"])


# --- logits processors


class Ban:
    """Rules the token ``ban`` out."""

    def __init__(self, info: ModelInfo) -> None:
        self.calls = 0

    def apply(self, logits: Tensor, rows: Any) -> Any:
        self.calls += 1
        for scores, row in zip(logits, rows, strict=True):
            scores[row.params.extra["ban"]] = float("-inf")


class Returns(Ban):
    def apply(self, logits: Tensor, rows: Any) -> Any:
        super().apply(logits.clone(), rows)
        return logits


class NaN(Ban):
    def apply(self, logits: Tensor, rows: Any) -> Any:
        super().apply(logits, rows)
        logits -= logits.amin(-1, keepdim=True)


class Nothing(Ban):
    def apply(self, logits: Tensor, rows: Any) -> Any:
        logits.fill_(float("-inf"))


class OneForAll(Ban):
    def apply(self, logits: Tensor, rows: Any) -> Any:
        logits[:, rows[0].params.extra["ban"]] = float("-inf")


class Counting(Ban):
    def apply(self, logits: Tensor, rows: Any) -> Any:
        super().apply(logits, rows)
        logits += self.calls


class Beyond(Ban):
    def apply(self, logits: Tensor, rows: Any) -> Any:
        super().apply(logits, rows)
        torch.as_strided(logits, (len(logits) + 1, logits.shape[1]), logits.stride(), logits.storage_offset()).add_(1)


EXTRA = [{"ban": 3}, {"ban": 5}]


def test_a_right_logits_processor_passes() -> None:
    check_logits_processor(Ban, extra=EXTRA)
    check_logits_processor(
        Ban, extra={"ban": 99}, info=ModelInfo(path="", architecture="A", config={"vocab_size": 100})
    )


@pytest.mark.parametrize(
    ("processor", "rule"),
    [
        (Returns, "apply changes the logits in place and gives nothing back"),
        (NaN, "logits are finite, or -inf"),
        (Nothing, "a row keeps at least one token that can be drawn"),
        (OneForAll, "a row's logits depend on that row only"),
        (Counting, "a row's logits depend on that row only"),
        (Beyond, "apply changes no rows but those it was given"),
    ],
)
def test_a_wrong_logits_processor_is_told_why(processor: Any, rule: str) -> None:
    assert rule in broken(check_logits_processor, processor, extra=EXTRA)


def test_a_processors_record_is_held_to_the_fields() -> None:
    def record(**fields: Any) -> LogitsProcessorRecord:
        return LogitsProcessorRecord(**{"name": "ban", "target": f"{__name__}:Ban", "fields": ("ban",)} | fields)

    check_logits_processor(record(validate=lambda fields: None), extra=EXTRA)
    assert "names the fields" in broken(check_logits_processor, record(fields=("bans",)), extra=EXTRA)
    assert "no: 3" in broken(check_logits_processor, record(validate=lambda f: f"no: {f['ban']}"), extra=EXTRA)


# --- linear methods


class Plain:
    """Weights as they are."""

    def __init__(self, info: ModelInfo) -> None: ...

    def create(self, layer: Any) -> None:
        layer.hold("weight", Outputs(), Inputs())

    def finish(self, layer: Any) -> None:
        pass

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)


class NoBias(Plain):
    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return x @ layer.weight.T


class Rounded(Plain):
    def finish(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter((layer.weight * 8).round() / 8, requires_grad=False)


class Overwrites(Plain):
    """Right for the head, and wrong for the embedding whose weight it shares."""

    def finish(self, layer: Any) -> None:
        layer.weight.data.mul_(2)

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight / 2, layer.bias)


class Full(Plain):
    """Of the full size, whatever the rank."""

    def finish(self, layer: Any) -> None:
        layer.weight.data = layer.weight.view(sum(layer.full_outs), layer.full_inputs)


class Matrices(Plain):
    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return super().apply(layer, x.reshape(-1, layer.inputs))


class Doubles(Plain):
    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return super().apply(layer, x).double()


class Renamed(Plain):
    def create(self, layer: Any) -> None:
        layer.hold("matrix", Outputs(), Inputs())
        layer.hold("weight", Outputs(), Inputs(), optional=True)


class ByHand(Plain):
    def create(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter(torch.zeros(layer.outputs, layer.inputs), requires_grad=False)


def test_right_linear_methods_pass() -> None:
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        check_linear_method(Dense, dtype=dtype, tolerance=tolerance)
        check_linear_method(Plain, dtype=dtype, tolerance=tolerance)
    check_linear_method(Rounded, tolerance=0.1)


class Untied(Plain):
    """Holds what a tied layer cannot share."""

    def create(self, layer: Any) -> None:
        layer.hold("weight", Outputs(), Inputs(2))


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (NoBias, "apply gives x W^T + b, the bias included"),
        (Rounded, "apply gives x W^T + b, the bias included"),
        (Overwrites, "a head tied to an embedding leaves it its weight"),
        (Matrices, "apply gives [..., layer.outputs] in x's dtype"),
        (Doubles, "apply gives [..., layer.outputs] in x's dtype"),
        (Renamed, "create holds what is to be loaded"),
        (ByHand, "create holds what is to be loaded"),
        (Untied, "a tied layer holds no weight along outputs and inputs"),
        (Full, "a method holds this rank's part"),
    ],
)
def test_a_wrong_linear_method_is_told_why(method: Any, rule: str) -> None:
    assert rule in broken(check_linear_method, method)
