import functools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from lightllm.tokenizer import IncrementalDecoder, StopStrings, Tokenizer, level_bytes


@functools.cache
def byte_level(special: bool = True) -> Tokenizer:
    """GPT-2's alphabet and a few merges, so that characters are cut in all places."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("ä", "½"), ("l", "l"), ("Ã", "©")]
    vocabulary = {token: id for id, token in enumerate(alphabet)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|begin|>", "<|end|>"])
    raw.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("<日é>", special=False)])
    return Tokenizer(raw, bos_token="<|begin|>", eos_token="<|end|>")


@functools.cache
def sentencepiece(scheme: str = "llama") -> Tokenizer:
    """Metaspace with byte fallback, decoded as Llama 2's tokenizer.json does, or as Gemma's."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz.,!é日", "▁a", "he", "▁he", "ll", "▁▁"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [("▁", "a"), ("h", "e"), ("▁", "he"), ("l", "l"), ("▁", "▁")]
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence(steps if scheme == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(raw, bos_token="<s>", eos_token="</s>")


@functools.cache
def metaspace() -> Tokenizer:
    tokens = ["<unk>", "▁", *"abcdefgh", "▁a", "▁b", "▁▁c"]
    raw = RawTokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens(["<s>"])
    return Tokenizer(raw)


@functools.cache
def word_piece() -> Tokenizer:
    tokens = ["[UNK]", "a", "b", "##c", "##d", ".", "word"]
    raw = RawTokenizer(models.WordPiece(vocab={token: id for id, token in enumerate(tokens)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(raw)


@functools.cache
def byte_level_and_more() -> Tokenizer:
    """A byte-level decoder with a step after it, which no table of bytes can follow."""
    tokenizer = byte_level()
    raw = RawTokenizer.from_str(tokenizer.raw.to_str())
    raw.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("zz"), "Z")])
    return Tokenizer(raw)


KINDS = {
    "byte level": byte_level,
    "llama": sentencepiece,
    "gemma": lambda: sentencepiece("gemma"),
    "metaspace": metaspace,
    "word piece": word_piece,
}


def pushed(tokenizer: Tokenizer, ids: list[int], sizes: list[int], *, skip: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    texts = []
    position = 0
    for size in [*sizes, len(ids)]:
        texts.append(decoder.push(ids[position : position + size]))
        position += size
    return [*texts, decoder.close()]


SIZES = st.lists(st.integers(1, 4), max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans(), sizes=SIZES)
def test_pushes_joined_are_the_whole_decoded(kind, data, skip, sizes):
    tokenizer = KINDS[kind]()
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    ids = st.sampled_from([i for i in range(tokenizer.vocab_size + 2) if tokenizer.raw.id_to_token(i) not in fallback])
    pieces = ids.map(lambda id: [id])
    if tokenizer.alphabet.byte_fallback:
        # whole characters in byte tokens; runs that are no UTF-8 have a test of their own
        characters = st.characters(codec="utf-8").filter(lambda c: c != " ")
        pieces |= characters.map(lambda c: [tokenizer.raw.token_to_id(f"<0x{b:02X}>") for b in c.encode()])
    generated = [id for piece in data.draw(st.lists(pieces, max_size=30)) for id in piece]
    expected = tokenizer.decode(generated, skip_special_tokens=skip)
    assert "".join(pushed(tokenizer, generated, sizes, skip=skip)) == expected


@given(ids=st.lists(st.integers(0, 270), max_size=40), sizes=SIZES)
def test_a_decoder_of_several_steps_is_followed_too(ids, sizes):
    tokenizer = byte_level_and_more()
    z = tokenizer.raw.token_to_id("z")
    ids = [i for i in ids if i != z]  # a replacement across tokens cannot be streamed
    valid = tokenizer.decode(ids)
    if "\ufffd" not in valid:
        assert "".join(pushed(tokenizer, ids, sizes)) == valid


@pytest.mark.parametrize("kind", ["byte level", "llama", "gemma"])
@given(text=st.text(), sizes=SIZES)
def test_no_push_ends_within_a_character(kind, text, sizes):
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    texts = pushed(tokenizer, ids, sizes)
    assert "".join(texts) == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in texts)


def test_an_emoji_comes_whole_with_its_last_token():
    tokenizer = sentencepiece()
    ids = [tokenizer.raw.token_to_id(f"<0x{b:02X}>") for b in "🙂!".encode()]
    decoder = tokenizer.decoder()
    assert [decoder.push([id]) for id in ids] == ["", "", "", "🙂", "!"]


@given(data=st.binary(max_size=30), sizes=SIZES)
def test_a_broken_run_of_byte_tokens_keeps_its_whole_characters(data, sizes):
    """`decode` would replace all of the run; its characters are out before that is known."""
    tokenizer = sentencepiece("gemma")
    ids = [tokenizer.raw.token_to_id(f"<0x{byte:02X}>") for byte in data]
    text = "".join(pushed(tokenizer, ids, sizes))
    kept = data.decode("utf-8", "ignore")
    assert text.replace("\ufffd", "") == kept.replace("\ufffd", "")
    if "\ufffd" not in kept:
        assert text.count("\ufffd") == len(data) - len(kept.encode())


@pytest.mark.parametrize("kind", ["byte level", "llama"])
def test_invalid_bytes_for_ever_are_neither_held_back_nor_slow(kind):
    tokenizer = KINDS[kind]()
    token = "ÿ" if kind == "byte level" else "<0xFF>"
    bad = tokenizer.raw.token_to_id(token)
    decoder = tokenizer.decoder()
    started = time.perf_counter()
    for count in range(20_000):
        assert decoder.push([bad]) == "\ufffd", count
    assert time.perf_counter() - started < 5
    first = tokenizer.raw.token_to_id("ð" if kind == "byte level" else "<0xF0>")
    assert "".join(pushed(tokenizer, [first] * 100, [1] * 100)) == "\ufffd" * 100


def test_special_tokens_are_shown_only_when_asked():
    tokenizer = byte_level()
    ids = tokenizer.encode("<|begin|>he<|end|>")
    assert "".join(pushed(tokenizer, ids, [1] * 9)) == "he"
    assert "".join(pushed(tokenizer, ids, [1] * 9, skip=False)) == "<|begin|>he<|end|>"


def test_the_post_processor_decides_about_bos():
    tokenizer = sentencepiece()
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == 1
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 1
    assert tokenizer.eos_id == 2


@given(st.text())
def test_token_bytes_joined_are_the_text(text):
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(id) for id in ids) == text.encode()


@pytest.mark.parametrize(
    ("tokenizer", "token", "expected"),
    [
        (byte_level, "ðŁ", b"\xf0\x9f"),
        (byte_level, "Ġt", b" t"),
        (byte_level, "<日é>", "<日é>".encode()),
        (byte_level, "<|end|>", b"<|end|>"),
        (sentencepiece, "▁he", b" he"),
        (sentencepiece, "<0xE4>", b"\xe4"),
        (sentencepiece, "日", "日".encode()),
        (metaspace, "▁a", b" a"),
    ],
)
def test_the_bytes_of_a_token(tokenizer, token, expected):
    t = tokenizer()
    assert t.token_bytes(t.raw.token_to_id(token)) == expected


def test_token_text_of_half_a_character_is_the_replacement_character():
    tokenizer = byte_level()
    assert tokenizer.token_text(tokenizer.raw.token_to_id("ðŁ")) == "\ufffd"
    assert tokenizer.token_bytes(10**6) == b""


def test_the_byte_level_alphabet_is_that_of_the_tokenizers_library():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert sorted(level_bytes(char) for char in alphabet) == [bytes([byte]) for byte in range(256)]
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("né\n 日")
    assert level_bytes(spelt[0][0]) == "né\n 日".encode()


# --- stop strings


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first position at which some stop string is complete; there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


FEW = st.text("ab ", min_size=1, max_size=6)


@given(
    text=st.text("ab ", max_size=60), stops=st.lists(FEW, min_size=1, max_size=5), sizes=SIZES, include=st.booleans()
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, sizes, include):
    searching = StopStrings(stops, include=include)
    out, found, position = "", None, 0
    for size in [*sizes, len(text)]:
        piece, stop = searching.push(text[position : position + size])
        position += size
        assert stop == found or found is None
        out, found = out + piece, stop
        # nothing of a coming match may be out, and nothing sure may be held back
        sure, match = reference(text, stops)
        if match is None:
            seen = text[:position]
            held = max(
                (n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])),
                default=0,
            )
            assert out == seen[: len(seen) - held]
        else:
            assert (sure + match if include else sure).startswith(out)
    out += searching.close()
    expected, stop = reference(text, stops)
    assert found == stop
    assert out == (expected + stop if include and stop else expected)


def test_nothing_follows_a_match():
    stops = StopStrings(["\n\n"])
    assert stops.push("one\n") == ("one", None)
    assert stops.push("\ntwo") == ("", "\n\n")
    assert stops.push("three") == ("", "\n\n")
    assert stops.close() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_stop_strings_are_linear_in_the_text():
    stops = StopStrings(["a" * 5000 + "b"])
    started = time.perf_counter()
    for _ in range(20_000):
        stops.push("aaaaaaaaaa")
    assert time.perf_counter() - started < 5
