"""What several end-to-end tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint, write_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of words. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama-gqa")
    write_tokenizer(folder)
    return folder
