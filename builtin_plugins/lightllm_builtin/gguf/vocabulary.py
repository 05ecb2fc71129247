"""A `tokenizers.Tokenizer` from a GGUF file's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lightllm import UserError

CONTROL, USER_DEFINED = 3, 4
"""Values of tokenizer.ggml.token_type."""

# How each family cuts text before merging; the expressions are those of the families' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": _TEKKEN,
}
BYTE_LEVEL = ("gpt-2", "default", "smollm")


def build_tokenizer(metadata: dict[str, Any], file: Path) -> Tokenizer:
    """Raises UserError for a kind of vocabulary that is not known here."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{file} holds no vocabulary")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, file)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise UserError(f"{file}: a vocabulary of kind {kind!r} is not supported (gpt2 and llama are)")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        AddedToken(token, special=type_ == CONTROL, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    _frame(tokenizer, metadata, tokens, default_bos=kind == "llama")
    return tokenizer


def _byte_level(metadata: dict[str, Any], tokens: list[str], file: Path) -> Tokenizer:
    merges = []
    for merge in metadata["tokenizer.ggml.merges"]:
        left, _, right = merge[1:].partition(" ")  # a token never is empty, but may begin with a space
        merges.append((merge[0] + left, right))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=metadata.get("tokenizer.ggml.pre") in SPLITS))
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre in SPLITS:
        cut = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, _bytes(use_regex=False)])
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(use_regex=True)])
    elif pre in BYTE_LEVEL:
        tokenizer.pre_tokenizer = _bytes(use_regex=True)
    else:
        known = ", ".join(sorted([*SPLITS, *BYTE_LEVEL]))
        raise UserError(f"{file}: text is cut as {pre!r} before merging, which is not supported ({known} are)")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bytes(use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE: merges are not stored, but follow from the pieces' scores."""
    scores = metadata["tokenizer.ggml.scores"]
    ids = {token: id for id, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += [(score, (ids[left], ids[right]), (left, right)) for left, right in found]
    merges.sort(key=lambda m: (-m[0], m[1]))
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(ids, [pair for _, _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prefix else [replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _frame(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], default_bos: bool) -> None:
    """The tokens put around every text."""
    before, after = [], []
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default_bos):
        before = [(tokens[bos], bos)]
    if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False):
        after = [(tokens[eos], eos)]
    if before or after:
        around = [*(t for t, _ in before), "$A", *(t for t, _ in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, pair=[*around, "$B"], special_tokens=[*before, *after]
        )
