"""The clients that people have, against the demo model: OpenAI's for Python and for Node, and LangChain.

The demo model is small and says nothing sensible: only form is looked at.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from lightllm.testing import Server

QUESTION: list[Any] = [{"role": "user", "content": "Invent some data."}]
ASK: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 1, "seed": 1, "max_tokens": 300}


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


class Home(BaseModel):
    city: Literal["Oslo", "Rome"]
    floor: Annotated[int, Field(ge=0, le=20)] | None


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12, description="The name.")
    age: Annotated[int, Field(ge=0, le=150)]
    mood: Mood
    nickname: Annotated[str, Field(max_length=8)] | None
    tags: Annotated[list[Annotated[str, Field(max_length=6)]], Field(max_length=2)]
    homes: Annotated[list[Home], Field(max_length=2)]


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    days: Annotated[int, Field(ge=1, le=9)]


class Search(BaseModel):
    words: Annotated[list[Annotated[str, Field(max_length=8)]], Field(min_length=1, max_length=2)]


TOOLS: list[Any] = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Search, name="search")]


# ---------------------------------------------------------------------------------------------------------------------
# openai for Python


def test_a_whole_answer_and_a_streamed_one_are_the_same(api: openai.OpenAI) -> None:
    fields = ASK | {"temperature": 0, "max_tokens": 10}
    whole = api.chat.completions.create(**fields)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None
    chunks = list(api.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_parse_gives_the_pydantic_model_that_was_asked_for(api: openai.OpenAI) -> None:
    for seed in range(2):
        reply = api.chat.completions.parse(**ASK | {"seed": seed}, response_format=Person)
        assert reply.choices[0].finish_reason == "stop"
        assert isinstance(reply.choices[0].message.parsed, Person)


def test_parse_gives_the_arguments_of_a_required_call_as_a_pydantic_model(api: openai.OpenAI) -> None:
    for seed in range(2):
        reply = api.chat.completions.parse(
            **ASK | {"seed": seed}, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
        )
        (choice,) = reply.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert isinstance(call.function.parsed_arguments, {"Weather": Weather, "search": Search}[call.function.name])


def test_the_stream_helper_gives_content_as_it_grows_and_parsed_at_the_end(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(**ASK, response_format=Person) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event.delta for event in events if event.type == "content.delta"]
    (done,) = [event for event in events if event.type == "content.done"]
    assert len(deltas) > 3
    assert "".join(deltas) == done.content == final.choices[0].message.content
    assert isinstance(done.parsed, Person)
    assert final.choices[0].message.parsed == done.parsed


def test_the_stream_helper_gives_arguments_as_they_grow_and_parsed_at_the_end(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(
        **ASK, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "search"}}, parallel_tool_calls=False
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert len([delta for delta in deltas if delta]) > 1
    assert "".join(deltas) == done.arguments
    assert (done.name, done.index) == ("search", 0)
    assert isinstance(done.parsed_arguments, Search)
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls is not None
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == done.parsed_arguments


def test_a_parse_that_is_cut_off_says_so(api: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        api.chat.completions.parse(**ASK | {"max_tokens": 3}, response_format=Person)


def test_the_result_of_a_call_is_sent_back_and_answered(api: openai.OpenAI) -> None:
    call = api.chat.completions.create(**ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    message = call.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    reply = api.chat.completions.create(**ASK | {"messages": [*QUESTION, message, result], "max_tokens": 10})
    assert reply.choices[0].message.content


def test_the_async_client_parses_and_streams(demo: Server) -> None:
    async def run() -> tuple[Any, Any]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:

            async def streamed() -> Any:
                async with client.chat.completions.stream(
                    **ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
                ) as stream:
                    return await stream.get_final_completion()

            return await asyncio.gather(client.chat.completions.parse(**ASK, response_format=Person), streamed())

    parsed, streamed = asyncio.run(run())
    assert isinstance(parsed.choices[0].message.parsed, Person)
    for call in streamed.choices[0].message.tool_calls:
        assert isinstance(call.function.parsed_arguments, (Weather, Search))


# ---------------------------------------------------------------------------------------------------------------------
# LangChain


@tool
def forecast(city: Literal["Oslo", "Rome"], days: Annotated[int, Field(ge=1, le=9)]) -> str:
    """The weather of some days."""
    return f"{days} sunny days in {city}"


@tool
def remember(mood: Mood) -> str:
    """Remember a mood."""
    return mood.value


LANGCHAIN_TOOLS: dict[str, BaseTool] = {"forecast": forecast, "remember": remember}


@pytest.fixture
def chat(demo: Server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{demo.url}/v1", api_key="none", model="demo", temperature=1, seed=1, max_tokens=300, max_retries=0
    )


def added(chunks: Iterator[Any]) -> AIMessageChunk:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    assert isinstance(first, AIMessageChunk)
    return first


@pytest.mark.parametrize("stream", [False, True], ids=["invoked", "streamed"])
@pytest.mark.parametrize(("choice", "called"), [("any", {"forecast", "remember"}), ("remember", {"remember"})])
def test_langchain_forces_calls_that_its_tools_can_take(
    chat: ChatOpenAI, choice: str, called: set[str], stream: bool
) -> None:
    """Its own schemas allow further keys, and the demo model may find no end of them: strict ones do not."""
    tools = list(LANGCHAIN_TOOLS.values())
    bound = chat.bind_tools(tools, tool_choice=choice, strict=True, parallel_tool_calls=False)
    message = added(bound.stream("Well?")) if stream else bound.invoke("Well?")
    assert isinstance(message, AIMessage)
    assert message.invalid_tool_calls == []
    assert message.response_metadata["finish_reason"] == "tool_calls"
    (call,) = message.tool_calls
    assert call["id"] and call["name"] in called
    assert LANGCHAIN_TOOLS[call["name"]].invoke(call["args"])


def test_langchain_calls_and_hands_the_result_back_and_is_answered(chat: ChatOpenAI) -> None:
    messages: list[BaseMessage] = [HumanMessage("Will it be sunny?")]
    calling = chat.bind_tools([forecast], tool_choice="forecast", strict=True, parallel_tool_calls=False)
    asked = calling.invoke(messages)
    assert isinstance(asked, AIMessage)
    (call,) = asked.tool_calls
    result = forecast.invoke(call)
    assert isinstance(result, ToolMessage)
    free = chat.bind_tools([forecast], max_tokens=10)
    answer = free.invoke([*messages, asked, result])
    assert isinstance(answer, AIMessage)
    assert answer.content or answer.tool_calls
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] <= 10


# langchain dumps the openai client's parsed completions, whose type is that of unparsed ones
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gives_the_pydantic_model_that_was_asked_for(chat: ChatOpenAI, method: Any) -> None:
    structured = chat.with_structured_output(Person, method=method, strict=True)
    assert isinstance(structured.invoke("Invent somebody."), Person)
    *_, last = structured.stream("Invent somebody.")
    assert isinstance(last, Person)


def test_langchain_gives_an_object_in_json_mode(chat: ChatOpenAI) -> None:
    found = chat.bind(max_tokens=100).with_structured_output(method="json_mode", include_raw=True).invoke("Some JSON!")
    assert isinstance(found, dict)
    raw = found["raw"]
    assert raw.content.startswith("{")
    if raw.response_metadata["finish_reason"] == "stop":
        assert isinstance(json.loads(raw.content), dict)
        assert isinstance(found["parsed"], dict)
    else:
        assert raw.response_metadata["finish_reason"] == "length"


# ---------------------------------------------------------------------------------------------------------------------
# openai for Node


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, and beside it what its lock file pins."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed, the Node client was not tried")
    folder = Path(shutil.copytree(Path(__file__).parent / "node", tmp_path_factory.mktemp("node") / "client"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_node_client_finds_all_it_needs(demo: Server, node_folder: Path) -> None:
    done = subprocess.run(
        ["node", "client.mjs", demo.url], cwd=node_folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == {}
    assert len(found["passed"]) == 8
