"""Attention kernels in Triton, for CUDA devices."""

from collections.abc import Sequence

from lightllm import AttentionBackendRecord, AttentionJob, hookimpl
from lightllm_builtin.triton_support import priority, why_not

LARGEST_HEAD = 256


def supports(job: AttentionJob) -> str | None:
    largest = max(layer.head_dim for layer in job.layers)
    too_large = f"heads of {largest} are larger than {LARGEST_HEAD}" if largest > LARGEST_HEAD else None
    return why_not(job.device) or too_large


@hookimpl
def lightllm_attention_backends() -> Sequence[AttentionBackendRecord]:
    return [
        AttentionBackendRecord(
            name="triton",
            target="lightllm_builtin.triton_attention.backend:TritonAttention",
            supports=supports,
            priority=priority(),
            summary="flash attention and flash decoding over the pool's slots",
        )
    ]
