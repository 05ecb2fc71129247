"""A `tokenizers.Tokenizer` from a GGUF file's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lightllm import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Values of tokenizer.ggml.token_type."""

# How each family cuts text before merging: the expressions of the families' own tokenizer.json, which end alike.
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = "|".join([_WORDS, r"\p{N}{1,3}", _SYMBOLS, _REST])
_QWEN2 = "|".join([_WORDS, r"\p{N}", _SYMBOLS, _REST])
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = "|".join([_CASED, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _REST])


class Cut(NamedTuple):
    """A way to cut text. ``whole_words``: a piece that is a token is taken as it is, whatever the merges say; ``bos``:
    texts begin with bos unless the file says otherwise."""

    expression: str
    whole_words: bool = False
    bos: bool = False


CUTS = {
    "llama-bpe": Cut(_LLAMA3, whole_words=True, bos=True),
    "llama3": Cut(_LLAMA3, whole_words=True, bos=True),
    "llama-v3": Cut(_LLAMA3, whole_words=True, bos=True),
    "tekken": Cut(_TEKKEN, whole_words=True, bos=True),
    "qwen2": Cut(_QWEN2),
    "deepseek-r1-qwen": Cut(_QWEN2),
}
BYTE_LEVEL = ("gpt-2", "default", "smollm")
"""These cut as GPT-2 did, by the expression that is `tokenizers`' own."""


def build_tokenizer(metadata: dict[str, Any], file: Path) -> Tokenizer:
    """Raises UserError for a kind of vocabulary that is not known here."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{file} holds no vocabulary")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, file)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, file)
    else:
        raise UserError(f"{file}: a vocabulary of kind {kind!r} is not supported (gpt2 and llama are)")
    types = _types(metadata, tokens)
    added = [
        AddedToken(token, special=type_ != USER_DEFINED, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (CONTROL, USER_DEFINED) or (kind == "llama" and type_ == UNKNOWN)
    ]
    tokenizer.add_tokens(added)
    cut = CUTS.get(metadata.get("tokenizer.ggml.pre", ""))
    _frame(tokenizer, metadata, tokens, default_bos=kind == "llama" or (cut is not None and cut.bos))
    return tokenizer


def _types(metadata: dict[str, Any], tokens: list[str]) -> list[int]:
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    return types if len(types) == len(tokens) else [NORMAL] * len(tokens)


def _byte_level(metadata: dict[str, Any], tokens: list[str], file: Path) -> Tokenizer:
    if not metadata.get("tokenizer.ggml.merges"):
        raise UserError(f"{file}: its vocabulary has no merges")
    merges = []
    for merge in metadata["tokenizer.ggml.merges"]:
        left, _, right = merge[1:].partition(" ")  # a token is never empty, but may begin with a space
        merges.append((merge[:1] + left, right))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pre = metadata.get("tokenizer.ggml.pre", "default")
    cut = CUTS.get(pre)
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=cut is not None and cut.whole_words)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file}: its vocabulary cannot be read: {error}") from error
    tokenizer = Tokenizer(model)
    if cut is not None:
        split = pre_tokenizers.Split(Regex(cut.expression), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, _bytes(use_regex=False)])
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(use_regex=True)])
    elif pre in BYTE_LEVEL:
        tokenizer.pre_tokenizer = _bytes(use_regex=True)
    else:
        known = ", ".join(sorted([*CUTS, *BYTE_LEVEL]))
        raise UserError(f"{file}: text is cut as {pre!r} before merging, which is not supported ({known} are)")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bytes(use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], file: Path) -> Tokenizer:
    """SentencePiece's BPE: merges are not stored, but follow from the pieces' scores."""
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise UserError(f"{file}: its vocabulary has {len(tokens):,} tokens and {len(scores):,} scores")
    ids = {token: id for id, token in enumerate(tokens)}
    types = _types(metadata, tokens)
    merges: list[tuple[str, str]] = []
    for id in sorted((id for id, type_ in enumerate(types) if type_ == NORMAL), key=lambda id: -scores[id]):
        token = tokens[id]
        found = [
            (left, right)
            for cut in range(1, len(token))
            if (left := token[:cut]) in ids and (right := token[cut:]) in ids
        ]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == UNKNOWN), None)
    model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
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
    bos, eos = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    bos, eos = (id if id is not None and id < len(tokens) else None for id in (bos, eos))
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default_bos):
        before = [(tokens[bos], bos)]
    if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False):
        after = [(tokens[eos], eos)]
    if before or after:
        around = [*(t for t, _ in before), "$A", *(t for t, _ in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, pair=[*around, "$B"], special_tokens=[*before, *after]
        )
