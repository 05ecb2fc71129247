"""Small checkpoints, written without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LONGEST = 500
"""Bytes of a token, but for its last doubling: llguidance panics at one of more than 1024."""


def byte_tokenizer(
    *, special: Sequence[str] = (), added: Sequence[str] = (), words: Iterable[str] = (), repeated: Iterable[str] = ()
) -> Tokenizer:
    """Byte-level BPE: token i is byte i, then come the ``words`` with their beginnings, those ``repeated`` also twice,
    four times, and so on; then the ``special`` tokens and other ``added`` ones."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {char: byte for byte, char in enumerate(_byte_characters())}
    merges: dict[tuple[str, str], None] = {}  # in the order of their ranks

    def merge(left: str, right: str) -> str:
        vocab.setdefault(left + right, len(vocab))
        merges[left, right] = None
        return left + right

    for times, text in [(1, word) for word in words] + [(2, word) for word in repeated]:
        ((word, _),) = level.pre_tokenize_str(text)
        for end in range(1, len(word)):
            merge(word[:end], word[end])
        while times > 1 and len(word) <= LONGEST:
            word = merge(word, word)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def _byte_characters() -> list[str]:
    """GPT-2's: printable bytes are their Latin-1 characters, the others come from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_checkpoint_files(
    folder: Path,
    *,
    config: dict[str, Any],
    tokenizer: Tokenizer,
    tensors: dict[str, Any],
    template: str,
    eos_token: str,
    bos_token: str | None = None,
) -> None:
    """A folder as Hugging Face's libraries write them; ``tensors`` are numpy's."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {"eos_token": eos_token} | ({"bos_token": bos_token} if bos_token else {})
    ids = {f"{name}_id": tokenizer.token_to_id(text) for name, text in tokens.items()}
    for name, content in (
        ("config.json", config | ids),
        ("generation_config.json", ids),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_llama(folder: Path, *, seed: int = 0) -> None:
    """A Llama of random weights (the same for the same seed), 512 tokens long, over bytes and the chat's marks."""
    tokenizer = byte_tokenizer(special=("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"))
    hidden, inner, layers, heads, kv_heads, vocabulary = 32, 64, 2, 4, 2, tokenizer.get_vocab_size()
    draw = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return draw.normal(0, 0.3, (rows, columns)).astype(np.float32)

    def norm() -> np.ndarray[Any, Any]:
        return draw.uniform(0.5, 1.5, hidden).astype(np.float32)

    kv = hidden // heads * kv_heads
    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden),
        "lm_head.weight": matrix(vocabulary, hidden),
        "model.norm.weight": norm(),
    }
    for i in range(layers):
        sizes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
        tensors |= {f"model.layers.{i}.self_attn.{name}.weight": matrix(*size) for name, size in sizes.items()}
        sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        tensors |= {f"model.layers.{i}.mlp.{name}.weight": matrix(*size) for name, size in sizes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = norm()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    write_checkpoint_files(
        folder,
        config=config,
        tokenizer=tokenizer,
        tensors=tensors,
        template=TINY_TEMPLATE,
        eos_token="<|end|>",
        bos_token="<|begin|>",
    )
