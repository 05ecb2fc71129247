"""Tool-call formats of the model families served most. How calls are told from content: `calls.CallParser`."""

from collections.abc import Collection, Sequence

from lightllm import ModelInfo, ToolParserRecord, hookimpl


def _template(info: ModelInfo) -> str:
    return (info.chat_template or "").replace('\\"', '"')  # it may stand in a string of the template


def _qwen25(info: ModelInfo, tokens: Collection[str]) -> str | None:
    template = _template(info)
    if "<tool_call>" not in template:
        return "the chat template does not write <tool_call>"
    # Qwen3-Coder, GLM and others put something else between the same tags
    return None if '"arguments"' in template else "calls are no JSON between the <tool_call>s of the chat template"


def _llama3(info: ModelInfo, tokens: Collection[str]) -> str | None:
    template = _template(info)
    return None if '"parameters": ' in template else 'the chat template does not write {"name": ..., "parameters": ...}'


def _mistral(info: ModelInfo, tokens: Collection[str]) -> str | None:
    if "[TOOL_CALLS]" in tokens or "[TOOL_CALLS]" in _template(info):
        return None
    return "neither the tokenizer nor the chat template knows [TOOL_CALLS]"


def _pythonic(info: ModelInfo, tokens: Collection[str]) -> str | None:
    template = _template(info)
    if "<|python_start|>" in tokens or "[func_name1(" in template:
        return None
    return "the tokenizer does not know <|python_start|>, and the chat template shows no [name(key=value)]"


def _any(info: ModelInfo, tokens: Collection[str]) -> None:
    """The model may not know it, but a grammar can make it write calls this way."""


@hookimpl
def lightllm_tool_parsers() -> Sequence[ToolParserRecord]:
    return [
        ToolParserRecord(
            name="qwen25",
            target="lightllm_builtin.tool_parsers.qwen25:Qwen25Parser",
            summary="Qwen 2.5 and 3: <tool_call>{...}</tool_call>",
            matches=_qwen25,
        ),
        ToolParserRecord(
            name="hermes",
            target="lightllm_builtin.tool_parsers.qwen25:Qwen25Parser",
            summary="Hermes 2 Pro and later: the same format as qwen25",
            matches=_any,
            priority=-1,
        ),
        ToolParserRecord(
            name="llama3",
            target="lightllm_builtin.tool_parsers.llama3:Llama3Parser",
            summary='Llama 3.1 to 3.3: {"name": ..., "parameters": {...}}',
            matches=_llama3,
        ),
        ToolParserRecord(
            name="mistral",
            target="lightllm_builtin.tool_parsers.mistral:MistralParser",
            summary="Mistral, all tokenizer versions: [TOOL_CALLS] [{...}], [TOOL_CALLS]name{...}",
            matches=_mistral,
        ),
        ToolParserRecord(
            name="pythonic",
            target="lightllm_builtin.tool_parsers.pythonic:PythonicParser",
            summary="Llama 3.2 and 4, ToolACE: [name(key='value')]",
            matches=_pythonic,
        ),
    ]
