"""Qwen 2.5, Qwen 3, Hermes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number, text around them.

After a call its closing tag is dropped with the whitespace before it; where it is missing nothing is missed.
Reference: the chat templates of Qwen/Qwen2.5-7B-Instruct and NousResearch/Hermes-2-Pro-Llama-3-8B.
"""

from __future__ import annotations

from lightllm.grammar import Fixed, Grammar, Joined, Marker, OneOf, Trigger, Triggered
from lightllm_builtin.tool_parsers.calls import CallParser, call_object, several
from lightllm_builtin.tool_parsers.scan import Steps, first_of


class Qwen25Parser(CallParser):
    markers = first_of("<tool_call>")

    def read_call(self, marker: str) -> Steps[None]:
        yield from self.space()
        yield from self.expect("{")
        yield from self.read_object()

    def read_end(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.literal("</tool_call>")):
            self.drop()

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        begin, end = Marker("<tool_call>"), Marker("</tool_call>")
        objects = OneOf(tuple(call_object(tool, "arguments", required=required) for tool in self.tools))
        call = Joined((Fixed("\n"), objects, Fixed("\n"), end))
        if required:
            return several(Joined((begin, call)), Fixed("\n"), parallel=parallel)
        return Triggered((Trigger(begin, call),), most=None if parallel else 1)
