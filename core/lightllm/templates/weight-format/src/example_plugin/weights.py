"""The weights: arrays in a ``weights.npz``, called as in Hugging Face's checkpoints of the model."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from lightllm import Adapters, ModelInfo, UserError
from torch import Tensor


class ExamplePluginWeights:
    """`lightllm.WeightFormat`."""

    def __init__(self, path: Path, info: ModelInfo, adapters: Adapters) -> None:
        self.file = path / "weights.npz"

    def nbytes(self) -> int:
        return self.file.stat().st_size

    def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """One after the other: each is read when it is its turn, and can be forgotten before the next."""
        try:
            with np.load(self.file) as arrays:
                for name in arrays:
                    yield name, torch.from_numpy(arrays[name])
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.file} cannot be read ({error}): is it complete?") from error
