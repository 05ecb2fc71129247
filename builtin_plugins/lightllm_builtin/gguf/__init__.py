"""llama.cpp's GGUF files: weights, tokenizer and chat template in one."""

from collections.abc import Sequence
from pathlib import Path

from lightllm import WeightFormatRecord, hookimpl


def matches(path: Path) -> str | None:
    if path.is_file():
        return None if path.suffix == ".gguf" else "not a .gguf file"
    if any(path.glob("*.safetensors")):
        return "has safetensors"
    found = len(list(path.glob("*.gguf")))
    if found == 1:
        return None
    return "no *.gguf" if not found else f"{found} .gguf files: name one of them"


@hookimpl
def lightllm_weight_formats() -> Sequence[WeightFormatRecord]:
    return [
        WeightFormatRecord(
            name="gguf",
            target="lightllm_builtin.gguf.weights:GGUFWeights",
            checkpoint="lightllm_builtin.gguf.checkpoint:GGUFCheckpoint",
            matches=matches,
            summary="llama.cpp's format, dequantized when loaded",
        )
    ]
