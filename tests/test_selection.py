"""What serves under a name and under ``auto``, and why the others do not."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import pytest

from lightllm import (
    ExecutorRecord,
    LinearMethodRecord,
    ModelInfo,
    SamplerRecord,
    ToolParserRecord,
    UserError,
    hookimpl,
)
from lightllm.checks import Wrong
from lightllm.interfaces import DeviceJob, ExecutorJob
from lightllm.plugins import Plugins, Recipe
from lightllm.selection import choose

CPU = DeviceJob(device="cpu", dtype="float32")


def with_records(**kinds: list[Any]) -> Plugins:
    """The built-ins, but Triton's sampler, and a plugin called mine. ``kinds``: e.g. samplers=[SamplerRecord(...)]."""

    def answer(records: list[Any]) -> Callable[[], list[Any]]:
        return hookimpl(lambda: records)

    mine = types.ModuleType("mine")
    vars(mine).update({f"lightllm_{kind}": answer(records) for kind, records in kinds.items()})
    return Plugins.discover(Recipe(blocked=("triton-sampling",)), extra=[("mine", mine)])


def sampler(name: str = "standard", priority: int = 0) -> SamplerRecord:
    return SamplerRecord(name=name, target="a:B", priority=priority)


def test_the_highest_priority_serves_and_the_log_says_who_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    plugins = with_records(samplers=[sampler("fast", 5), sampler("slow", -5)])
    with caplog.at_level(logging.INFO, "lightllm"):
        assert choose(plugins, "samplers", "auto", CPU).address == "mine/fast"
    assert caplog.messages == [
        "sampler: mine/fast (extra) (not sampling/standard: of lower priority; "
        "not mine/slow (extra): of lower priority)"
    ]


def test_a_built_in_serves_before_others_of_its_priority() -> None:
    assert choose(with_records(samplers=[sampler("other")]), "samplers", "auto", CPU).address == "sampling/standard"


def test_a_name_that_two_have_must_be_said_in_full(caplog: pytest.LogCaptureFixture) -> None:
    plugins = with_records(samplers=[sampler()])
    with pytest.raises(UserError, match=r"say sampling/standard \(lightllm-serve .*\) or mine/standard \(extra\)"):
        choose(plugins, "samplers", "standard", CPU)
    with caplog.at_level(logging.INFO, "lightllm"):
        assert choose(plugins, "samplers", "mine/standard", CPU).plugin.name == "mine"
    assert caplog.messages == ["sampler: mine/standard (extra), as asked for"]


def executor(name: str, reason: str | None, priority: int = 0) -> ExecutorRecord:
    return ExecutorRecord(name=name, target="a:B", supports=lambda job: reason, priority=priority)


def test_who_cannot_is_passed_over_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    plugins = with_records(executors=[executor("ray", "no cluster", 9)])
    with caplog.at_level(logging.INFO, "lightllm"):
        assert choose(plugins, "executors", "auto", ExecutorJob(world_size=1, device="cpu")).address == "executor/local"
    assert caplog.messages == ["executor: executor/local (not mine/ray (extra): no cluster)"]


def test_nobody_can_gives_every_reason() -> None:
    plugins = with_records(executors=[executor("ray", "no cluster")])
    reason = (
        r"no executor can serve .*not executor/local: it runs one rank, --tp 2 .*not mine/ray \(extra\): no cluster"
    )
    with pytest.raises(UserError, match=reason):
        choose(plugins, "executors", "auto", ExecutorJob(world_size=2, device="cpu"))


def test_asked_for_by_name_it_must_be_able_to() -> None:
    plugins = with_records(executors=[executor("ray", "no cluster")])
    with pytest.raises(UserError, match="--executor ray: no cluster"):
        choose(plugins, "executors", "ray", ExecutorJob(world_size=1, device="cpu"))


def info(**config: Any) -> ModelInfo:
    return ModelInfo(path="", architecture="", config=config)


def test_a_checkpoint_that_is_quantized_finds_its_method() -> None:
    def matches(model: ModelInfo) -> str | None:
        return None if model.get("quantization_config") else "not quantized"

    mine = LinearMethodRecord(name="four", target="a:B", matches=matches)
    plugins = with_records(linear_methods=[mine, LinearMethodRecord(name="by-name", target="a:B", priority=9)])
    quantized = info(quantization_config={"quant_method": "gptq"})
    assert choose(plugins, "linear_methods", "auto", info()).address == "linear/dense"
    assert choose(plugins, "linear_methods", "auto", quantized).address == "mine/four"
    assert choose(plugins, "linear_methods", "by-name", quantized).address == "mine/by-name"
    with pytest.raises(UserError, match=r"linear/dense: the checkpoint is quantized \(quant_method: gptq\)"):
        choose(Plugins.discover(), "linear_methods", "auto", quantized)


def raising(strict: bool = False) -> Plugins:
    """With records of two kinds whose conditions fail."""

    def fails(*facts: Any) -> str | None:
        raise KeyError("world")

    mine = types.ModuleType("mine")
    vars(mine).update(
        lightllm_executors=hookimpl(lambda: [ExecutorRecord(name="ray", target="a:B", supports=fails, priority=1)]),
        lightllm_tool_parsers=hookimpl(lambda: [ToolParserRecord(name="odd", target="a:B", matches=fails, priority=1)]),
    )
    blocked = tuple(r.name for r in Plugins.discover(quiet=True).report() if r.status != "ok")
    return Plugins.discover(Recipe(blocked=blocked, strict=strict), extra=[("mine", mine)])


ONE = ExecutorJob(world_size=1, device="cpu")


def test_a_record_that_raises_is_named_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    plugins = raising()
    assert choose(plugins, "executors", "auto", ONE).address == "executor/local"
    qwen = info(model_type="qwen2")
    assert choose(plugins, "tool_parsers", "auto", qwen, {"<tool_call>"}).plugin.builtin
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "mine/ray (extra) is passed over: KeyError: 'world'",
        "mine/odd (extra) is passed over: KeyError: 'world'",
    ]


def test_a_record_that_raises_is_fatal_where_it_was_asked_for_or_plugins_are_strict() -> None:
    fault = r"mine/ray \(extra\) failed: KeyError: 'world'"
    plugins = raising()
    with pytest.raises(Wrong, match=fault):
        choose(plugins, "executors", "ray", ONE)
    with pytest.raises(Wrong, match=fault):
        choose(raising(strict=True), "executors", "auto", ONE)
    plugins.find("executors", "ray").plugin.asked_for = True
    with pytest.raises(Wrong, match=fault):
        choose(plugins, "executors", "auto", ONE)
