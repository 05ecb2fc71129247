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
    return None if group <= LARGEST_GROUP else f"{group} heads share a kv head, more than {LARGEST_GROUP}"


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
