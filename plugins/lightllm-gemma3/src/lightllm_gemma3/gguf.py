"""GGUF files whose general.architecture is gemma3, as llama.cpp's converter writes and llama.cpp reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightllm_gemma3.config import FULL, SLIDING

if TYPE_CHECKING:
    from torch import Tensor

LAYERS_OF_27B = 62


class Gemma3GGUF:
    """What the GGUF plugin asks for as an adapter. ``file``: its header, of which `field` gives one of Gemma's fields,
    `metadata` everything."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def config(self) -> dict[str, Any]:
        field = self.file.field
        config = {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": self._query_pre_attn_scalar(),
            "layer_types": self._layer_types(),
        }
        for ours, theirs in (
            ("rope.freq_base_swa", "rope_local_base_freq"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ):
            if value := field(ours):
                config[theirs] = value
        return config

    def tensor(self, name: str, values: Tensor) -> Tensor:
        """Files hold what norms multiply by; checkpoints that less 1."""
        return values.sub_(1) if name.endswith("norm.weight") else values

    def _query_pre_attn_scalar(self) -> float | None:
        """The file does not say; llama.cpp knows that it is not the head's size for the 27B model only."""
        field = self.file.field
        if scale := field("attention.scale"):
            return float(scale**-2)
        if field("block_count") == LAYERS_OF_27B:
            return float(field("embedding_length") / field("attention.head_count"))
        length: int | None = field("attention.key_length")
        return length

    def _layer_types(self) -> list[str]:
        """No window: all layers are full. ``sliding_window_pattern``: every so many layers one is full (6 where it is
        absent), or for each layer whether it slides."""
        field, layers = self.file.field, self.file.field("block_count") or 0
        pattern = self.file.metadata.get("gemma3.attention.sliding_window_pattern") or 6
        if not field("attention.sliding_window"):
            slides = [False] * layers
        elif isinstance(pattern, list):
            slides = pattern
        else:
            slides = [(i + 1) % pattern != 0 for i in range(layers)]
        return [SLIDING if sliding else FULL for sliding in slides]
