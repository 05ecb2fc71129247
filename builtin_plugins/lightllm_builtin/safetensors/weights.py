"""Tensors from safetensors files, one at a time: peak memory is the model's weights and one tensor."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightllm import Adapters, ModelInfo, UserError


class SafetensorsWeights:
    """`lightllm.WeightFormat`. Raises UserError naming the file that is absent, cut off or no safetensors."""

    def __init__(self, path: Path, info: ModelInfo, adapters: Adapters | None = None) -> None:
        self.files = _files(path)

    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 - not a dict
                        yield name, shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read ({error}): is it complete?") from error


def _files(path: Path) -> list[Path]:
    """The shards the index names; without an index, every safetensors file."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        whole = path / "model.safetensors"
        return [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: {error!r}") from error
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise UserError(
            f"{path} lacks {len(absent)} of the {len(names)} shards its index names: {', '.join(absent[:5])}"
        )
    return [path / name for name in names]
