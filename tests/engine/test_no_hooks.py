"""Hooks are for start-up: no step, no token and no request calls one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pluggy
import pytest
from checkpoints import write_checkpoint

from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.plugins import Plugins


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the hooks that are called, by whatever manager."""
    called: list[str] = []
    execute = pluggy.PluginManager._hookexec

    def counting(self: pluggy.PluginManager, name: str, *rest: Any) -> Any:
        called.append(name)
        return execute(self, name, *rest)

    monkeypatch.setattr(pluggy.PluginManager, "_hookexec", counting)
    return called


def test_steps_call_none(tmp_path: Path, calls: list[str]) -> None:
    write_checkpoint(tmp_path, "llama-gqa")
    engine = build_engine(Config(max_total_tokens=500, device="cpu"), Plugins.discover(), tmp_path)
    assert "lightllm_models" in calls, "the count counts nothing"
    calls.clear()
    params = SamplingParams(max_tokens=5, logprobs=2, ignore_eos=True)
    done = engine.generate(*(Generate(id=str(i), prompt=[5, 6], params=params) for i in range(3)))
    assert [len(output.tokens) for output in done.values()] == [5, 5, 5]
    assert calls == []
