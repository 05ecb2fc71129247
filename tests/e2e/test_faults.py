"""A plugin that fails is named, with its version, to whoever can do something; its request fails and no other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import write_checkpoint, write_tokenizer
from distributions import Site
from servers import run_command

from lightllm.testing import Server

DECLARED = """
    from contextlib import asynccontextmanager
    from litestar import get

    @hookimpl
    def lightllm_models():
        return [ModelRecord(name="faulty", target="faulty_parts:Faulty", architectures=("FaultyForCausalLM",))]

    @hookimpl
    def lightllm_logits_processors():
        def validate(fields):
            if fields["unlucky"] == "unchecked":
                raise LookupError("no such luck")
        target = "faulty_parts:Unlucky"
        return [LogitsProcessorRecord(name="unlucky", target=target, fields=("unlucky",), validate=validate)]

    @hookimpl
    def lightllm_tool_parsers():
        return [ToolParserRecord(name="fragile", target="faulty_parts:Fragile")]

    @hookimpl
    def lightllm_listeners():
        def listen(facts):
            raise OSError("deaf")
        return [Listener(name="ear", on_request=listen, on_finish=listen)]

    @hookimpl
    def lightllm_routes():
        @get("/faulty")
        async def route() -> None:
            raise RuntimeError("a secret of the route's")
        return [route]
"""
PARTS = """
    import torch
    from lightllm_builtin.llama.model import Llama

    class Faulty(Llama):
        def forward(self, tokens, positions, batch):
            if len(tokens) == 7 and (tokens == 14).all():
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            if (tokens == 13).any():
                raise ValueError("thirteen")
            return super().forward(tokens, positions, batch)

    class Unlucky:
        def __init__(self, info): pass
        def apply(self, logits, rows):
            if any(row.params.extra["unlucky"] for row in rows):
                raise ArithmeticError("bad luck")

    class Fragile:
        def __init__(self, tools):
            if tools[0]["function"]["name"] == "never":
                raise TypeError("not this tool")
        def push(self, text):
            raise IndexError("cannot read")
        def close(self): return ()
"""
NAME = "faulty-dist 1.2"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("site"))
    site.install("faulty-dist", {"faulty": "faulty_plugin"}, {"faulty_plugin": DECLARED, "faulty_parts": PARTS})
    return site


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama-gqa")
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["FaultyForCausalLM"]}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    return folder


@pytest.fixture(scope="module")
def server(site: Site, model: Path) -> Iterator[Server]:
    arguments = ["--model", str(model), "--served-model-name", "m", "--tool-call-parser", "faulty/fragile"]
    with Server(*arguments, env={"PYTHONPATH": str(site.folder)}) as server:
        yield server


def post(server: Server, path: str = "completions", **fields: Any) -> httpx.Response:
    body = {"model": "m", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logit_bias": {"13": -100}} | fields
    if "messages" not in body:
        body.setdefault("prompt", "w1 w7")
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=600)


def tool(name: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "w1 w2"}],
        "tools": [{"type": "function", "function": {"name": name}}],
    }


FAULTS = {
    "the model's forward": ("completions", {"prompt": "w5 w13"}, "model faulty/faulty", "ValueError: thirteen"),
    "a logits processor": (
        "completions",
        {"unlucky": True},
        "logits processor faulty/unlucky",
        "ArithmeticError: bad luck",
    ),
    "a request field's check": (
        "completions",
        {"unlucky": "unchecked"},
        "logits processor faulty/unlucky",
        "LookupError: no such luck",
    ),
    "a tool parser": ("chat/completions", tool("f"), "tool parser faulty/fragile", "IndexError: cannot read"),
    "a tool parser's start": (
        "chat/completions",
        tool("never"),
        "tool parser faulty/fragile",
        "TypeError: not this tool",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_fails_its_request_and_no_other(server: Server, fault: str) -> None:
    path, fields, who, what = FAULTS[fault]
    alone = post(server, max_tokens=120).json()["choices"][0]["text"]
    beside: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: beside.append(post(server, max_tokens=120, unlucky=False))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    failed = [post(server, path, **fields) for _ in range(3)]
    for thread in threads:
        thread.join()
    for answer in failed:
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["type"] == "server_error"
        assert f"{who} ({NAME}) failed: {what}" in error["message"]
    assert f"{who} ({NAME}) failed: {what}" in server.log
    assert [answer.json()["choices"][0]["text"] for answer in beside] == [alone] * 3
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_in_a_stream_the_error_is_its_last_event(server: Server) -> None:
    lines = post(server, prompt="w5 w13", stream=True).text.split("\n\n")
    assert f"the model faulty/faulty ({NAME}) failed: ValueError: thirteen" in lines[-2]


def test_a_listener_that_fails_is_logged_and_nothing_else(server: Server) -> None:
    assert post(server).status_code == 200
    assert f"the listener ear of plugin faulty ({NAME}) failed in on_finish: OSError: deaf" in server.log


def test_a_route_that_fails_is_named_and_keeps_its_secrets(server: Server) -> None:
    answer = httpx.get(f"{server.url}/faulty")
    assert answer.status_code == 500
    assert f"Plugin faulty ({NAME}) failed in GET /faulty" in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert "a secret of the route's" in server.log


STARTS = {
    "the model's constructor": (
        {
            "faulty_parts": PARTS.replace(
                "def forward(self, tokens, positions, batch):", "def __init__(self, info, make):"
            )
        },
        "model faulty/faulty",
    ),
    "the model's import": ({"faulty_parts": PARTS + "\n    import nothing_of_the_kind\n"}, "nothing_of_the_kind"),
    "a hook": (
        {"faulty_plugin": DECLARED.replace("architectures=", "architecture=")},
        "lightllm_models raised TypeError",
    ),
    "a missing target": ({"faulty_plugin": DECLARED.replace(":Faulty", ":Absent")}, "faulty_parts:Absent"),
    "routes that collide": (
        {"faulty_plugin": DECLARED.replace('"/faulty"', '"/v1/models"')},
        "/v1/models is a route of both lightllm-serve itself and faulty",
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_what_fails_at_start_ends_it_with_one_line_that_names_it(tmp_path: Path, model: Path, start: str) -> None:
    modules, reason = STARTS[start]
    site = Site(tmp_path)
    sources = {"faulty_plugin": DECLARED, "faulty_parts": PARTS} | modules
    site.install("faulty-dist", {"faulty": "faulty_plugin"}, sources)
    code, output = run_command("--model", str(model), "--port", "0", env={"PYTHONPATH": str(tmp_path)})
    last = output.rstrip().splitlines()[-1]
    assert code == 1
    assert last.startswith("lightllm-serve: error: ")
    assert reason in last and NAME in last


def test_a_device_that_fails_ends_the_engine_and_another_takes_over(server: Server) -> None:
    """After such an error every step would fail."""
    before = post(server).json()["choices"][0]["text"]
    lost = post(server, prompt=" ".join(["w14"] * 7))
    assert lost.status_code == 503 and "the engine process ended" in lost.text
    deadline = time.monotonic() + 60
    while httpx.get(f"{server.url}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert post(server).json()["choices"][0]["text"] == before
    assert "the engine ends: the device failed: CUDA error: an illegal memory access was encountered" in server.log
    assert "WorkerLost" not in server.log, "one line, no traceback"
