"""The header of a GGUF file: metadata and the list of tensors.

The `gguf` package reads it too, but takes 2 seconds over a vocabulary, as it wraps every string in an array; this takes
0.04. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lightllm import UserError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """``shape`` as in PyTorch (rows first); the data is ``nbytes`` from ``offset`` of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    file: Path
    metadata: dict[str, Any]
    tensors: list[TensorInfo]

    @property
    def architecture(self) -> str:
        """What the file calls its architecture; its fields' names begin with it."""
        return str(self.metadata.get("general.architecture", "none"))

    def field(self, name: str) -> Any:
        """A field of the architecture, None where there is none; of one value per layer, the one all layers share.

        Raises UserError where they differ.
        """
        value = self.metadata.get(f"{self.architecture}.{name}")
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UserError(f"{self.file}: {name} differs from layer to layer, which is not supported")
        return value[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape as in PyTorch."""
        return {tensor.name: tensor.shape for tensor in self.tensors}


def read_header(path: Path) -> Header:
    """Raises UserError when the file is not GGUF, is of another byte order or version, or is cut off."""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 24 or file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Reader(data).header(path)
            except (struct.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
                raise UserError(f"{path} cannot be read ({error}): is it complete?") from error
    end = max((t.offset + t.nbytes for t in header.tensors), default=0)
    if end > size:
        raise UserError(f"{path} is cut off: it has {size:,} bytes, its tensors need {end:,}")
    return header


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 4

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        size = self.scalar("<Q")
        self.at += size
        if self.at > len(self.data):
            raise ValueError("a text runs past its end")
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind]) if kind in SCALARS else self._unknown(kind)
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner in (STRING, ARRAY):
            return [self.value(inner) for _ in range(count)]
        if inner not in SCALARS:
            self._unknown(inner)
        form = f"<{count}{SCALARS[inner][1]}"
        values = list(struct.unpack_from(form, self.data, self.at))
        self.at += struct.calcsize(form)
        return values

    def _unknown(self, kind: int) -> Any:
        raise ValueError(f"metadata of unknown type {kind}")

    def header(self, path: Path) -> Header:
        version = self.scalar("<I")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} is not supported (2 and 3 are; big-endian files are not)")
        tensor_count, pair_count = self.scalar("<Q"), self.scalar("<Q")
        metadata = {}
        for _ in range(pair_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("<I"))
        places = []
        for _ in range(tensor_count):
            name = self.string()
            dims = [self.scalar("<Q") for _ in range(self.scalar("<I"))]
            places.append((name, tuple(reversed(dims)), self.scalar("<I"), self.scalar("<Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = (self.at + alignment - 1) // alignment * alignment
        tensors = []
        for name, shape, number, offset in places:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise UserError(f"{path}: tensor {name} is of type {number}, which is not known here") from None
            block, size = GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise UserError(f"{path}: tensor {name} of shape {list(shape)} cannot be of type {kind.name}")
            tensors.append(TensorInfo(name, shape, kind, start + offset, math.prod(shape) // block * size))
        return Header(path, metadata, tensors)
