"""What a folder says of its model, without its weights and without torch: the server asks for this, too."""

from __future__ import annotations

import json
from pathlib import Path

from lightllm import Adapters, ModelInfo, UserError
from tokenizers import Tokenizer


class ExamplePluginCheckpoint:
    """`lightllm.Checkpoint`."""

    def __init__(self, path: Path, adapters: Adapters) -> None:
        """``adapters`` are for formats that call tensors otherwise than Hugging Face does; not this one."""
        self.path = path

    def info(self) -> ModelInfo:
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            architecture = config["architectures"][0]
        except (OSError, ValueError, LookupError) as error:
            # shown as one line: this is the user's to mend
            raise UserError(f"{file} cannot be read: {error!r}") from error
        template = self.path / "chat_template.jinja"
        return ModelInfo(
            path=str(self.path),
            architecture=architecture,
            config=config,
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        )

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.path / "tokenizer.json"))
