"""Hugging Face folders: config.json, safetensors and a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from lightllm import WeightFormatRecord, hookimpl


def matches(path: Path) -> str | None:
    if not path.is_dir():
        return "not a folder"
    if not (path / "config.json").is_file():
        return "no config.json"
    if not any(path.glob("*.safetensors")):
        if any(path.glob("pytorch_model*.bin")):
            return "only pytorch_model.bin, which may run code when read: convert it to safetensors"
        return "no *.safetensors"
    return None


@hookimpl
def lightllm_weight_formats() -> Sequence[WeightFormatRecord]:
    return [
        WeightFormatRecord(
            name="safetensors",
            target="lightllm_builtin.safetensors.weights:SafetensorsWeights",
            checkpoint="lightllm_builtin.safetensors.checkpoint:FolderCheckpoint",
            matches=matches,
            summary="Hugging Face folders, whole or sharded",
        )
    ]
