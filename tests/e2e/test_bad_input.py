"""What a user can get wrong at the command line: one clear line, the right exit code, no traceback."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from servers import run_command


def one_line(*arguments: str) -> str:
    code, out = run_command(*arguments)
    assert code in (1, 2), out
    assert "Traceback" not in out
    errors = [line for line in out.splitlines() if "error:" in line]
    assert len(errors) == 1, out
    return errors[0]


def copy(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_model_folder_that_is_not_there() -> None:
    assert "/no/such/folder" in one_line("--model", "/no/such/folder")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "config.json" in one_line("--model", str(tmp_path))


def test_a_name_that_nothing_knows() -> None:
    line = one_line("--model", "no-such-model")
    assert "no-such-model" in line and "sources" in line


def test_corrupt_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    file = copy(checkpoint, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in one_line("--model", str(tmp_path))


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path) -> None:
    config = copy(checkpoint, tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 4}))
    assert "model.layers.3." in one_line("--model", str(tmp_path))


def test_a_folder_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    (copy(checkpoint, tmp_path) / "tokenizer.json").unlink()
    line = one_line("--model", str(tmp_path))
    assert "tokenizer.json" in line and str(tmp_path) in line


def test_an_unsupported_architecture(checkpoint: Path, tmp_path: Path) -> None:
    config = copy(checkpoint, tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["GPT5ForCausalLM"]}))
    line = one_line("--model", str(tmp_path))
    assert "GPT5ForCausalLM" in line and "LlamaForCausalLM" in line


def test_a_port_that_is_taken(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in one_line("--model", str(checkpoint), "--port", port)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "many"], "--port"),
        (["--dtype", "int3"], "bfloat16"),
        (["--prot", "8000"], "--port"),
        (["--kv-cache-memory", "lots"], "4GiB"),
        (["--config", "/no/such/file.toml"], "/no/such/file.toml"),
        (["--tool-call-parser", "nonsense"], "nonsense"),
        (["--attention-backend", "nonsense"], "torch"),
        (["--max-model-len", "100000000"], "--max-model-len"),
        (["--tp", "2"], "--tp"),
    ],
)
def test_a_bad_option_value(checkpoint: Path, arguments: list[str], said: str) -> None:
    assert said in one_line("--model", str(checkpoint), *arguments)
