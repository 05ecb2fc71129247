"""Qwen2 and Qwen2.5."""

from collections.abc import Sequence

from lightllm import ModelRecord, hookimpl


@hookimpl
def lightllm_models() -> Sequence[ModelRecord]:
    return [
        ModelRecord(
            name="qwen2",
            target="lightllm_builtin.qwen2.model:Qwen2",
            architectures=("Qwen2ForCausalLM",),
            adapters={"gguf/qwen2": "lightllm_builtin.qwen2.gguf:Qwen2GGUF"},
            summary="Qwen2 and Qwen2.5",
        )
    ]
