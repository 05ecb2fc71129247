"""Decode steps as CUDA graphs: captured once for some batch sizes, then replayed with other numbers.

A step of a small batch is hundreds of kernels of a few microseconds each, which Python starts more slowly than the
device runs them. A graph starts them all at once. It repeats addresses as they were when it was captured, so what
changes lies in memory that stays: a step's numbers are copied into the graph's own tensor, its logits are found in
one that all graphs share. Batches between two sizes are padded (`Inputs.padded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightllm.engine.inputs import Inputs, Numbers, Rows

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Given a step, gives back what repeats it."""


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4 and 8; multiples of 8 to 64, of 16 to 128, of 32 beyond: at most a third is padding from 8 on."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, largest, 32)]
    return [size for size in steps if size < largest] + [largest]


class CudaCapture:
    """`Capture`. The graphs share their memory for what lies between a step's layers: no two are ever under way."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one: libraries keep memory for each stream they have seen

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()  # kernels are compiled, libraries take what memory they need
            with _never_waiting():  # found out while capturing, it would leave PyTorch's allocator in a capture
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


@contextmanager
def _never_waiting() -> Iterator[None]:
    """Inside, to wait for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Graphs:
    """``step(inputs, numbers, logits)`` computes a step of decodes into logits [sequences, vocabulary] float32."""

    def __init__(
        self,
        step: Callable[[Inputs, Tensor, Tensor], None],
        sizes: Sequence[int],
        vocabulary: int,
        rows: Rows,
        device: torch.device,
        capture: Capture,
        progress: Callable[[int, int], None],
    ) -> None:
        self._rows, self._device = rows, device
        self._logits = torch.empty(max(sizes), vocabulary, dtype=torch.float32, device=device)
        # size -> a step's numbers, its sequences' rows among them, what repeats it
        self._graphs: dict[int, tuple[Tensor, Tensor, Callable[[], None]]] = {}
        for done, size in enumerate(sorted(sizes, reverse=True)):  # the largest first: its memory does for the others
            progress(done, len(sizes))
            inputs = Inputs().padded(size, rows)
            numbers, logits = inputs.send(device), self._logits[:size]
            replay = capture(partial(step, inputs, numbers, logits))
            self._graphs[size] = numbers, Numbers(numbers, inputs).rows, replay
        progress(len(sizes), len(sizes))

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
        """The logits of decodes [sequences, vocabulary], and their rows on the device [sequences], to be used before
        the next step; None where the batch is too large."""
        count = len(inputs.rows)
        size = next((size for size in reversed(self._graphs) if size >= count), None)
        if size is None:
            return None
        numbers, rows, replay = self._graphs[size]
        numbers.copy_(inputs.padded(size, self._rows).send(self._device))
        replay()
        return self._logits[:count], rows[:count]
