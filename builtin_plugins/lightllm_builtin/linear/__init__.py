"""The plain linear layer: weights in the model's own dtype."""

from collections.abc import Sequence

from lightllm import LinearMethodRecord, ModelInfo, hookimpl


def is_plain(info: ModelInfo) -> str | None:
    quantized = info.get("quantization_config")
    if not quantized:
        return None
    method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
    return f"the checkpoint is quantized (quant_method: {method})"


@hookimpl
def lightllm_linear_methods() -> Sequence[LinearMethodRecord]:
    return [
        LinearMethodRecord(
            name="dense",
            target="lightllm_builtin.linear.dense:Dense",
            matches=is_plain,
            summary="weights as they are, packed for the CPU's matrix units",
        )
    ]
