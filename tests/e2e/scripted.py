"""The kit's scripted model in a stranger's environment, and a strict reading of what its server sends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
from e2e.environment import Environment

from lightllm.testing import Server

PLUGIN = ("--plugin", "lightllm.testing.scripted")
MODEL = "scripted"
AT_ONCE = 32


@dataclass(frozen=True)
class Scripted:
    """The model and the environment that can serve it."""

    environment: Environment
    folder: Path

    def serve(self, *options: str) -> Server:
        model = ["--model", str(self.folder), "--served-model-name", MODEL]
        return Server(*model, *PLUGIN, *options, command=self.environment.command())


# ---------------------------------------------------------------------------------------------------------------------
# Asking


@dataclass
class Said:
    """One choice of an answer. ``calls``: (name, arguments); ``ids``: theirs."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None
    ids: list[str] = field(default_factory=list)

    def apart_from_ids(self) -> tuple[object, ...]:
        return self.content, self.reasoning, self.calls, self.finish


def script(text: str, before: str = "", **fields: Any) -> dict[str, Any]:
    """A request that is answered with ``text``. ``before``: what the prompt begins with."""
    messages = [{"role": "user", "content": content} for content in ([before] if before else []) + [text]]
    return {"model": MODEL, "messages": messages} | fields


def read_whole(completion: Any) -> list[Said]:
    """What the choices of an answer say; from the official client's `ChatCompletion`."""
    choices = []
    for index, choice in enumerate(completion.choices):
        assert choice.index == index
        message = choice.message
        calls = message.tool_calls or []
        assert all(call.type == "function" for call in calls)
        assert message.content is not None or calls
        reasoning = getattr(message, "reasoning_content", None) or ""
        assert reasoning == (getattr(message, "reasoning", None) or "")
        said = Said(message.content or "", reasoning, finish=choice.finish_reason, ids=[call.id for call in calls])
        said.calls = [(call.function.name, call.function.arguments) for call in calls]
        choices.append(said)
    return choices


def read_stream(body: str) -> list[Said]:
    """What the choices of a streamed answer say. Asserts that every event and delta has the form it should have."""
    *events, rest = body.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events), body
    *chunks, done = [event.removeprefix("data: ") for event in events]
    assert done == "[DONE]"
    said: dict[int, Said] = {}
    heads = set()
    for chunk in map(json.loads, chunks):
        heads.add((chunk["id"], chunk["created"], chunk["model"], chunk["object"]))
        (choice,) = chunk["choices"]
        index, delta = choice["index"], choice["delta"]
        if index not in said:
            said[index] = Said()
            assert delta == {"role": "assistant", "content": ""}
            assert choice["finish_reason"] is None
            continue
        assert said[index].finish is None, "something comes after the finish reason"
        said[index].finish = choice["finish_reason"]
        if choice["finish_reason"] is not None:
            assert delta == {}
        else:
            _add(said[index], delta)
    assert len(heads) == 1
    assert heads.pop()[2:] == (MODEL, "chat.completion.chunk")
    assert sorted(said) == list(range(len(said)))
    assert all(one.finish is not None for one in said.values())
    return [said[index] for index in sorted(said)]


def _add(said: Said, delta: dict[str, Any]) -> None:
    """One delta, which brings one thing: thought, then content and calls in turn."""
    if "reasoning_content" in delta:
        assert delta == dict.fromkeys(("reasoning_content", "reasoning"), delta["reasoning_content"])
        assert delta["reasoning_content"] and not said.content and not said.calls
        said.reasoning += delta["reasoning_content"]
    elif "content" in delta:
        assert list(delta) == ["content"] and delta["content"]
        said.content += delta["content"]
    else:
        assert list(delta) == ["tool_calls"]
        (call,) = delta["tool_calls"]
        if "id" in call:  # calls come in order, each with all but its arguments
            assert call["index"] == len(said.calls)
            assert call["type"] == "function"
            assert isinstance(call["function"]["name"], str)
            assert call["function"]["arguments"] == ""
            said.ids.append(call["id"])
            said.calls.append((call["function"]["name"], ""))
        else:
            arguments = call["function"]["arguments"]
            assert call == {"index": len(said.calls) - 1, "function": {"name": None, "arguments": arguments}}
            assert arguments
            name, before = said.calls[-1]
            said.calls[-1] = name, before + arguments


class Asked(NamedTuple):
    """A request's two answers. ``result()`` raises what went wrong with one, and is asked for in that one's test."""

    whole: Future[list[Said]]
    streamed: Future[list[Said]]


def ask_all(server: Server, requests: Iterable[dict[str, Any]]) -> list[Asked]:
    """Each request whole, by the official client and at temperature 1, and streamed, by none and at temperature 0."""
    limits = httpx.Limits(max_connections=AT_ONCE)
    with (
        httpx.Client(timeout=600, limits=limits) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as api,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):

        def whole(fields: dict[str, Any]) -> list[Said]:
            known = {"model": fields["model"], "messages": fields["messages"], "temperature": 1}
            return read_whole(api.chat.completions.create(**known, extra_body=fields))

        def streamed(fields: dict[str, Any]) -> list[Said]:
            body = fields | {"stream": True, "temperature": 0}
            answer = http.post(f"{server.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            return read_stream(answer.text)

        return [Asked(pool.submit(whole, fields), pool.submit(streamed, fields)) for fields in requests]
