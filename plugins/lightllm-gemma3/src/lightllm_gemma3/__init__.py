"""Gemma 3: Gemma3ForCausalLM, and the text part of Gemma3ForConditionalGeneration.

This module only says what there is; `model`, and torch with it, is imported where the model is loaded.
"""

from collections.abc import Sequence

from lightllm import ModelRecord, hookimpl
from lightllm_gemma3.config import complete

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_models() -> Sequence[ModelRecord]:
    return [
        ModelRecord(
            name="gemma3",
            target="lightllm_gemma3.model:Gemma3",
            architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            adapters={"gguf/gemma3": "lightllm_gemma3.gguf:Gemma3GGUF"},
            complete=complete,
            summary="Gemma 3, text only",
        )
    ]
