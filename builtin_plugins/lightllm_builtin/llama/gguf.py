"""GGUF files that call themselves llama: Llama's, Mistral's and Mixtral's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lightllm_builtin.gguf.header import Header


class LlamaGGUF:
    """`lightllm_builtin.gguf.adapter.Adapter`."""

    def __init__(self, file: Header) -> None:
        self.file = file

    def config(self) -> dict[str, Any]:
        if self.file.field("expert_count"):
            return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        if self.file.field("attention.sliding_window"):
            return {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": "blk.0.attn_q.bias" in self.file.shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in self.file.shapes,
        }

    def tensor(self, name: str, values: Tensor) -> Tensor:
        """llama.cpp interleaves the two halves of each rotary head of q and k; put them back."""
        heads = self.file.field("attention.head_count")
        if ".attn_k." in name:
            heads = self.file.field("attention.head_count_kv") or heads
        elif ".attn_q." not in name:
            return values
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)
