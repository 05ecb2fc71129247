"""Attention kernels in Triton, for CUDA devices."""

from collections.abc import Sequence

from lightllm import AttentionBackendRecord, AttentionJob, hookimpl
from lightllm_builtin.triton_support import priority, why_not

LARGEST_HEAD = 256
LARGEST_GROUP = 64
"""Query heads that share a kv head. Larger ones would not fit into a device's shared memory."""


def supports(job: AttentionJob) -> str | None:
    reason = why_not(job.device)
    if reason is not None:
        return reason
    largest = max(layer.head_dim for layer in job.layers)
    if largest > LARGEST_HEAD:
        return f"heads of {largest} are larger than {LARGEST_HEAD}"
    group = max(layer.heads // layer.kv_heads for layer in job.layers)
    most = LARGEST_GROUP // 2 if job.dtype == "float32" and largest > 128 else LARGEST_GROUP
    return None if group <= most else f"{group} heads share a kv head, more than {most}"


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
