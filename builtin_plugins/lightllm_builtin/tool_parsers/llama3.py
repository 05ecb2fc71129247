"""Llama 3.1 to 3.3: ``{"name": ..., "parameters": {...}}``, with or without ``<|python_tag|>`` before it.

The models put the object anywhere, so any ``{`` in the text may begin a call; other JSON stays content, also with a
call inside. Calls may be separated by ``;`` and whitespace.
Reference: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/ (JSON based tool calling).
"""

from __future__ import annotations

import json
import re

from lightllm.grammar import Fixed, Grammar, Joined, Marker, OneOf, Regex, Trigger, Triggered
from lightllm_builtin.tool_parsers.calls import CallParser, arguments_of, call_object, several
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

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        call = OneOf(tuple(call_object(tool, "parameters", required=required) for tool in self.tools))
        if required:
            return several(call, Fixed("; "), parallel=parallel)
        # JSON is no call before it has named a tool
        named = [
            Trigger(
                Regex(rf'\{{\s*"name"\s*:\s*{re.escape(json.dumps(tool["function"]["name"], ensure_ascii=False))}'),
                Joined((Fixed(', "parameters": '), arguments_of(tool, required=required), Fixed("}"))),
            )
            for tool in self.tools
        ]
        return Triggered((*named, Trigger(Marker("<|python_tag|>"), call)), most=None if parallel else 1)
