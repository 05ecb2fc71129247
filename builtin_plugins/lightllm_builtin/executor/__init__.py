"""The local executor: the model runs in the engine's process."""

from collections.abc import Sequence

from lightllm import ExecutorJob, ExecutorRecord, hookimpl


def one_rank(job: ExecutorJob) -> str | None:
    return None if job.world_size == 1 else f"it runs one rank, --tp {job.world_size} asks for more"


@hookimpl
def lightllm_executors() -> Sequence[ExecutorRecord]:
    return [
        ExecutorRecord(
            name="local",
            target="lightllm_builtin.executor.local:LocalExecutor",
            supports=one_rank,
            summary="in the engine's process",
        )
    ]
