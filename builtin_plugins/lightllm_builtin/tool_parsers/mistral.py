"""Mistral: ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`` (tokenizers v3 to v7), and from v11 on
``[TOOL_CALLS]name{...}``, ``[TOOL_CALLS]name[ARGS]{...}`` or ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`` for each call.

Reference: mistral_common/tokens/tokenizers/instruct.py (InstructTokenizerV3, V7, V11, V13).
"""

from __future__ import annotations

import re
import secrets
import string

from lightllm.grammar import Fixed, Grammar, Joined, Marker, OneOf, Regex, Trigger, Triggered
from lightllm_builtin.tool_parsers.calls import CallParser, arguments_of, call_object, several
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

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        """Either form: the model knows which is its own."""
        begin = Marker("[TOOL_CALLS]")
        objects = OneOf(tuple(call_object(tool, "arguments", required=required) for tool in self.tools))
        array = Joined((Regex(" ?"), Fixed("["), several(objects, Fixed(", "), parallel=parallel), Fixed("]")))
        names = [tool for tool in self.tools if _NAME.fullmatch(tool["function"]["name"])]
        named = OneOf(
            tuple(
                Joined((Fixed(tool["function"]["name"]), Marker("[ARGS]"), arguments_of(tool, required=required)))
                for tool in names
            )
        )
        if required:
            ways = [array, several(named, begin, parallel=parallel)] if names else [array]
            return Joined((begin, OneOf(tuple(ways))))
        then = OneOf((array, named)) if names else array
        return Triggered((Trigger(begin, then),), most=None if parallel else 1)

    def call_id(self) -> str:
        """Nine letters and digits: the templates accept nothing else."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
