"""Sampling without a sort, in Triton, for CUDA devices."""

from collections.abc import Sequence

from lightllm import DeviceJob, SamplerRecord, hookimpl
from lightllm_builtin.triton_support import priority, why_not


def supports(job: DeviceJob) -> str | None:
    return why_not(job.device)


@hookimpl
def lightllm_samplers() -> Sequence[SamplerRecord]:
    return [
        SamplerRecord(
            name="triton",
            target="lightllm_builtin.triton_sampling.sampler:TritonSampler",
            supports=supports,
            priority=priority(),
            summary="temperature, top-k, top-p and min-p in one kernel, without a sort",
        )
    ]
