"""Norms, activations and rotations in Triton, for CUDA devices."""

from collections.abc import Sequence

from lightllm import DeviceJob, OperatorsRecord, hookimpl
from lightllm_builtin.triton_support import priority, why_not


def supports(job: DeviceJob) -> str | None:
    return why_not(job.device)


@hookimpl
def lightllm_operators() -> Sequence[OperatorsRecord]:
    return [
        OperatorsRecord(
            name="triton",
            target="lightllm_builtin.triton_operators.operators:TritonOperators",
            supports=supports,
            priority=priority(),
            summary="fused: each tensor is read and written once",
        )
    ]
