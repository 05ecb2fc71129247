"""Serving speed, memory and start-up of this server, and of peers beside it in the same run.

    python benchmarks/serving.py --model demo
    python benchmarks/serving.py --model DIR --peer vllm 'env VLLM_CPU_KVCACHE_SPACE=4 vllm serve DIR --port {port} ...'

Each server is started once (its time to the first healthy answer is taken), then they are measured in turn at each
concurrency, ``--rounds`` times over, so that a drifting machine hits all of them. Every prompt is different; answers
are greedy and run to their full length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil


@dataclass
class Server:
    name: str
    command: list[str]
    port: int
    process: subprocess.Popen[bytes] | None = None
    model: str = ""

    def start(self, log: Path) -> float:
        """Seconds until it answers a completion of one token."""
        began = time.perf_counter()
        self.process = subprocess.Popen(
            self.command,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{self.port}"
        with httpx.Client(timeout=60) as http:
            while time.perf_counter() - began < 600:
                if self.process.poll() is not None:
                    raise SystemExit(f"{self.name} ended at start-up; see {log}")
                try:
                    self.model = http.get(f"{url}/v1/models").json()["data"][0]["id"]
                    body = {"model": self.model, "prompt": "Hello", "max_tokens": 1}
                    http.post(f"{url}/v1/completions", json=body).raise_for_status()
                    return time.perf_counter() - began
                except (httpx.HTTPError, KeyError, ValueError):
                    time.sleep(0.1)
        raise SystemExit(f"{self.name} did not answer in 600 s; see {log}")

    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def memory(self) -> dict[str, float]:
        """Resident MB of each process."""
        return {f"{p.name()[:20]} {p.pid}": p.memory_info().rss / 1e6 for p in self.processes()}

    def pause(self, paused: bool) -> None:
        """Some servers keep a core busy while they wait: only the one that is measured may run."""
        for process in self.processes():
            process.suspend() if paused else process.resume()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.pause(False)
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


@dataclass
class Result:
    tokens_per_second: float
    ttft: float
    tpot: float


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def one(http: httpx.AsyncClient, server: Server, prompt: list[int], output: int) -> tuple[float, float, int]:
    """TTFT, time from first to last token (seconds), tokens."""
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first = last = 0.0
    tokens = 0
    async with http.stream("POST", f"http://127.0.0.1:{server.port}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"]:
                last = time.perf_counter()
                first = first or last
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    assert tokens == output, f"{server.name} gave {tokens} of {output} tokens"
    return first - began, last - first, tokens


async def measure(
    server: Server, concurrency: int, prompt_tokens: int, output: int, requests: int, ids: range = range(1000, 40000)
) -> Result:
    """``ids``: the tokens that prompts are drawn from."""
    draw = random.Random()
    timeout = httpx.Timeout(900)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=timeout, limits=limits) as http:
        prompts = [[draw.choice(ids) for _ in range(prompt_tokens)] for _ in range(requests)]
        gate = asyncio.Semaphore(concurrency)

        async def limited(prompt: list[int]) -> tuple[float, float, int]:
            async with gate:
                return await one(http, server, prompt, output)

        began = time.perf_counter()
        done = await asyncio.gather(*(limited(p) for p in prompts))
        took = time.perf_counter() - began
    return Result(
        tokens_per_second=sum(tokens for _, _, tokens in done) / took,
        ttft=statistics.median(ttft for ttft, _, _ in done),
        tpot=statistics.median(rest / (tokens - 1) for _, rest, tokens in done),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--args", default="", help="more options for our server")
    parser.add_argument(
        "--peer", nargs=2, metavar=("NAME", "COMMAND"), action="append", default=[], help="{port} is filled in"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=256, help="tokens in")
    parser.add_argument("--output", type=int, default=128, help="tokens out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--log", type=Path, default=Path("/tmp"), help="folder for the servers' logs")
    options = parser.parse_args()

    port = free_port()
    ours = [sys.executable, "-m", "lightllm", "--model", options.model, "--dtype", options.dtype, "--port", str(port)]
    servers = [Server("lightllm-serve", [*ours, *shlex.split(options.args)], port)]
    for name, command in options.peer:
        port = free_port()
        servers.append(Server(name, shlex.split(command.replace("{port}", str(port))), port))
    write = sys.stdout.write
    try:
        for server in servers:
            seconds = server.start(options.log / f"bench-{server.name}.log")
            write(f"{server.name}: first answer after {seconds:.1f} s\n")
            server.pause(True)
        write("| concurrency | server | output tok/s | median TTFT s | median TPOT ms |\n" + 5 * "| --- " + "|\n")
        for concurrency in options.concurrency:
            results: dict[str, list[Result]] = {server.name: [] for server in servers}
            for _ in range(options.rounds):
                for server in servers:
                    server.pause(False)
                    # one more than is measured: the first finds cold caches
                    asyncio.run(measure(server, 1, options.prompt, 2, 1))
                    requests = max(2, concurrency)
                    results[server.name].append(
                        asyncio.run(measure(server, concurrency, options.prompt, options.output, requests))
                    )
                    server.pause(True)
            middle = {}
            for name, runs in results.items():
                speed = statistics.median(r.tokens_per_second for r in runs)
                ttft = statistics.median(r.ttft for r in runs)
                tpot = statistics.median(r.tpot for r in runs)
                middle[name] = (speed, ttft, tpot)
                write(f"| {concurrency} | {name} | {speed:.1f} | {ttft:.3f} | {1000 * tpot:.1f} |\n")
            a = middle[servers[0].name]
            for peer in servers[1:]:
                b = middle[peer.name]
                times = f"{a[0] / b[0]:.2f} | {b[1] / a[1]:.2f} | {b[2] / a[2]:.2f}"
                write(f"| {concurrency} | times {peer.name} | {times} |\n")
            sys.stdout.flush()
        for server in servers:
            for name, megabytes in server.memory().items():
                write(f"{server.name}: {name}: {megabytes:.0f} MB resident\n")
    finally:
        for server in servers:
            server.stop()


if __name__ == "__main__":
    main()
