"""A stranger's plugin: built as a wheel, installed beside our wheel in a fresh environment, served by the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from checkpoints import write_checkpoint, write_tokenizer
from e2e.environment import Environment, build
from safetensors.torch import save_file

from lightllm.testing import Server

PLUGIN = Path(__file__).parent / "third_party"
SIZE = 30


@pytest.fixture
def environment(fresh: Environment) -> Iterator[Environment]:
    """Without the plugin again after the test."""
    yield fresh
    fresh.uninstall("tiny-arch")


@pytest.fixture
def plugin_source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PLUGIN, tmp_path / "plugin"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    sys.path.insert(0, str(PLUGIN / "src"))
    try:
        from tiny_arch.model import checkpoint  # type: ignore[import-not-found]

        save_file(checkpoint(SIZE), folder / "model.safetensors")
    finally:
        sys.path.remove(str(PLUGIN / "src"))
    config = {
        "architectures": ["TinyForCausalLM"],
        "vocab_size": SIZE,
        "hidden_size": SIZE,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, SIZE)
    yield folder


def complete(server: Server, prompt: str) -> str:
    body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=600)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_a_third_party_model_is_served(environment: Environment, plugin_source: Path, tiny_model: Path) -> None:
    environment.install(build(plugin_source, plugin_source / "dist"))
    with Server(
        "--model", str(tiny_model), "--served-model-name", "m", "--no-plugin", "qwen2", command=environment.command()
    ) as server:
        assert complete(server, "w1 w7").split() == ["w8", "w9", "w10", "w11"]
        assert "tiny-arch 1.2.3" in server.log


def test_a_broken_third_party_plugin_harms_nobody_and_is_named(
    environment: Environment, plugin_source: Path, tiny_model: Path, tmp_path: Path
) -> None:
    init = plugin_source / "src" / "tiny_arch" / "__init__.py"
    init.write_text(init.read_text() + "\nimport a_package_that_is_not_there\n")
    environment.install(build(plugin_source, plugin_source / "dist"))
    (tmp_path / "llama").mkdir()
    write_checkpoint(tmp_path / "llama", "llama-gqa")
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "llama")
    with Server(
        "--model", str(tmp_path / "llama"), "--served-model-name", "m", command=environment.command()
    ) as server:
        complete(server, "w1 w7")
        assert "tiny-arch" in server.log
        assert "1.2.3" in server.log
        assert "a_package_that_is_not_there" in server.log
    # and its own model is refused with the reason in the line
    done = subprocess.run([*environment.command(), "--model", str(tiny_model)], capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "TinyForCausalLM" in line and "a_package_that_is_not_there" in line and "tiny-arch" in line
