"""The architecture ``ExamplePluginForCausalLM``.

This module only says what there is. It is imported whenever lightllm-serve starts; `model`, and torch with it, where a
model of this architecture is loaded.
"""

from collections.abc import Sequence

from lightllm import ModelRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_models() -> Sequence[ModelRecord]:
    return [
        ModelRecord(
            name="example-plugin",
            target="example_plugin.model:ExamplePluginModel",
            architectures=("ExamplePluginForCausalLM",),
            summary="attention and feed-forward side by side",
        )
    ]
