"""What the Triton plugins share: where their kernels can run. Imports neither triton nor torch."""

from __future__ import annotations

import importlib.util
import os
import sys


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: for tests, slowly. Read when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'lightllm-serve[gpu]')"
    if interpreted():
        return None
    if device != "cuda":
        return "it needs a CUDA device"
    torch = sys.modules.get("torch")  # it is, where there is a device to look at
    if torch is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"it needs a device of compute capability 8.0 or newer, this one's is {major}.{minor}"
    return None


def priority() -> int:
    """Before PyTorch's, but not in the interpreter."""
    return -10 if interpreted() else 10
