"""The scripted model's files: its chat template makes the script of what is to be said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightllm.testing.checkpoints import byte_tokenizer, write_checkpoint_files
from lightllm.testing.scripted import ARCHITECTURE

END, SCRIPT, ANSWER = "<|end|>", "<|script|>", "<|answer|>"
# written with a bar, as a chat format's: parsers tell by it that a tag before it was somebody's text
SPECIAL = (END, SCRIPT, ANSWER, "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Marks of several families, as their checkpoints have them."""

REPEATED = ("[", "]", "-", '{"a": [', "]}")
"""What long answers repeat: tokens of many of each keep these answers short."""

TEMPLATE = (
    "{% for message in messages[:-1] %}{{ message['content'] }}{% endfor %}"
    "{% if says is defined %}{{ messages[-1]['content'] }}{% endif %}"
    f"{SCRIPT}{{{{ begun }}}}{{{{ says if says is defined else messages[-1]['content'] }}}}{ANSWER}{{{{ begun }}}}"
)
"""``says``: what to answer; the last message's content unless given. ``begun``: how much of the answer the prompt has
written already, before that."""


def write_scripted(folder: Path, *, special: Sequence[str] = (), added: Sequence[str] = ()) -> None:
    """``special``, ``added``: further tokens, the marks of a format of your own."""
    tokenizer = byte_tokenizer(special=(*SPECIAL, *special), added=(*ADDED, *added), repeated=REPEATED)
    config = {
        "architectures": [ARCHITECTURE],
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 8192,
        "script_token_id": tokenizer.token_to_id(SCRIPT),
        "answer_token_id": tokenizer.token_to_id(ANSWER),
    }
    tensors = {"embed.weight": np.eye(tokenizer.get_vocab_size(), 8, dtype=np.float32)}
    write_checkpoint_files(
        folder, config=config, tokenizer=tokenizer, tensors=tensors, template=TEMPLATE, eos_token=END
    )


def is_scripted(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("architectures") == [ARCHITECTURE]
