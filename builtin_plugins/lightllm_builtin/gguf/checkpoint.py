"""What a GGUF file says of its model, in Hugging Face's terms, without torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from tokenizers import Tokenizer

from lightllm import Adapters, ModelInfo, UserError
from lightllm_builtin.gguf.header import Header, read_header
from lightllm_builtin.gguf.vocabulary import CONTROL, build_tokenizer

# GGUF's architecture -> Hugging Face's and its model_type. Mistral's files call themselves llama.
ARCHITECTURES = {"llama": ("LlamaForCausalLM", "llama"), "qwen2": ("Qwen2ForCausalLM", "qwen2")}
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",  # goes before: it comes later
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
ROPE_SCALING_FIELDS = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")


def the_file(path: Path) -> Path:
    return path if path.is_file() else next(path.glob("*.gguf"))


class GGUFCheckpoint:
    """`lightllm.Checkpoint`."""

    def __init__(self, path: Path, adapters: Adapters | None = None) -> None:
        self.file = the_file(path)

    @cached_property
    def header(self) -> Header:
        return read_header(self.file)

    def info(self) -> ModelInfo:
        metadata, shapes = self.header.metadata, {t.name: t.shape for t in self.header.tensors}
        if "token_embd.weight" not in shapes:
            raise UserError(f"{self.file} holds no language model: it has no token_embd.weight")
        architecture, model_type = self._architecture()
        config: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
        for ours, theirs in FIELDS.items():
            if (value := self._field(ours)) is not None:
                config[theirs] = value
        # A file may name a vocabulary of another size than its embedding has rows.
        config["vocab_size"] = shapes["token_embd.weight"][0]
        config["tie_word_embeddings"] = "output.weight" not in shapes
        if model_type == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in shapes
            config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
        if scaling := self._rope_scaling():
            config["rope_scaling"] = scaling
        if "rope_freqs.weight" in shapes:
            config["rope_freq_factors"] = self._rope_factors()
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        eos = self._eos_token_ids(tokens)
        config["eos_token_id"] = eos or None
        config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")

        def text(id: int | None) -> str | None:
            return tokens[id] if id is not None and id < len(tokens) else None

        return ModelInfo(
            path=str(self.file),
            architecture=architecture,
            config=config,
            chat_template=metadata.get("tokenizer.chat_template"),
            bos_token=text(config["bos_token_id"]),
            eos_token=text(eos[0] if eos else None),
        )

    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.header.metadata, self.file)

    @property
    def _kind(self) -> str:
        return str(self.header.metadata.get("general.architecture", "none"))

    def _architecture(self) -> tuple[str, str]:
        """Hugging Face's architecture and model_type."""
        if self._kind == "llama" and self._field("expert_count"):
            return "MixtralForCausalLM", "mixtral"
        if self._kind == "llama" and self._field("attention.sliding_window"):
            return "MistralForCausalLM", "mistral"
        # One we do not know may be a plugin's: it goes by the name in the file.
        return ARCHITECTURES.get(self._kind, (self._kind, self._kind))

    def _field(self, name: str) -> Any:
        """A field of this architecture; where the file has one value per layer, the one all layers share."""
        value = self.header.metadata.get(f"{self._kind}.{name}")
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UserError(f"{self.file}: {name} differs from layer to layer, which is not supported")
        return value[0]

    def _eos_token_ids(self, tokens: list[str]) -> list[int]:
        """End of text first, then end of turn and of message: each of them ends an answer."""
        metadata = self.header.metadata
        names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        found = [metadata[name] for name in names if name in metadata]
        if names[1] not in metadata:
            # Files from before that field name end of text only; a chat model would never stop.
            types = metadata.get("tokenizer.ggml.token_type", [])
            for token in END_OF_TURN:
                id = tokens.index(token) if token in tokens else None
                if id is not None and id < len(types) and types[id] == CONTROL:
                    found.append(id)
        return list(dict.fromkeys(found))

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self._field("rope.scaling.type")
        factor = self._field("rope.scaling.factor") or self._field("rope.scale_linear")
        if kind == "none" or (kind is None and factor in (None, 1.0)):
            return None
        found = {"rope_type": kind or "linear", "factor": factor or 1.0}
        for ours, theirs in ROPE_SCALING_FIELDS.items():
            if value := self._field(f"rope.scaling.{ours}"):
                found[theirs] = value
        return found

    def _rope_factors(self) -> list[float]:
        """llama3 scaling as GGUF has it: what to divide each frequency by."""
        tensor = next(t for t in self.header.tensors if t.name == "rope_freqs.weight")
        if tensor.type != GGMLQuantizationType.F32:
            raise UserError(f"{self.file}: rope_freqs.weight is of type {tensor.type.name}, F32 was expected")
        raw = np.fromfile(self.file, np.uint8, tensor.nbytes, offset=tensor.offset)
        factors: list[float] = raw.view(np.float32).tolist()
        return factors
