"""Small GGUF files, written with the gguf package's own writer as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from tokenizers import Tokenizer, pre_tokenizers

F32 = GGMLQuantizationType.F32
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 3 o'clock, isn't it? WE'LL SEE; they're HERE.\n"
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "价格是 12345.67 元,中文分词测试。日本語のテキスト。한국어 문장입니다.\n"
    "Emoji 😀👩‍👩‍👧 café naïve Über straße Ångström e\u0301\t\ttabs   and  spaces\r\n\r\n"
).splitlines(keepends=True)
AWKWARD = [
    "", " ", "  ", "\n", " leading", "trailing ", "a  b   c", "x\n\n\ny", "\t\tindented\n", "1234567890 12,345.678",
    "hello", " hello world", "camelCaseHTTPServer", "don't DON'T we'Ve", "你好，世界！", "한글 日本", "😀😀 👩‍👩‍👧",
    "if (a[0] != b->c) { return x /* why? */; }", "\u00a0nbsp\u3000wide", "e\u0301 versus \u00e9", "ﬁ ligature",
    "line\r\nline\r\n", "a/b//c\n/d", "...!?\n", "\u0000\u0007 control", "ᚠᛇᚻ العربية עברית ไทย", "<not_special>",
    "½ ² ٣ Ⅷ",
    *TEXTS,
]  # fmt: skip


def write_model(
    path: Path,
    model: Any,
    *,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    fields: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """A transformers Llama or Qwen2. ``kinds``: tensor name -> how to quantize it (F32); ``fields``: further metadata
    below the architecture's name; ``extra``: further tensors by their GGUF names."""
    config = model.config
    name = config.model_type
    writer = GGUFWriter(path, name)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in (fields or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{name}.{key}", value)
    architecture = next(arch for arch, text in MODEL_ARCH_NAMES.items() if text == name)
    table = get_tensor_name_map(architecture, config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float()
        if name == "llama" and ("q_proj" in theirs or "k_proj" in theirs):
            heads = config.num_attention_heads if "q_proj" in theirs else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, *data.shape[1:]).transpose(1, 2).reshape(data.shape)
        ours = table.get_name(theirs, try_suffixes=(".weight", ".bias"))
        kind = (kinds or {}).get(theirs, F32)
        writer.add_tensor(ours, quantize(data.numpy(), kind), raw_dtype=kind)
    for ours, array in (extra or {}).items():
        writer.add_tensor(ours, array)
    _close(writer)


def write_blocks(path: Path, kind: GGMLQuantizationType, raw: np.ndarray, layers: int | None = 1) -> None:
    """A file of one tensor, ``raw`` [rows, bytes] already of type ``kind``."""
    writer = GGUFWriter(path, "llama")
    if layers is not None:
        writer.add_block_count(layers)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=kind)
    _close(writer)


def write_vocabulary(
    path: Path,
    model: str,
    tokens: Sequence[str],
    *,
    merges: Sequence[str] = (),
    scores: Sequence[float] = (),
    types: Mapping[str, TokenType] | Sequence[int] | None = None,
    **fields: Any,
) -> None:
    """A file of a vocabulary and one tensor. ``fields`` go below ``tokenizer.ggml``."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if merges:
        writer.add_token_merges(merges)
    if scores:
        writer.add_token_scores(scores)
    if isinstance(types, Mapping):
        types = [types.get(token, TokenType.NORMAL) for token in tokens]
    if types is not None:
        writer.add_token_types(types)
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    _close(writer)


def trained_bpe(pre_tokenizer: pre_tokenizers.PreTokenizer, size: int = 700) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE trained on `TEXTS` as ``pre_tokenizer`` cuts them."""
    import json

    from tokenizers import models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(list(TEXTS) * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """[rows, bytes]: random blocks of type ``kind`` whose float16 scales are small and finite."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(kind))
    raw = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scales = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
              "Q6_K": (size - 2,)}[kind.name]  # fmt: skip
    for at in scales:
        values = generator.uniform(-0.1, 0.1, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = values[..., None].view(np.uint8)
    return raw.reshape(rows, -1)
