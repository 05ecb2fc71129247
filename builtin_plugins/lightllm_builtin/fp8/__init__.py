"""Weights and activations of linear layers in 8-bit floating point: of checkpoints that are, and rounded from plain
ones."""

from collections.abc import Sequence

from lightllm import LinearMethodRecord, ModelInfo, hookimpl
from lightllm_builtin.fp8.settings import READERS
from lightllm_builtin.quantization_config import why_not


def matches(info: ModelInfo) -> str | None:
    return why_not(info, READERS)


@hookimpl
def lightllm_linear_methods() -> Sequence[LinearMethodRecord]:
    return [
        LinearMethodRecord(
            name="fp8",
            target="lightllm_builtin.fp8.method:Fp8",
            matches=matches,
            summary="float8 (e4m3) weights and activations; a plain checkpoint is rounded",
        )
    ]
