"""The plain linear layer: weights in the model's own dtype."""

from collections.abc import Sequence

from lightllm import LinearMethodRecord, hookimpl


@hookimpl
def lightllm_linear_methods() -> Sequence[LinearMethodRecord]:
    return [
        LinearMethodRecord(
            name="dense",
            target="lightllm_builtin.linear.dense:Dense",
            summary="weights as they are, packed for the CPU's matrix units",
        )
    ]
