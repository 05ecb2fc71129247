"""Numbers to a device and back, without waiting for what it is doing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` on ``device``. A CUDA device copies them from pinned memory when it comes to it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Fetch:
    """Tensors on their way to the host: `take` them all, then `wait` once, then read what `take` gave."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._done: torch.cuda.Event | None = None

    def take(self, tensor: Tensor) -> Tensor:
        if not self._cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        self._done = self._done or torch.cuda.Event()
        self._done.record()
        return host

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()
