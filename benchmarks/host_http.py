"""What serving over HTTP costs beside the engine, with a device that is a clock (`clock.py`).

    python benchmarks/host_http.py              # one as fast as an H100 might be with Llama-3-8B
    python benchmarks/host_http.py --copies 0   # one that takes no time: how fast the processes are

The same number of requests is given to an engine in this process, then to a server over HTTP, ``--concurrency`` at a
time, streamed. Server, engine and client share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clock
import serving

from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.request import Generate, SamplingParams
from lightllm.plugins import Plugins, Recipe
from lightllm_builtin.sources.demo import demo_model

STEP_TOKENS = 8192


async def ask(port: int, body: dict[str, Any]) -> int:
    """A streamed completion, read as plainly as can be: its chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    lines = "POST /v1/completions HTTP/1.1", "Host: here", f"Content-Length: {len(data)}", "Connection: close"
    writer.write("\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode() + data)
    answer = await reader.read()
    writer.close()
    assert b"data: [DONE]" in answer, answer[:500]
    return answer.count(b"data: ") - 1


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=float, default=clock.COPIES, help="bytes a second that the device reads")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ["CLOCK_COPIES"] = str(given.copies)
    draw = random.Random(0)

    def prompts() -> list[list[int]]:
        return [draw.choices(clock.TOKENS, k=given.tokens) for _ in range(given.concurrency)]

    plugins = Plugins.discover(Recipe(given=(clock.__file__,)), quiet=True)
    engine = build_engine(Config(max_batch_tokens=STEP_TOKENS), plugins, demo_model())

    def alone() -> None:
        params = SamplingParams(max_tokens=given.output, ignore_eos=True)
        engine.generate(*(Generate(id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(prompts())))

    port = serving.free_port()
    command = [sys.executable, "-m", "lightllm", "--model", "demo", "--plugin", clock.__file__, "--port", str(port)]
    server = serving.Server("lightllm-serve", [*command, "--max-batch-tokens", str(STEP_TOKENS)], port)

    async def over_http() -> int:
        same = {"model": server.model, "max_tokens": given.output, "ignore_eos": True, "stream": True}
        return sum(await asyncio.gather(*(ask(port, same | {"prompt": prompt}) for prompt in prompts())))

    tokens = given.concurrency * given.output
    sys.stdout.write("| engine tok/s | over HTTP tok/s | of the engine's | chunks a token | server us a token |")
    sys.stdout.write(" engine us a token |\n" + "| --- " * 6 + "|\n")
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        server.start(Path(log.name))
        try:
            asyncio.run(over_http())  # what is done once
            processes = server.processes()[0], max(server.processes()[1:], key=lambda p: p.memory_info().rss)
            for _ in range(given.rounds):
                own = tokens / seconds(alone)
                before = [sum(process.cpu_times()[:2]) for process in processes]
                began = time.perf_counter()
                chunks = asyncio.run(over_http())
                served = tokens / (time.perf_counter() - began)
                sys.stdout.write(f"| {own:,.0f} | {served:,.0f} | {served / own:.0%} | {chunks / tokens:.2f} |")
                for process, earlier in zip(processes, before, strict=True):
                    sys.stdout.write(f" {(sum(process.cpu_times()[:2]) - earlier) / tokens * 1e6:.0f} |")
                sys.stdout.write("\n")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
