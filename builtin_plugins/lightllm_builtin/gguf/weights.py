"""Tensors of a GGUF file, dequantized to float32 one at a time, under their Hugging Face names."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from lightllm import Adapters, ModelInfo, UserError
from lightllm_builtin.gguf.adapter import Adapter
from lightllm_builtin.gguf.checkpoint import the_file
from lightllm_builtin.gguf.header import TensorInfo, read_header

NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight")
"""Read with the metadata, where the model's config has them; the last is what older files carry along."""


class GGUFWeights:
    """`lightllm.WeightFormat`."""

    def __init__(self, path: Path, info: ModelInfo, adapters: Adapters) -> None:
        self.file = the_file(path)
        self.header = read_header(self.file)
        adapter: type[Adapter] | None = adapters(self.header.architecture)
        self.adapter = adapter(self.header) if adapter is not None else None

    def nbytes(self) -> int:
        # as they are handed out: the progress bar counts what it is given
        return sum(4 * math.prod(t.shape) for t in self.header.tensors if not t.name.endswith(NOT_WEIGHTS))

    def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        names = self._names(expected)
        for tensor in self.header.tensors:
            if tensor.name.endswith(NOT_WEIGHTS):
                continue
            values = read_tensor(self.file, tensor)
            if self.adapter is not None:
                values = self.adapter.tensor(tensor.name, values)
            yield names.get(tensor.name, tensor.name), values

    def _names(self, expected: Collection[str]) -> dict[str, str]:
        """GGUF name -> Hugging Face name, for every name the model expects."""
        kind = self.header.architecture
        architecture = next((arch for arch, text in MODEL_ARCH_NAMES.items() if text == kind), None)
        if architecture is None:
            return {}
        layers = self.header.field("block_count")
        if not isinstance(layers, int):
            raise UserError(f"{self.file} does not say how many layers it has ({kind}.block_count)")
        table = get_tensor_name_map(architecture, layers)
        names = {}
        for wanted in expected:
            found = table.get_name(wanted, try_suffixes=(".weight", ".bias"))
            if found is not None:
                names[found] = wanted
        return names


def read_tensor(file: Path, tensor: TensorInfo) -> Tensor:
    """One tensor as float32. Read, not mapped, so that memory holds this tensor and not what was read before."""
    raw = np.fromfile(file, np.uint8, tensor.nbytes, offset=tensor.offset)
    if tensor.type == GGMLQuantizationType.F32:
        return torch.from_numpy(raw.view(np.float32).reshape(tensor.shape))
    if tensor.type == GGMLQuantizationType.F16:
        return torch.from_numpy(raw.view(np.float16).reshape(tensor.shape)).float()
    if tensor.type == GGMLQuantizationType.BF16:
        return torch.from_numpy(raw).view(torch.bfloat16).view(tensor.shape).float()
    block, size = GGML_QUANT_SIZES[tensor.type]
    try:
        values = dequantize(raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * size), tensor.type)
    except NotImplementedError:
        kind = tensor.type.name
        raise UserError(f"{file}: tensor {tensor.name} is of type {kind}, which cannot be read here") from None
    return torch.from_numpy(values)
