"""The line between the two processes, with a real engine process at its other end."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from checkpoints import write_checkpoint

from lightllm.assemble import Start
from lightllm.config import Config
from lightllm.engine.client import EngineClient, EngineUnavailable, Generation
from lightllm.engine.request import Output, SamplingParams
from lightllm.interfaces import UserError
from lightllm.plugins import Recipe

FOREVER = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama-gqa")
    return folder


def start(folder: Path, **settings: object) -> bytes:
    config = Config(max_total_tokens=1000, log_level="error", **settings)  # type: ignore[arg-type]
    return msgspec.msgpack.encode(Start(config=config, recipe=Recipe(), path=str(folder)))


def with_engine(folder: Path, use: Callable[[EngineClient], Awaitable[None]]) -> EngineClient:
    """Run ``use`` against a started engine; nothing may be left of it afterwards."""

    async def run() -> EngineClient:
        client = EngineClient(start(folder))
        client.launch()
        ready = asyncio.Event()
        line = asyncio.create_task(client.run(ready.set))
        try:
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait({line, waiting}, timeout=600, return_when=asyncio.FIRST_COMPLETED)
            assert client.healthy
            await use(client)
        finally:
            pid = client.pid
            await client.stop()
            await line
        assert pid is not None and not psutil.pid_exists(pid)
        return client

    return asyncio.run(run())


async def collect(generation: Generation) -> list[Output]:
    async with generation:
        return [output async for output in generation]


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


def test_requests_run_side_by_side_and_their_outputs_come_apart(checkpoint: Path) -> None:
    async def use(client: EngineClient) -> None:
        alone = await collect(client.generate([5, 6, 7], SHORT))
        one, two = await asyncio.gather(
            collect(client.generate([5, 6, 7], SHORT)), collect(client.generate([9, 8], FOREVER, n=2))
        )
        assert [o.tokens for o in one] == [o.tokens for o in alone]
        assert {o.index for o in two} == {0, 1}
        assert sum(len(o.tokens) for o in two) == 400
        assert [o.finish for o in two if o.finish] == ["length", "length"]

    with_engine(checkpoint, use)


def test_leaving_a_generation_aborts_it_and_frees_its_cache(checkpoint: Path) -> None:
    async def use(client: EngineClient) -> None:
        async with client.generate([3] * 50, FOREVER, n=2) as generation:
            async for _ in generation:
                break
            await until(lambda: client.stats.running == 2)
            assert client.stats.free_slots < client.stats.total_slots
        # the engine reports after each step: another request makes it step
        await collect(client.generate([1], SHORT))
        assert (client.stats.running, client.stats.waiting) == (0, 0)
        assert client.stats.free_slots == client.stats.total_slots == 1000

    with_engine(checkpoint, use)


def test_an_engine_that_dies_fails_its_requests_and_is_started_again(checkpoint: Path) -> None:
    async def use(client: EngineClient) -> None:
        before = await collect(client.generate([5, 6, 7], SHORT))
        assert client.pid is not None
        first = client.pid
        generation = client.generate([3] * 50, FOREVER)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="signal 9"):
            await collect(generation)
        with pytest.raises(EngineUnavailable, match="loading"):
            client.generate([1], SHORT)
        await until(lambda: client.healthy)
        assert client.pid != first
        after = await collect(client.generate([5, 6, 7], SHORT))
        assert [o.tokens for o in after] == [o.tokens for o in before]

    with_engine(checkpoint, use)


def test_a_request_that_can_never_be_served_ends_with_an_error(checkpoint: Path) -> None:
    async def use(client: EngineClient) -> None:
        (output,) = await collect(client.generate([1] * 300, SHORT))
        assert output.finish == "error"
        assert output.error is not None and "300 tokens" in output.error
        assert len(await collect(client.generate([1], SHORT))) == 5

    with_engine(checkpoint, use)


def test_the_directory_is_private_and_goes_with_the_client(checkpoint: Path) -> None:
    seen: list[Path] = []

    async def use(client: EngineClient) -> None:
        seen.append(client._directory)
        assert stat.S_IMODE(client._directory.stat().st_mode) == 0o700

    with_engine(checkpoint, use)
    assert not seen[0].exists()


def test_a_deep_directory_for_temporary_files_is_no_place_for_sockets(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    client = EngineClient(start(checkpoint))
    try:
        assert len(str(client._directory)) < 50 and stat.S_IMODE(client._directory.stat().st_mode) == 0o700
    finally:
        client.close()


def test_what_keeps_the_engine_from_starting_is_the_users_to_read(checkpoint: Path, tmp_path: Path) -> None:
    async def run() -> None:
        client = EngineClient(start(tmp_path / "nothing"))
        try:
            client.launch()
            await client.run()
        finally:
            client.close()

    with pytest.raises(UserError, match="nothing holds no model"):
        asyncio.run(run())


def test_the_engine_ends_when_the_server_is_killed(checkpoint: Path) -> None:
    client = EngineClient(start(checkpoint))
    client.launch()
    try:
        process = client._process
        assert process is not None and process.stdin is not None
        process.stdin.close()  # what the system does with a killed server's files
        assert process.wait(30) is not None
    finally:
        client.close()
