"""The standard sampler."""

from collections.abc import Sequence

from lightllm import SamplerRecord, hookimpl


@hookimpl
def lightllm_samplers() -> Sequence[SamplerRecord]:
    return [
        SamplerRecord(
            name="standard",
            target="lightllm_builtin.sampling.sampler:StandardSampler",
            summary="temperature, top-k, top-p, min-p, penalties, bias and seeds, vectorised over the batch",
        )
    ]
