"""Why uvicorn: CPU time to stream server-sent events, uvicorn against granian, in turn in one run.

    pip install granian && python benchmarks/asgi_servers.py

Each server runs the same bare ASGI application in one process: a chunk to every client, a step of 5 ms, as an engine
would. What counts is the CPU time the server takes from the model, and its memory.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time

import httpx
import psutil

CHUNKS, CLIENTS, PORT = 128, 32, 9471
CHUNK = b'data: {"id":"cmpl-0123456789","object":"text_completion","choices":[{"index":0,"text":" word"}]}\n\n'

APP = f"""
import asyncio
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            await send({{"type": event + ".complete"}})
            if event == "lifespan.shutdown":
                return
    await receive()
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}})
    for _ in range({CHUNKS}):
        await asyncio.sleep(0.005)
        await send({{"type": "http.response.body", "body": {CHUNK!r}, "more_body": True}})
    await send({{"type": "http.response.body", "body": b"", "more_body": False}})
"""
UVICORN = (
    APP + "import uvicorn\n"
    f"uvicorn.run(app, port={PORT}, http='httptools', loop='uvloop', log_level='error', access_log=False)"
)
# embedded, as it would have to be beside the line to the engine
GRANIAN = (
    APP + "import uvloop\nfrom granian.server.embed import Server\nfrom granian.constants import Interfaces\n"
    f"uvloop.run(Server(app, address='127.0.0.1', port={PORT}, interface=Interfaces.ASGI).serve())"
)


async def load() -> None:
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=CLIENTS), timeout=60) as http:

        async def one() -> None:
            async with http.stream("GET", f"http://127.0.0.1:{PORT}/") as response:
                size = sum([len(part) async for part in response.aiter_raw()])
                assert size == CHUNKS * len(CHUNK)

        await asyncio.gather(*(one() for _ in range(CLIENTS)))


def measure(code: str) -> tuple[float, float]:
    """Microseconds of CPU per chunk, resident MB."""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(200):
            try:
                httpx.get(f"http://127.0.0.1:{PORT}/", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        seen = psutil.Process(process.pid)
        before = sum(seen.cpu_times()[:2])
        for _ in range(3):
            asyncio.run(load())
        used = sum(seen.cpu_times()[:2]) - before
        return 1e6 * used / (3 * CHUNKS * CLIENTS), seen.memory_info().rss / 1e6
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    runs: dict[str, list[tuple[float, float]]] = {"uvicorn": [], "granian": []}
    for _ in range(3):
        for name, code in (("uvicorn", UVICORN), ("granian", GRANIAN)):
            runs[name].append(measure(code))
    for name, found in runs.items():
        cpu, memory = (statistics.median(column) for column in zip(*found, strict=True))
        sys.stdout.write(f"{name}: {cpu:.1f} us of CPU per chunk, {memory:.0f} MB resident\n")


if __name__ == "__main__":
    main()
