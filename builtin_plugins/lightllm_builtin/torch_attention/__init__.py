"""Attention in plain PyTorch, on any device: the reference every other backend is tested against."""

from collections.abc import Sequence

from lightllm import AttentionBackendRecord, hookimpl


@hookimpl
def lightllm_attention_backends() -> Sequence[AttentionBackendRecord]:
    return [
        AttentionBackendRecord(
            name="torch",
            target="lightllm_builtin.torch_attention.backend:TorchAttention",
            summary="scaled_dot_product_attention over the paged pool; runs everywhere",
        )
    ]
