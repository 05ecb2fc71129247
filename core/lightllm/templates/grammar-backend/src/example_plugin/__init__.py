"""Answers held to a grammar by llguidance.

This module only says what there is. It is imported whenever lightllm-serve starts; `backend` where the first request
needs it.
"""

from collections.abc import Sequence

from lightllm import GrammarBackendRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_grammar_backends() -> Sequence[GrammarBackendRecord]:
    return [
        GrammarBackendRecord(
            name="example-plugin",
            target="example_plugin.backend:ExamplePluginBackend",
            priority=-10,  # under `--grammar-backend auto` others come first
            summary="JSON Schema and regular expressions",
        )
    ]
