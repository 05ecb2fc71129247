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


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "with a tool-call parser"])
def server(request: pytest.FixtureRequest) -> Iterator[RealServer]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"another program listens on port {PORT}, which the document's examples call")
    module, *options = COMMANDS[request.param][2:]
    options[options.index("--model_dir") + 1] = "demo"
    with RealServer(*options, command=(sys.executable, "-m", module)) as running:
        assert running.url.endswith(f":{PORT}")
        yield running


def run_example(number: int) -> str:
    code = EXAMPLES[number].replace('"max_tokens": 1000', '"max_tokens": 60')  # time, nothing else
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_document_has_two_commands_and_four_examples() -> None:
    assert [command[2] for command in COMMANDS] == ["lightllm.server.api_server"] * 2
    assert "--tool_call_parser" in COMMANDS[1]
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_example_prints_an_answer(server: RealServer, number: int) -> None:
    """Whatever model name it asks for. The demo model is too small to decide on a call of its own accord."""
    out = run_example(number)
    assert "错误" not in out
    assert out.removeprefix("回复:").strip()
