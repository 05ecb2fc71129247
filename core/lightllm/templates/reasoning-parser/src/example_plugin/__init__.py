"""Thought written as ``<<thought>> ... <<end>>`` at the beginning of an answer.

This module only says what there is. It is imported whenever lightllm-serve starts; `parser` when it is chosen.
"""

from collections.abc import Sequence

from lightllm import ReasoningParserRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_reasoning_parsers() -> Sequence[ReasoningParserRecord]:
    return [
        ReasoningParserRecord(
            name="example-plugin",
            target="example_plugin.parser:ExamplePluginParser",
            summary="<<thought>> ... <<end>>",
        )
    ]
