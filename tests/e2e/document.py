"""LightLLM's own document for users of its OpenAI interface: its commands and examples, to be run unchanged."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightllm.testing import Server

DOCUMENT = (Path(__file__).parent / "data" / "lightllm-openai.txt").read_text(encoding="utf-8")
EXAMPLES = [
    # an example goes from its imports to the last line that is code
    "import requests\n" + re.split(r"^(?:\d\. |Function Calling)", rest, flags=re.MULTILINE)[0]
    for rest in DOCUMENT.split("import requests\n")[1:]
]
COMMANDS = [
    shlex.split(text.replace("\\\n", " ")) for text in re.findall(r"^python -m (?:.*\\\n)*.*$", DOCUMENT, re.MULTILINE)
]
PARSERS = re.findall(r"^# 可选的参数为 (.*)$", DOCUMENT, re.MULTILINE)[0].split(", ")
PORT = 8088


def serve(
    number: int, *, model: str, parser: str | None = None, more: tuple[str, ...] = (), python: str = sys.executable
) -> Server:
    """The document's command ``number``, for this model; skips the test where the document's port is taken."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"another program listens on port {PORT}, which the document's examples call")
    module, *options = COMMANDS[number][2:]
    options[options.index("--model_dir") + 1] = model
    if parser is not None:
        options[options.index("--tool_call_parser") + 1] = parser
    return Server(*options, *more, command=(python, "-m", module))


def run_example(number: int, max_tokens: int = 1000) -> str:
    """What it prints. ``max_tokens``: to save time, nothing else."""
    assert '"max_tokens": 1000' in EXAMPLES[number]
    code = EXAMPLES[number].replace('"max_tokens": 1000', f'"max_tokens": {max_tokens}')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
