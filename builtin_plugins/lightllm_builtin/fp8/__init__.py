"""Weights and activations of linear layers in 8-bit floating point, rounded from a plain checkpoint."""

from collections.abc import Sequence

from lightllm import LinearMethodRecord, hookimpl


@hookimpl
def lightllm_linear_methods() -> Sequence[LinearMethodRecord]:
    return [
        LinearMethodRecord(
            name="fp8",
            target="lightllm_builtin.fp8.method:Fp8",
            summary="weights and activations in float8 (e4m3), for CUDA devices of capability 8.9 or newer",
        )
    ]
