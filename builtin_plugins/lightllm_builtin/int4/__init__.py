"""Checkpoints whose weights are packed integers of 4 or 8 bits: GPTQ, AWQ, compressed-tensors' pack-quantized."""

from collections.abc import Sequence

from lightllm import LinearMethodRecord, ModelInfo, UserError, hookimpl
from lightllm_builtin.int4.settings import quantization, read


def matches(info: ModelInfo) -> str | None:
    if not quantization(info):
        return "the checkpoint is not quantized"
    try:
        read(info)
    except UserError as error:
        return str(error)
    return None


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
