"""A sampler that draws by the Gumbel-max trick.

This module only says what there is. It is imported whenever lightllm-serve starts; `sampler`, and torch with it, in the
process that runs the model.
"""

from collections.abc import Sequence

from lightllm import SamplerRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_samplers() -> Sequence[SamplerRecord]:
    return [
        SamplerRecord(
            name="example-plugin",
            target="example_plugin.sampler:ExamplePluginSampler",
            priority=-10,  # under `--sampler auto` others come first
            summary="one row after the other, by the Gumbel-max trick",
        )
    ]
