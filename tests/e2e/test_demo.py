"""The demo model over real sockets: right answers, through every family, from both formats, alone and together."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from demo import export_demo

from lightllm.testing import Server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    with Server("--model", "demo") as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def answer(server: Server) -> str:
    with client(server) as api:
        model = api.models.list().data[0].id
        reply = api.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=40)
    assert reply.choices[0].message.content
    return reply.choices[0].message.content


def test_the_capital_of_france_is_paris_whole_and_streamed(demo: Server) -> None:
    whole = answer(demo)
    assert "Paris" in whole
    with client(demo) as api:
        stream = api.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=40, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_the_readmes_examples_print_what_it_says(demo: Server) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n((?:(?!```).)*?)```\n\n(?:and )?prints `(.*?)`", readme, re.DOTALL)
    assert len(examples) == 2
    for code, printed in examples:
        assert "http://127.0.0.1:8000" in code
        code = code.replace("http://127.0.0.1:8000", demo.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
        assert done.stdout.strip() == printed


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_the_same_weights_as_safetensors_give_the_same_answer_in_every_family(
    demo: Server, architecture: str, tmp_path: Path
) -> None:
    export_demo(tmp_path, architecture)
    with Server("--model", str(tmp_path)) as server:
        assert answer(server) == answer(demo)


def prompt(i: int) -> str:
    subjects = ["the sea", "a clock", "winter", "bread", "a bridge", "numbers", "the moon", "a library"]
    return f"{'Please. ' * (i % 7)}Write sentence number {i} about {subjects[i % len(subjects)]}."


async def one(http: httpx.AsyncClient, url: str, i: int, stream: bool) -> str:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt(i)}],
        "temperature": 0,
        "max_tokens": 16 + 2 * (i % 16),
        "stream": stream,
    }
    if not stream:
        reply = await http.post(f"{url}/v1/chat/completions", json=body)
        return str(reply.json()["choices"][0]["message"]["content"])
    text = ""
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    return text


@pytest.mark.timeout(1800)  # a minute where nothing else runs
def test_64_concurrent_streams_equal_their_answers_alone(demo: Server) -> None:
    async def run() -> tuple[list[str], list[str]]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=900, limits=limits) as http:
            together = await asyncio.gather(*(one(http, demo.url, i, stream=True) for i in range(64)))
            alone = [await one(http, demo.url, i, stream=False) for i in range(64)]
        return list(together), alone

    together, alone = asyncio.run(run())
    assert together == alone
    assert len(set(alone)) > 32
