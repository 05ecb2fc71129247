"""GGUF files of Qwen2 and Qwen2.5: tensors are as Hugging Face has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lightllm_builtin.gguf.header import Header


class Qwen2GGUF:
    """`lightllm_builtin.gguf.adapter.Adapter`."""

    def __init__(self, file: Header) -> None:
        pass

    def config(self) -> dict[str, Any]:
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}

    def tensor(self, name: str, values: Tensor) -> Tensor:
        return values
