"""Tool calls written as ``<<name {"argument": "value"}>>``.

This module only says what there is. It is imported whenever lightllm-serve starts; `parser` when it is chosen.
"""

from collections.abc import Sequence

from lightllm import ToolParserRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_tool_parsers() -> Sequence[ToolParserRecord]:
    return [
        ToolParserRecord(
            name="example-plugin",
            target="example_plugin.parser:ExamplePluginParser",
            summary='<<name {"argument": "value"}>>',
        )
    ]
