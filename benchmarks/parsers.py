"""What the tool and reasoning parsers cost: microseconds per kB of arguments, in pushes of 4 characters and in one.

    python benchmarks/parsers.py

Time is linear when a row's figures stay level from 1 kB to 100 kB.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from lightllm_builtin.reasoning.think import DeepSeekR1Parser
from lightllm_builtin.tool_parsers.llama3 import Llama3Parser
from lightllm_builtin.tool_parsers.mistral import MistralParser
from lightllm_builtin.tool_parsers.pythonic import PythonicParser
from lightllm_builtin.tool_parsers.qwen25 import Qwen25Parser

TOOLS = [{"type": "function", "function": {"name": "write"}}]
CODE = 'def f(x):\n    return {"a": [x, "天"], \'b\': f"{x}</tool_call>"}  # [TOOL_CALLS]\n'

ROWS: dict[str, tuple[Callable[[], Any], Callable[[str], str]]] = {
    "qwen25": (
        lambda: Qwen25Parser(TOOLS),
        lambda text: f'<tool_call>{{"name": "write", "arguments": {as_string(text)}}}</tool_call>',
    ),
    "qwen25, many small values": (
        lambda: Qwen25Parser(TOOLS),
        lambda text: f'<tool_call>{{"name": "write", "arguments": {as_values(text)}}}</tool_call>',
    ),
    "qwen25, name last": (
        lambda: Qwen25Parser(TOOLS),
        lambda text: f'<tool_call>{{"arguments": {as_string(text)}, "name": "write"}}</tool_call>',
    ),
    "qwen25, undeclared": (
        lambda: Qwen25Parser(TOOLS),
        lambda text: f'<tool_call>{{"name": "read", "arguments": {as_string(text)}}}</tool_call>',
    ),
    "qwen25, text": (lambda: Qwen25Parser(TOOLS), lambda text: text),
    "llama3": (
        lambda: Llama3Parser(TOOLS),
        lambda text: f'{{"name": "write", "parameters": {as_string(text)}}}',
    ),
    "llama3, text full of braces": (lambda: Llama3Parser(TOOLS), lambda text: text),
    "mistral": (lambda: MistralParser(TOOLS), lambda text: f"[TOOL_CALLS]write[ARGS]{as_string(text)}"),
    "mistral, array": (
        lambda: MistralParser(TOOLS),
        lambda text: f'[TOOL_CALLS] [{{"name": "write", "arguments": {as_string(text)}}}]',
    ),
    "pythonic": (lambda: PythonicParser(TOOLS), lambda text: f"[write(text={text!r})]"),
    "deepseek_r1": (lambda: DeepSeekR1Parser(""), lambda text: text + "</think>"),
}


def as_string(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False)


def as_values(text: str) -> str:
    return json.dumps([{"a": word} for word in text.split()], ensure_ascii=False).join(('{"list": ', "}"))


def seconds(make: Callable[[], Any], text: str, size: int) -> float:
    """The best of several runs."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    best = float("inf")
    for _ in range(5):
        parser = make()
        began = time.perf_counter()
        for piece in pieces:
            parser.push(piece)
        parser.close()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    kilobytes = (1, 10, 100)
    write = sys.stdout.write
    columns = [f"{n} kB" for n in kilobytes]
    write(f"{'us per kB':30}{'pushes of 4':>24}{'one push':>30}\n")
    write(f"{'':30}{''.join(f'{c:>10}' for c in [*columns, *columns])}\n")
    for name, (make, answer) in ROWS.items():
        figures = []
        for whole in (False, True):
            for n in kilobytes:
                text = answer(CODE * (n * 1000 // len(CODE)))
                figures.append(seconds(make, text, len(text) if whole else 4) * 1e9 / len(text))
        write(f"{name:30}{''.join(f'{figure:10.1f}' for figure in figures)}\n")


if __name__ == "__main__":
    main()
