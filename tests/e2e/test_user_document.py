"""LightLLM's own document: its command line and its client examples, unchanged, against the real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.document import COMMANDS, EXAMPLES, PARSERS, PORT, run_example, serve

from lightllm.testing import Server


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "with a tool-call parser"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(request.param, model="demo") as running:
        assert running.url.endswith(f":{PORT}")
        yield running


def test_the_document_has_two_commands_three_parsers_and_four_examples() -> None:
    assert [command[2] for command in COMMANDS] == ["lightllm.server.api_server"] * 2
    assert "--tool_call_parser" in COMMANDS[1]
    assert PARSERS == ["qwen25", "llama3", "mistral"]
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_example_prints_an_answer(server: Server, number: int) -> None:
    """Whatever model name it asks for. The demo model is too small to decide on a call of its own accord."""
    out = run_example(number, max_tokens=60)
    assert "错误" not in out
    assert out.removeprefix("回复:").strip()
