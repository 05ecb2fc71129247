"""What a GGUF file says of its model, in Hugging Face's terms, without torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from tokenizers import Tokenizer

from lightllm import Adapters, ModelInfo, UserError
from lightllm_builtin.gguf.adapter import Adapter
from lightllm_builtin.gguf.header import Header, read_header
from lightllm_builtin.gguf.vocabulary import CONTROL, build_tokenizer

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
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")


def the_file(path: Path) -> Path:
    return path if path.is_file() else next(path.glob("*.gguf"))


class GGUFCheckpoint:
    """`lightllm.Checkpoint`."""

    def __init__(self, path: Path, adapters: Adapters) -> None:
        self.file, self.adapters = the_file(path), adapters

    @cached_property
    def header(self) -> Header:
        return read_header(self.file)

    def info(self) -> ModelInfo:
        header = self.header
        metadata, shapes, kind = header.metadata, header.shapes, header.architecture
        if "token_embd.weight" not in shapes:
            raise UserError(f"{self.file} holds no language model: it has no token_embd.weight")
        # One that nobody adapts may be served all the same: by the name in the file.
        config: dict[str, Any] = {"architectures": [kind], "model_type": kind}
        for ours, theirs in FIELDS.items():
            if (value := header.field(ours)) is not None:
                config[theirs] = value
        # A file may name a vocabulary of another size than its embedding has rows.
        config["vocab_size"] = shapes["token_embd.weight"][0]
        config["tie_word_embeddings"] = "output.weight" not in shapes
        if scaling := self._rope_scaling():
            config["rope_scaling"] = scaling
        if "rope_freqs.weight" in shapes:
            config["rope_freq_factors"] = self._rope_factors()
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        eos = self._eos_token_ids(tokens)
        config["eos_token_id"] = eos or None
        config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
        adapter: type[Adapter] | None = self.adapters(kind)
        if adapter is not None:
            config |= adapter(header).config()

        def text(id: int | None) -> str | None:
            return tokens[id] if id is not None and id < len(tokens) else None

        return ModelInfo(
            path=str(self.file),
            architecture=config["architectures"][0],
            config=config,
            chat_template=metadata.get("tokenizer.chat_template"),
            bos_token=text(config["bos_token_id"]),
            eos_token=text(eos[0] if eos else None),
        )

    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.header.metadata, self.file)

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
        kind = self.header.field("rope.scaling.type")
        factor = self.header.field("rope.scaling.factor") or self.header.field("rope.scale_linear")
        if kind == "none" or (kind is None and factor in (None, 1.0)):
            return None
        found = {"rope_type": kind or "linear", "factor": factor or 1.0}
        for ours, theirs in ROPE_SCALING_FIELDS.items():
            if value := self.header.field(f"rope.scaling.{ours}"):
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
