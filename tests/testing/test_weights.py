"""The kit's check of weight formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file

from lightllm import WeightFormatRecord
from lightllm.testing import check_weight_format
from lightllm_builtin.safetensors import lightllm_weight_formats
from lightllm_builtin.safetensors.weights import SafetensorsWeights

(RECORD,) = lightllm_weight_formats()


class Twice(SafetensorsWeights):
    def tensors(self, expected: Any) -> Iterator[tuple[str, Any]]:
        yield from super().tensors(expected)
        yield from super().tensors(expected)


class Half(SafetensorsWeights):
    def tensors(self, expected: Any) -> Iterator[tuple[str, Any]]:
        yield from ((name, tensor) for name, tensor in super().tensors(expected) if "norm" not in name)


class Turned(SafetensorsWeights):
    def tensors(self, expected: Any) -> Iterator[tuple[str, Any]]:
        yield from ((name, tensor.unsqueeze(0)) for name, tensor in super().tensors(expected))


class Rounded(SafetensorsWeights):
    def tensors(self, expected: Any) -> Iterator[tuple[str, Any]]:
        yield from ((name, tensor.bfloat16()) for name, tensor in super().tensors(expected))


def test_the_built_in_format_passes(tiny_llama: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    check_weight_format(RECORD, tiny_llama, tensors)
    check_weight_format(record(Rounded), tiny_llama, tensors, tolerance=0.01)


def record(target: type, **fields: Any) -> WeightFormatRecord:
    return msgspec.structs.replace(RECORD, target=f"{__name__}:{target.__name__}", **fields)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (msgspec.structs.replace(RECORD, matches=lambda path: "no"), "matches answers None for its own format"),
        (msgspec.structs.replace(RECORD, matches=lambda path: None), "matches says why something is not its format"),
        (record(Twice), "each tensor comes once"),
        (record(Half), "tensors yields each tensor of the checkpoint"),
        (record(Turned), "a tensor has Hugging Face's shape"),
        (record(Rounded), "a tensor's values are the checkpoint's"),
    ],
)
def test_a_wrong_format_is_told_why(tiny_llama: Path, wrong: WeightFormatRecord, rule: str) -> None:
    with pytest.raises(AssertionError, match=r"^this rule is broken: ") as failure:
        check_weight_format(wrong, tiny_llama, load_file(tiny_llama / "model.safetensors"))
    assert rule in str(failure.value)


SERVER_SIDE = [
    ("import torch", "info()", "the checkpoint's module imports no torch"),
    ("import nothing_of_this_name", "info()", "the checkpoint's module can be imported in every process"),
    ("", "msgspec.structs.replace(info(), architecture='')", "info gives a ModelInfo with an architecture"),
    ("", "msgspec.structs.replace(info(), config={})", "info gives a ModelInfo with an architecture"),
]


@pytest.mark.parametrize(("imports", "info", "rule"), SERVER_SIDE)
def test_a_wrong_checkpoint_is_told_why(
    tiny_llama: Path, imports: str, info: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"a_checkpoint_{SERVER_SIDE.index((imports, info, rule))}"
    (tmp_path / f"{name}.py").write_text(
        f"import msgspec\n{imports}\n"
        "from lightllm_builtin.safetensors.checkpoint import FolderCheckpoint\n"
        "class Wrong(FolderCheckpoint):\n"
        "    def info(self):\n"
        "        info = super().info\n"
        f"        return {info}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = msgspec.structs.replace(RECORD, checkpoint=f"{name}:Wrong")
    with pytest.raises(AssertionError, match=rule):
        check_weight_format(wrong, tiny_llama, load_file(tiny_llama / "model.safetensors"))
