"""LightLLM's own document: its command line and its client examples, unchanged, against the real server."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import RealServer

DOCUMENT = (Path(__file__).parent / "data" / "lightllm-openai.txt").read_text(encoding="utf-8")
EXAMPLES = [
    # an example goes from its imports to the last line that is code
    "import requests\n" + re.split(r"^(?:\d\. |Function Calling)", rest, flags=re.MULTILINE)[0]
    for rest in DOCUMENT.split("import requests\n")[1:]
]
COMMANDS = [
    shlex.split(text.replace("\\\n", " ")) for text in re.findall(r"^python -m (?:.*\\\n)*.*$", DOCUMENT, re.MULTILINE)
]
PORT = 8088


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"another program listens on port {PORT}, which the document's examples call")
    module, *options = COMMANDS[0][2:]
    options[options.index("--model_dir") + 1] = "demo"
    with RealServer(*options, command=(sys.executable, "-m", module)) as running:
        yield running


def run_example(number: int) -> str:
    code = EXAMPLES[number].replace('"max_tokens": 1000', '"max_tokens": 60')  # time, nothing else
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_document_has_two_commands_and_four_examples() -> None:
    assert [command[2] for command in COMMANDS] == ["lightllm.server.api_server"] * 2
    assert len(EXAMPLES) == 4
    for example in EXAMPLES:
        compile(example, "example", "exec")


def test_the_command_serves_whatever_model_name_is_asked_for(server: RealServer) -> None:
    assert server.url.endswith(f":{PORT}")
    assert run_example(0).startswith("回复: ")
    assert len(run_example(0)) > len("回复: \n")


def test_the_streaming_example_prints_text(server: RealServer) -> None:
    out = run_example(1)
    assert out.strip() and "错误" not in out
