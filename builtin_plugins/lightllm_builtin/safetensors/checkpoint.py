"""What a Hugging Face folder says of itself, without torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightllm import Adapters, ModelInfo, UserError


class FolderCheckpoint:
    """`lightllm.Checkpoint`. Raises UserError naming the file that is absent or cannot be read."""

    def __init__(self, path: Path, adapters: Adapters | None = None) -> None:
        self.path = path

    def info(self) -> ModelInfo:
        config = self._json("config.json")
        architectures = config.get("architectures") or []
        if not architectures:
            raise UserError(f'{self.path / "config.json"} names no architecture (its "architectures" is empty)')
        tokenizer = self._json("tokenizer_config.json", optional=True)
        special = self._json("special_tokens_map.json", optional=True) | tokenizer
        return ModelInfo(
            path=str(self.path),
            architecture=architectures[0],
            config=config,
            generation=self._json("generation_config.json", optional=True),
            chat_template=self._chat_template(tokenizer),
            bos_token=_content(special.get("bos_token")),
            eos_token=_content(special.get("eos_token")),
        )

    def tokenizer(self) -> Tokenizer:
        file = self.path / "tokenizer.json"
        if file.is_file():
            try:
                return Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises plain Exception
                raise UserError(f"{file} cannot be read: {error}") from error
        if (self.path / "tokenizer.model").is_file() and (lacking := _lacking("sentencepiece", "google.protobuf")):
            raise UserError(
                f"{self.path} has its tokenizer in tokenizer.model: reading it needs `pip install {lacking}`"
            )
        if not any((self.path / name).is_file() for name in _OTHER_TOKENIZERS):
            raise UserError(f"{self.path} has no tokenizer: neither tokenizer.json nor {', '.join(_OTHER_TOKENIZERS)}")
        # sentencepiece, tekken and tiktoken files: transformers knows how to turn each into a fast tokenizer
        from transformers import AutoTokenizer

        try:
            backend: Tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True).backend_tokenizer
        except Exception as error:
            raise UserError(f"{self.path} has no tokenizer that can be read: {error}") from error
        return backend

    def _chat_template(self, tokenizer: dict[str, Any]) -> str | None:
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = tokenizer.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default", next(iter(named.values()), None))
        return template if isinstance(template, str) else None

    def _json(self, name: str, optional: bool = False) -> dict[str, Any]:
        file = self.path / name
        if optional and not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} does not hold a JSON object")
        return content


_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


def _lacking(*modules: str) -> str:
    """Those of the modules that are not installed, by their distributions' names."""
    lacking = []
    for module in modules:
        parent, _, name = module.rpartition(".")
        found = importlib.util.find_spec(parent or name) and importlib.util.find_spec(module)
        if not found:
            lacking.append(name)
    return " ".join(lacking)


def _content(token: Any) -> str | None:
    """A special token, written as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token
