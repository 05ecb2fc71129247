"""What several end-to-end tests serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from checkpoints import write_checkpoint, write_tokenizer
from e2e.environment import Environment, build
from e2e.scripted import Scripted

from lightllm.testing import Server, write_scripted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of words. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama-gqa")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    with Server("--model", "demo", "--tool-call-parser", "qwen25") as server:
        yield server


@pytest.fixture(scope="module")
def api(demo: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=840) as client:
        yield client


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with our wheel in it. Whoever adds to it takes away again what harms others."""
    folder = tmp_path_factory.mktemp("fresh")
    found = Environment(folder / "venv")
    found.install(build(ROOT, folder / "ours"))
    return found


@pytest.fixture(scope="session")
def scripted(fresh: Environment, tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    folder = tmp_path_factory.mktemp("scripted")
    write_scripted(folder)
    return Scripted(fresh, folder)
