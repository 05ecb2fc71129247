"""The operators that run everywhere: PyTorch's."""

from collections.abc import Sequence

from lightllm import OperatorsRecord, hookimpl


@hookimpl
def lightllm_operators() -> Sequence[OperatorsRecord]:
    return [
        OperatorsRecord(
            name="torch",
            target="lightllm.nn.operators:TorchOperators",
            summary="norms, activations and rotations in PyTorch",
        )
    ]
