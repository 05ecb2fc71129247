"""Folders with a config.json, a tokenizer.json and their weights in a ``weights.npz``.

This module only says what there is. It is imported whenever lightllm-serve starts; `checkpoint` where a model is of
this format, `weights`, and torch with it, only in the process that runs the model.
"""

from collections.abc import Sequence
from pathlib import Path

from lightllm import WeightFormatRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


def matches(path: Path) -> str | None:
    """None, or why this is not the format of what is there."""
    return None if (path / "weights.npz").is_file() else "no weights.npz"


@hookimpl
def lightllm_weight_formats() -> Sequence[WeightFormatRecord]:
    return [
        WeightFormatRecord(
            name="example-plugin",
            target="example_plugin.weights:ExamplePluginWeights",
            checkpoint="example_plugin.checkpoint:ExamplePluginCheckpoint",
            matches=matches,
            summary="folders with a weights.npz",
        )
    ]
