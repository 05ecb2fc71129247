"""An executor that keeps the time.

This module only says what there is. It is imported whenever lightllm-serve starts; `executor` in the engine's process,
when it is chosen.
"""

from collections.abc import Sequence

from lightllm import ExecutorJob, ExecutorRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"


def supports(job: ExecutorJob) -> str | None:
    """None, or why not."""
    return None if job.world_size == 1 else f"it runs one rank, --tp {job.world_size} asks for more"


@hookimpl
def lightllm_executors() -> Sequence[ExecutorRecord]:
    return [
        ExecutorRecord(
            name="example-plugin",
            target="example_plugin.executor:ExamplePluginExecutor",
            supports=supports,
            priority=-10,  # under `--executor auto` others come first
            summary="in the engine's process; logs slow steps",
        )
    ]
