"""Operators that compute in float64.

This module only says what there is. It is imported whenever lightllm-serve starts; `operators`, and torch with it, in
the process that runs the model.
"""

from collections.abc import Sequence

from lightllm import DeviceJob, OperatorsRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


def supports(job: DeviceJob) -> str | None:
    """None, or why not."""
    return "Apple's GPUs have no float64" if job.device == "mps" else None


@hookimpl
def lightllm_operators() -> Sequence[OperatorsRecord]:
    return [
        OperatorsRecord(
            name="example-plugin",
            target="example_plugin.operators:ExamplePluginOperators",
            supports=supports,
            priority=-10,  # under `--operators auto` others come first
            summary="in float64",
        )
    ]
