"""Attention written out in PyTorch.

This module only says what there is. It is imported whenever lightllm-serve starts; `backend`, and torch with it, in the
process that runs the model.
"""

from collections.abc import Sequence

from lightllm import AttentionBackendRecord, AttentionJob, hookimpl

lightllm_requires = ">=0.1,<0.2"


def supports(job: AttentionJob) -> str | None:
    """None, or why not. A kernel would look at ``job.layers``, too: their head sizes, windows and soft caps."""
    return None if job.device in ("cpu", "cuda") else f"it was not tried on {job.device}"


@hookimpl
def lightllm_attention_backends() -> Sequence[AttentionBackendRecord]:
    return [
        AttentionBackendRecord(
            name="example-plugin",
            target="example_plugin.backend:ExamplePluginAttention",
            supports=supports,
            priority=-10,  # under `--attention-backend auto` others come first
            summary="one sequence after the other, written out",
        )
    ]
