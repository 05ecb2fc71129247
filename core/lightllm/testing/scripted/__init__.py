"""A model that writes what its prompt tells it to, word for word, as a plugin: ``--plugin lightllm.testing.scripted``.

`lightllm.testing.serve` serves it unless told otherwise; `checkpoint` writes its files.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightllm import ModelRecord, hookimpl

ARCHITECTURE = "ScriptedForCausalLM"


@hookimpl
def lightllm_models() -> Sequence[ModelRecord]:
    return [
        ModelRecord(
            name="scripted",
            target="lightllm.testing.scripted.model:Scripted",
            architectures=(ARCHITECTURE,),
            summary="for tests: says what the prompt tells it to",
        )
    ]
