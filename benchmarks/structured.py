"""What structured output costs: masks within a step, and throughput held to a JSON Schema beside free text.

    python benchmarks/structured.py
    python benchmarks/structured.py --peer vllm 'env VLLM_CPU_KVCACHE_SPACE=4 vllm serve DIR --port {port} ...'

The first table is of the engine alone: a decode step of ``--batch`` sequences, and how much of it the thread that
runs the model spends on masks. The second is over HTTP, free and constrained requests in turn, ``--rounds`` times over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from serving import Server, free_port

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "favourite_colour": {"enum": ["red", "green", "blue"]},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 16}, "minItems": 1, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 20}, "city": {"type": "string", "maxLength": 16}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["first_name", "age", "favourite_colour", "hobbies", "address"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 2}
LONG = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
"""Choices at every token, and no end in sight."""

QUESTION = "Describe two people as JSON."


def steps(model: str, batch: int, count: int) -> None:
    """Time the engine's decode steps in this process."""
    from lightllm import grammar
    from lightllm.assemble import build_engine, open_checkpoint
    from lightllm.config import Config
    from lightllm.engine.request import Abort, Generate, SamplingParams
    from lightllm.plugins import Plugins

    config = Config(model=model, max_total_tokens=batch * (count + 100))
    plugins = Plugins.discover()
    path = plugins.resolve_model(config.model, config.revision, config)
    engine = build_engine(config, plugins, path)
    prompt = open_checkpoint(plugins, path)[1].tokenizer().encode(QUESTION).ids
    spent = dict.fromkeys(("start", "apply", "follow", "_fill"), 0.0)
    masks = engine.runner.masks

    def timed(name: str) -> None:
        call = getattr(masks, name)

        def wrapper(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent[name] += time.perf_counter() - began

        setattr(masks, name, wrapper)

    for name in spent:
        timed(name)
    sys.stdout.write(f"| decode step of {batch} sequences | ms |\n| --- | --- |\n")
    for what, held in (("free", None), ("held to a JSON Schema", grammar.json(LONG))):
        for i in range(batch):
            params = SamplingParams(temperature=0.8, seed=i, max_tokens=count + 50, ignore_eos=True, grammar=held)
            engine.add(Generate(id=str(i), prompt=prompt, params=params))
        while engine.scheduler.stats().running < batch:
            engine.step()
        for _ in range(5):
            engine.step()
        spent.update(dict.fromkeys(spent, 0.0))
        times = []
        for _ in range(count):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        for i in range(batch):
            engine.abort(Abort(id=str(i)))
        sys.stdout.write(f"| {what}: median | {1e3 * statistics.median(times):.1f} |\n")
    main = spent["start"] + spent["apply"] + spent["follow"]
    share = main / sum(times)
    sys.stdout.write(f"| of which masks, in the model's thread ({share:.1%}) | {1e3 * main / count:.2f} |\n")
    worker = spent["_fill"]
    per_token = 1e6 * worker / count / batch
    sys.stdout.write(f"| beside it, in another thread ({per_token:.0f} us a token) | {1e3 * worker / count:.2f} |\n\n")


async def load(server: Server, concurrency: int, requests: int, fields: dict[str, Any]) -> float:
    """Tokens a second."""
    gate = asyncio.Semaphore(concurrency)

    async with httpx.AsyncClient(timeout=900, limits=httpx.Limits(max_connections=concurrency)) as http:

        async def one(i: int) -> int:
            body = {
                "model": server.model,
                "messages": [{"role": "user", "content": f"{QUESTION} Begin with number {i}."}],
                "temperature": 0.8,
                "seed": i,
                "max_tokens": 160,
                **fields,
            }
            async with gate:
                reply = await http.post(f"http://127.0.0.1:{server.port}/v1/chat/completions", json=body)
            reply.raise_for_status()
            answer = reply.json()
            if "response_format" in fields and answer["choices"][0]["finish_reason"] == "stop":
                json.loads(answer["choices"][0]["message"]["content"])
            return int(answer["usage"]["completion_tokens"])

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(one, range(requests))))
        return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", nargs=2, metavar=("NAME", "COMMAND"), action="append", default=[])
    options = parser.parse_args()

    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the server starts its engine (lightllm/engine/client.py)
    steps(options.model, options.batch, options.steps)

    port = free_port()
    ours = [sys.executable, "-m", "lightllm", "--model", options.model, "--port", str(port)]
    servers = [Server("lightllm-serve", ours, port)]
    for name, command in options.peer:
        port = free_port()
        servers.append(Server(name, shlex.split(command.replace("{port}", str(port))), port))
    schema = {"type": "json_schema", "json_schema": {"name": "people", "schema": PEOPLE, "strict": True}}
    kinds = {"free": {"ignore_eos": True}, "JSON Schema": {"response_format": schema}}
    figures: dict[tuple[str, str], list[float]] = {(s.name, kind): [] for s in servers for kind in kinds}
    with tempfile.TemporaryDirectory() as logs:
        try:
            for server in servers:
                server.start(Path(logs) / f"{server.name}.log")
                server.pause(True)
            for _ in range(options.rounds):
                for server in servers:
                    server.pause(False)
                    for kind, fields in kinds.items():
                        asyncio.run(load(server, 2, 2, fields))
                        speed = asyncio.run(load(server, options.concurrency, options.requests, fields))
                        figures[server.name, kind].append(speed)
                    server.pause(True)
        finally:
            for server in servers:
                server.stop()
    sys.stdout.write(f"| output tok/s at concurrency {options.concurrency} | free | JSON Schema | ratio |\n")
    sys.stdout.write("| --- | --- | --- | --- |\n")
    for server in servers:
        free, held = (statistics.median(figures[server.name, kind]) for kind in kinds)
        sys.stdout.write(f"| {server.name} | {free:.1f} | {held:.1f} | {held / free:.2f} |\n")


if __name__ == "__main__":
    main()
