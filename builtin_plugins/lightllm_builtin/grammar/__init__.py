"""Structured output by the llguidance library: compiled in a millisecond, masks in microseconds, limits for all of it.

Why this library: benchmarks/README.md.
"""

from collections.abc import Sequence

from lightllm import GrammarBackendRecord, hookimpl


@hookimpl
def lightllm_grammar_backends() -> Sequence[GrammarBackendRecord]:
    return [
        GrammarBackendRecord(
            name="llguidance",
            target="lightllm_builtin.grammar.backend:Llguidance",
            summary="JSON Schema, regular expressions, Lark and GBNF grammars",
        )
    ]
