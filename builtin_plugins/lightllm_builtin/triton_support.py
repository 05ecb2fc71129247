"""What the Triton plugins share: where their kernels can run. Imports neither triton nor torch."""

from __future__ import annotations

import importlib.util
import os


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: for tests, slowly. Read when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'lightllm-serve[gpu]')"
    return None if device == "cuda" or interpreted() else "it needs a CUDA device"


def priority() -> int:
    """Before PyTorch's, but not in the interpreter."""
    return -10 if interpreted() else 10
