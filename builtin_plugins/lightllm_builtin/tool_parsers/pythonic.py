"""Llama 3.2 (1B, 3B), Llama 4, ToolACE: ``[name(key='value', other=3), ...]``, a list of Python calls.

Arguments are Python literals (true, false and null pass too) and must become JSON, so they leave value by value; a
value that is no literal is a fault. Text around the list is content; ``<|python_start|>`` and ``<|python_end|>`` go.
Reference: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_2/ and .../llama4/.
"""

from __future__ import annotations

import ast
import json
import re
import warnings

from lightllm_builtin.tool_parsers.calls import COMMAS, CallParser, without_surrogates
from lightllm_builtin.tool_parsers.scan import PYTHON, Fault, Steps, first_of

_NAME = re.compile(r"[-.\w]+")


class PythonicParser(CallParser):
    markers = first_of("[", "<|python_start|>")
    syntax = PYTHON

    def read_call(self, marker: str) -> Steps[None]:
        if marker != "[":
            yield from self.space()
            yield from self.expect("[")
        yield from self.read_list(self._call)

    def read_end(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.literal("<|python_end|>")):
            self.drop()

    def _call(self) -> Steps[None]:
        name = yield from self.text_of(self.run(_NAME))
        yield from self.space()
        yield from self.expect("(")
        if name not in self.declared:
            self.release()
            return (yield from self.source.nested(self.content, ")"))
        separator = "{"
        while True:
            yield from self.run(COMMAS)
            if (yield from self.literal(")")):
                break
            key = yield from self.text_of(self.run(_NAME))
            if not key:
                raise Fault
            yield from self.space()
            yield from self.expect("=")
            yield from self.space()
            value = _json((yield from self.text_of(self.value())))
            if separator == "{":
                self.start(name)
            self.arguments(f'{separator}"{key}": {value}')
            separator = ", "
            self.drop()
        if separator == "{":
            self.start(name, "{")
        self.arguments("}")
        self.drop()


class _Words(ast.NodeTransformer):
    """JSON's words for Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        words = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(words[node.id]), node) if node.id in words else node


def _json(literal: str) -> str:
    """A Python literal as JSON. Raises `Fault`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(literal, mode="eval")
        text = json.dumps(ast.literal_eval(_Words().visit(tree)), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Fault from None
    return without_surrogates(text)
