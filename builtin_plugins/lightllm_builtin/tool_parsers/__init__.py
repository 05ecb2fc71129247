"""Tool-call formats of the model families served most. How calls are told from content: `calls.CallParser`."""

from collections.abc import Sequence

from lightllm import ToolParserRecord, hookimpl


@hookimpl
def lightllm_tool_parsers() -> Sequence[ToolParserRecord]:
    return [
        ToolParserRecord(
            name="qwen25",
            target="lightllm_builtin.tool_parsers.qwen25:Qwen25Parser",
            summary="Qwen 2.5 and 3: <tool_call>{...}</tool_call>",
        ),
        ToolParserRecord(
            name="hermes",
            target="lightllm_builtin.tool_parsers.qwen25:Qwen25Parser",
            summary="Hermes 2 Pro and later: the same format as qwen25",
        ),
        ToolParserRecord(
            name="llama3",
            target="lightllm_builtin.tool_parsers.llama3:Llama3Parser",
            summary='Llama 3.1 to 3.3: {"name": ..., "parameters": {...}}',
        ),
        ToolParserRecord(
            name="mistral",
            target="lightllm_builtin.tool_parsers.mistral:MistralParser",
            summary="Mistral, all tokenizer versions: [TOOL_CALLS] [{...}], [TOOL_CALLS]name{...}",
        ),
        ToolParserRecord(
            name="pythonic",
            target="lightllm_builtin.tool_parsers.pythonic:PythonicParser",
            summary="Llama 3.2 and 4, ToolACE: [name(key='value')]",
        ),
    ]
