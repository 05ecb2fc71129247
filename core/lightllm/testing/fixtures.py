"""Fixtures for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lightllm.testing.checkpoints import write_tiny_llama
from lightllm.testing.serving import Server, serve


@pytest.fixture
def lightllm_server() -> Iterator[Callable[..., Server]]:
    """`lightllm.testing.serve` as a function: the servers it starts are gone after the test."""
    with ExitStack() as stack:

        def start(*arguments: Any, **options: Any) -> Server:
            return stack.enter_context(serve(*arguments, **options))

        yield start


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of bytes and a chat template. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(folder)
    return folder
