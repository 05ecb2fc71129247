"""FlashInfer's attention, for CUDA devices. This module declares; `backend` does the work and imports torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec

from lightllm import AttentionBackendRecord, AttentionJob, hookimpl

lightllm_requires = ">=0.1,<0.2"

HEAD_DIMS = (64, 128, 256)
"""What FlashInfer's precompiled kernels know, and both of its prefill kernels."""

DTYPES = ("float16", "bfloat16")


def supports(job: AttentionJob) -> str | None:
    return lacking_here(job) or lacking_kernel(job)


def lacking_here(job: AttentionJob) -> str | None:
    """What this machine has not."""
    if job.device != "cuda":
        return "it needs a CUDA device"
    if find_spec("flashinfer") is None:
        return "flashinfer-python is not installed (pip install 'lightllm-flashinfer[kernels]')"
    if find_spec("flashinfer_jit_cache") is None and not _compiler():
        return (
            "its kernels are not there: neither the package flashinfer-jit-cache, which has them compiled (from "
            "FlashInfer's own index), nor nvcc to compile them (set CUDA_HOME)"
        )
    import torch

    needed = (8, 0) if job.dtype == "bfloat16" else (7, 5)
    found = torch.cuda.get_device_capability()
    if found < needed:
        return f"{job.dtype} needs compute capability {needed[0]}.{needed[1]}, the device has {found[0]}.{found[1]}"
    return None


def lacking_kernel(job: AttentionJob) -> str | None:
    """What FlashInfer cannot compute anywhere."""
    if job.dtype not in DTYPES:
        return f"there are kernels for {' and '.join(DTYPES)}, not for {job.dtype}"
    others = sorted({layer.head_dim for layer in job.layers} - set(HEAD_DIMS))
    return f"there are kernels for heads of 64, 128 and 256, not of {others[0]}" if others else None


def _compiler() -> str | None:
    """nvcc, where FlashInfer looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    asked = os.environ.get("FLASHINFER_NVCC") or (f"{home}/bin/nvcc" if home else None)
    return shutil.which(asked) if asked else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@hookimpl
def lightllm_attention_backends() -> Sequence[AttentionBackendRecord]:
    return [
        AttentionBackendRecord(
            name="flashinfer",
            target="lightllm_flashinfer.backend:FlashInferAttention",
            supports=supports,
            priority=-1,  # after all that are built in: under auto nobody gets what was never run
            summary="FlashInfer's kernels over the pool's slots",
        )
    ]
