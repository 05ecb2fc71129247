"""Thought between ``<think>`` and ``</think>``, apart from the content."""

from collections.abc import Sequence

from lightllm import ReasoningParserRecord, hookimpl


@hookimpl
def lightllm_reasoning_parsers() -> Sequence[ReasoningParserRecord]:
    return [
        ReasoningParserRecord(
            name="deepseek_r1",
            target="lightllm_builtin.reasoning.think:DeepSeekR1Parser",
            summary="DeepSeek R1 and its distillations: thought up to </think>, opened or not",
        ),
        ReasoningParserRecord(
            name="qwen3",
            target="lightllm_builtin.reasoning.think:Qwen3Parser",
            summary="Qwen 3, QwQ: <think>...</think>, or no thought at all",
        ),
    ]
