"""Checkpoints whose weights are packed integers of 4 or 8 bits: GPTQ, AWQ, compressed-tensors' pack-quantized."""

from collections.abc import Sequence

from lightllm import LinearMethodRecord, ModelInfo, hookimpl
from lightllm_builtin.int4.settings import READERS
from lightllm_builtin.quantization_config import why_not


def matches(info: ModelInfo) -> str | None:
    return why_not(info, READERS)


@hookimpl
def lightllm_linear_methods() -> Sequence[LinearMethodRecord]:
    return [
        LinearMethodRecord(
            name="int4",
            target="lightllm_builtin.int4.method:Int4",
            matches=matches,
            summary="GPTQ, AWQ, pack-quantized: 4 or 8 bits; dequantized when loaded on a CPU and in float32",
        )
    ]
