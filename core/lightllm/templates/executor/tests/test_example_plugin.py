import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightllm import ExecutorJob
from lightllm.testing import check_plugin, serve

import example_plugin
from example_plugin.executor import ExamplePluginExecutor


class Worker:
    """Takes as many seconds as it is told."""

    ready: Any = "ready"

    def start(self, plan: Any) -> Callable[[], list[Any]]:
        time.sleep(plan.seconds)
        return lambda: ["done" for _ in plan.items]


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_slow_steps_are_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ExamplePluginExecutor, "slow", 0.2)
    executor = ExamplePluginExecutor(ExecutorJob(world_size=1, device="cpu"), Worker)
    plan: Any = SimpleNamespace(items=[SimpleNamespace(count=1), SimpleNamespace(count=30)], seconds=0)
    with caplog.at_level(logging.WARNING):
        assert len(executor.start(plan)()) == 2
        assert caplog.messages == []
        plan.seconds = 0.2
        executor.start(plan)()
    (message,) = caplog.messages
    assert message.startswith("a step of 2 sequences, 31 tokens took 0.")


def test_a_server_runs_on_it(tiny_llama: Path) -> None:
    with serve([example_plugin.__name__], model=tiny_llama, options=["--executor", "example-plugin"]) as server:
        answer = server.complete("Count", max_tokens=5, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 5
    # the prompt and the first token are one step, each token after it is another
    found = re.search(r"the model ran (\d+) steps", server.log)
    assert found is not None
    assert int(found[1]) == 5
