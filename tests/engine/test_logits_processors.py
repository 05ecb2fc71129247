"""A plugin's logits processor changes the requests that set one of its fields, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint

from lightllm import LogitsProcessorRecord, ModelInfo, SamplingRow, hookimpl
from lightllm.assemble import build_engine, claimed_fields
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.interfaces import UserError
from lightllm.plugins import Plugins


class Only:
    """Leaves one token possible: ``only``, or the one after ``only_after``."""

    def __init__(self, info: ModelInfo) -> None:
        assert info.architecture == "LlamaForCausalLM"

    def apply(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        for scores, row in zip(logits, rows, strict=True):
            extra: Mapping[str, Any] = row.params.extra
            scores[:] = float("-inf")
            scores[extra["only"] if "only" in extra else extra["only_after"] + 1] = 0.0


class Provider:
    @hookimpl
    def lightllm_logits_processors(self) -> list[LogitsProcessorRecord]:
        return [LogitsProcessorRecord(name="only", target=f"{__name__}:Only", fields=("only", "only_after"))]


def test_it_acts_on_the_requests_that_set_its_fields(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-gqa")
    plugins = Plugins.discover(extra=[("provider", Provider())])
    engine = build_engine(Config(max_total_tokens=500, device="cpu"), plugins, tmp_path)

    def request(id: str, **extra: int) -> Generate:
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, extra=extra)
        return Generate(id=id, prompt=[5, 6, 7], params=params)

    free = engine.generate(request("free"))["free", 0].tokens
    done = engine.generate(request("a", only=42), request("b", only_after=17), request("c"))
    assert done["a", 0].tokens == [42] * 4
    assert done["b", 0].tokens == [18] * 4
    assert done["c", 0].tokens == free


class Panic(BaseException):
    """Like pyo3's of a panic in Rust."""


class Rash:
    def __init__(self, info: ModelInfo) -> None: ...

    def apply(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        for row in rows:
            if row.params.extra["rash"] == "leaves":
                raise SystemExit("enough")
            if row.params.extra["rash"] == "panics":
                raise Panic("poisoned")


class RashProvider:
    @hookimpl
    def lightllm_logits_processors(self) -> list[LogitsProcessorRecord]:
        return [LogitsProcessorRecord(name="rash", target=f"{__name__}:Rash", fields=("rash",))]


def test_whatever_it_raises_fails_its_row_and_no_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-gqa")
    plugins = Plugins.discover(extra=[("mine", RashProvider())])
    engine = build_engine(Config(max_total_tokens=500, device="cpu"), plugins, tmp_path)
    done = engine.generate(
        *(
            Generate(id=id, prompt=[5, 6], params=SamplingParams(max_tokens=3, ignore_eos=True, extra={"rash": id}))
            for id in ("leaves", "panics", "waits")
        )
    )
    who = "the logits processor mine/rash (extra) failed"
    assert done["leaves", 0].error == f"{who}: SystemExit: enough"
    assert done["panics", 0].error == f"{who}: Panic: poisoned"
    assert done["waits", 0].error is None and len(done["waits", 0].tokens) == 3


def test_two_claims_on_one_field_name_both_plugins() -> None:
    plugins = Plugins.discover(extra=[("first", Provider()), ("second", Provider())])
    with pytest.raises(UserError, match=r"first/only .* and second/only .* both claim the request field 'only'"):
        claimed_fields(plugins)
