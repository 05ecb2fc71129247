"""DeepSeek V3.1's tool calls. This module declares; `parser` does the work and is imported only when it is chosen."""

from collections.abc import Collection, Sequence

from lightllm import ModelInfo, ToolParserRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


def _matches(info: ModelInfo, tokens: Collection[str]) -> str | None:
    """None: this is how the model writes calls; else why not. Asked under ``--tool-call-parser auto``."""
    if "<｜tool▁sep｜>" not in tokens:
        return "the tokenizer does not know <｜tool▁sep｜>"
    if "```json" in (info.chat_template or ""):
        return "the chat template puts arguments into ```json, as DeepSeek V3's and R1's do"
    return None


@hookimpl
def lightllm_tool_parsers() -> Sequence[ToolParserRecord]:
    return [
        ToolParserRecord(
            name="deepseekv31",
            target="lightllm_parser_example.parser:DeepSeekV31Parser",
            summary="DeepSeek V3.1: <｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>",
            matches=_matches,
            priority=1,  # before the built-in parsers: these marks cannot be mistaken
        )
    ]
