"""The request field ``no_repeat_ngram_size``.

This module says what there is and which values are allowed. It is imported whenever lightllm-serve starts; `processor`,
and torch with it, in the process that runs the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightllm import LogitsProcessorRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"

FIELD = "no_repeat_ngram_size"


def validate(fields: Mapping[str, Any]) -> str | None:
    """None, or what the client is told. Called for requests that have the field."""
    size = fields[FIELD]
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return None
    return f"{FIELD} must be a whole number from 1 on"


@hookimpl
def lightllm_logits_processors() -> Sequence[LogitsProcessorRecord]:
    return [
        LogitsProcessorRecord(
            name="example-plugin",
            target="example_plugin.processor:ExamplePluginProcessor",
            fields=(FIELD,),
            validate=validate,
            summary="no sequence of so many tokens comes twice in an answer",
        )
    ]
