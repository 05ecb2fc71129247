"""Mistral: ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`` (tokenizers v3 to v7), and from v11 on
``[TOOL_CALLS]name{...}``, ``[TOOL_CALLS]name[ARGS]{...}`` or ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`` for each call.

Reference: mistral_common/tokens/tokenizers/instruct.py (InstructTokenizerV3, V7, V11, V13).
"""

from __future__ import annotations

import re

from lightllm_builtin.tool_parsers.calls import CallParser
from lightllm_builtin.tool_parsers.scan import Fault, Steps, first_of

_NAME = re.compile(r"[^\s{}\[\]]+")


class MistralParser(CallParser):
    markers = first_of("[TOOL_CALLS]")

    def read_call(self, marker: str) -> Steps[None]:
        yield from self.space()
        while (yield from self.literal(marker)):
            yield from self.space()  # said twice: its bracket is no array's
        if (yield from self.literal("[")):
            yield from self.read_list(self._object)
        elif (yield from self.source.peek()) == "{":
            yield from self._object()
        else:
            yield from self._named()

    def _object(self) -> Steps[None]:
        yield from self.expect("{")
        yield from self.read_object()

    def _named(self) -> Steps[None]:
        name = yield from self.text_of(self.run(_NAME))
        yield from self.space()
        if (yield from self.literal("[CALL_ID]")):
            yield from self.run(_NAME)
        yield from self.literal("[ARGS]")
        yield from self.space()
        if (yield from self.source.peek()) != "{":
            raise Fault
        if name in self.declared:
            self.start(name)
            yield from self.source.nested(self.arguments)
        else:
            self.release()
            yield from self.source.nested(self.content)
