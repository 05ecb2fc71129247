"""Llama 2, 3, 3.1, 3.2, 3.3, and everything else that calls itself LlamaForCausalLM."""

from collections.abc import Sequence

from lightllm import ModelRecord, hookimpl


@hookimpl
def lightllm_models() -> Sequence[ModelRecord]:
    return [
        ModelRecord(
            name="llama",
            target="lightllm_builtin.llama.model:Llama",
            architectures=("LlamaForCausalLM",),
            adapters={"gguf/llama": "lightllm_builtin.llama.gguf:LlamaGGUF"},
            summary="Llama 2 to 3.3 and its many relatives",
        )
    ]
