"""Llama 3.1 to 3.3: ``{"name": ..., "parameters": {...}}``, with or without ``<|python_tag|>`` before it.

The models put the object anywhere, so any ``{`` in the text may begin a call; other JSON stays content, also with a
call inside. Calls may be separated by ``;`` and whitespace.
Reference: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/ (JSON based tool calling).
"""

from __future__ import annotations

import re

from lightllm_builtin.tool_parsers.calls import CallParser
from lightllm_builtin.tool_parsers.scan import Steps, first_of

_SEPARATOR = re.compile(r"[; \t\r\n]+")


class Llama3Parser(CallParser):
    markers = first_of("{", "<|python_tag|>")

    def read_call(self, marker: str) -> Steps[None]:
        if marker != "{":
            yield from self.space()
            yield from self.expect("{")
        yield from self.read_object(bare=marker == "{")

    def read_end(self) -> Steps[None]:
        yield from self.run(_SEPARATOR)
