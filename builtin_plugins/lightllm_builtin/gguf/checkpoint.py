"""What a GGUF file says of its model, in Hugging Face's terms, without torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lightllm import ModelInfo, UserError
from lightllm_builtin.gguf.header import Header, read_header
from lightllm_builtin.gguf.vocabulary import build_tokenizer

# GGUF's architecture -> Hugging Face's, and what every checkpoint of it has that the file does not say.
# Mistral's files call themselves llama.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"model_type": "llama"}),
    "qwen2": ("Qwen2ForCausalLM", {"model_type": "qwen2"}),
}
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


def the_file(path: Path) -> Path:
    return path if path.is_file() else next(path.glob("*.gguf"))


class GGUFCheckpoint:
    """`lightllm.Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.file = the_file(path)

    @cached_property
    def header(self) -> Header:
        return read_header(self.file)

    def info(self) -> ModelInfo:
        metadata = self.header.metadata
        kind = metadata.get("general.architecture", "none")
        # One we do not know may be a plugin's: it goes by the name in the file.
        architecture, config = ARCHITECTURES.get(kind, (kind, {"model_type": kind}))
        config = {"architectures": [architecture]} | config
        for ours, theirs in FIELDS.items():
            value = metadata.get(f"{kind}.{ours}")
            if value is not None:
                config[theirs] = value
        shapes = {tensor.name: tensor.shape for tensor in self.header.tensors}
        if "token_embd.weight" not in shapes:
            raise UserError(f"{self.file} holds no language model: it has no token_embd.weight")
        config["vocab_size"] = shapes["token_embd.weight"][0]
        config["tie_word_embeddings"] = "output.weight" not in shapes
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes and architecture == "LlamaForCausalLM"
        if scaling := self._rope_scaling(kind):
            config["rope_scaling"] = scaling
        if "rope_freqs.weight" in shapes:
            config["rope_freq_factors"] = self._rope_factors()
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        eos = [
            metadata[key] for key in (f"tokenizer.ggml.{n}_token_id" for n in ("eos", "eot", "eom")) if key in metadata
        ]
        config["eos_token_id"] = list(dict.fromkeys(eos)) or None
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

    def _rope_scaling(self, kind: str) -> dict[str, Any] | None:
        metadata = self.header.metadata
        scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
        if scaling == "none":
            return None
        found = {"rope_type": scaling, "factor": metadata.get(f"{kind}.rope.scaling.factor", 1.0)}
        original = metadata.get(f"{kind}.rope.scaling.original_context_length")
        if original:
            found["original_max_position_embeddings"] = original
        return found

    def _rope_factors(self) -> list[float]:
        """llama3 scaling as GGUF has it: what to divide each frequency by."""
        tensor = next(t for t in self.header.tensors if t.name == "rope_freqs.weight")
        raw = np.fromfile(self.file, np.uint8, tensor.nbytes, offset=tensor.offset)
        factors: list[float] = raw.view(np.float32).tolist()
        return factors
