"""Whole engines on a CUDA device: with graphs and overlap as without, beside a CPU, and never waiting when they begin a
step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from traffic import run, same, traffic

from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.engine import Engine
from lightllm.engine.request import Generate, SamplingParams
from lightllm.plugins import Plugins

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_total_tokens": 130,
    "max_model_len": 80,
    "max_batch_tokens": 24,
    "max_running_requests": 12,
}
"""A pool so small that sequences are preempted."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, "llama-gqa")
    plugins = Plugins.discover(quiet=True)
    return lambda **options: build_engine(Config(**(OPTIONS | options)), plugins, folder)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_answers_are_those_of_a_cpu(build: Callable[..., Engine], seed: int, overlap: bool, cuda_graphs: bool) -> None:
    expected = run(build(device="cpu"), traffic(seed))
    with closing(build(device="cuda", sampler="standard", overlap=overlap, cuda_graphs=cuda_graphs)) as engine:
        assert engine.ready.overlap is overlap
        captured = "CUDA graphs: 5 batch sizes up to 12"
        assert any(line.startswith(captured) for line in engine.ready.summary) is cuda_graphs
        same(run(engine, traffic(seed)), expected)
        assert engine.scheduler.stats().preemptions > 0


def test_a_step_begins_without_waiting_for_the_device(build: Callable[..., Engine]) -> None:
    engine = build(device="cuda")
    start = engine.executor.start

    def checked(plan: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return start(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.executor.start = checked  # type: ignore[method-assign]
    menu: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_k": 9, "top_p": 0.8, "logprobs": 2},
        {"min_tokens": 4},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    )
    requests = [
        Generate(id=str(i), prompt=list(range(5 + i)), params=SamplingParams(max_tokens=9 + i, ignore_eos=True, **more))
        for i, more in enumerate(menu)
    ]
    assert {output.finish for output in run(engine, requests).values()} == {"length"}


def test_a_model_that_cannot_be_captured_is_served_all_the_same(tmp_path: Path) -> None:
    """It reads a number from the device in the middle of a step."""
    write_checkpoint(tmp_path, "llama-gqa")
    (tmp_path / "waiting.py").write_text(
        "from lightllm import ModelRecord, hookimpl\n"
        "from lightllm_builtin.llama.model import Llama\n"
        "class Waiting(Llama):\n"
        "    def forward(self, tokens, positions, batch):\n"
        "        assert int(positions.max()) >= 0\n"
        "        return super().forward(tokens, positions, batch)\n"
        "@hookimpl\n"
        "def lightllm_models():\n"
        "    return [ModelRecord(name='waiting', target=f'{__name__}:Waiting', architectures=('Waiting',))]\n"
    )
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "Waiting"))
    from lightllm.plugins import Recipe

    plugins = Plugins.discover(Recipe(given=(str(tmp_path / "waiting.py"),)), quiet=True)
    with closing(build_engine(Config(**OPTIONS, device="cuda"), plugins, tmp_path)) as engine:
        assert any("a step cannot be captured" in line for line in engine.ready.summary)
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        (output,) = engine.generate(Generate(id="", prompt=[1, 2, 3], params=params)).values()
        assert len(output.tokens) == 5
