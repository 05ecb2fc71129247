"""Weights of linear layers as 8-bit integers.

This module only says what there is. It is imported whenever lightllm-serve starts; `int8`, and torch with it, in the
process that runs the model.
"""

from collections.abc import Sequence

from lightllm import LinearMethodRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_linear_methods() -> Sequence[LinearMethodRecord]:
    return [
        LinearMethodRecord(
            name="example-plugin",
            target="example_plugin.int8:ExamplePluginLinear",
            summary="8-bit weights, a scale for every output",
        )
    ]
