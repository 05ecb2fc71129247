"""Mistral 7B and its successors of the same architecture."""

from collections.abc import Sequence

from lightllm import ModelRecord, hookimpl


@hookimpl
def lightllm_models() -> Sequence[ModelRecord]:
    return [
        ModelRecord(
            name="mistral",
            target="lightllm_builtin.mistral.model:Mistral",
            architectures=("MistralForCausalLM",),
            summary="Mistral 7B, Nemo, Small",
        )
    ]
