"""The server driven by exact model outputs over HTTP: the hard answers of all formats, whole and streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import httpx
import pytest
from builtin.test_reasoning import CASES as REASONING_CASES
from builtin.tool_cases import CASES, DECLARED, PARIS, WEATHER, Case
from e2e.scripted import Asked, Said, Scripted, ask_all, script

from lightllm import Event, Reasoning, Text
from lightllm.testing import Server

TOOLS = [{"type": "function", "function": {"name": name}} for name in DECLARED]


def check(asked: Asked, expected: Said) -> None:
    """Both answers say what is expected, and end as they should."""
    expected = replace(expected, finish="tool_calls" if expected.calls else "stop")
    (whole,), (streamed,) = asked.whole.result(), asked.streamed.result()
    assert whole.apart_from_ids() == expected.apart_from_ids()
    assert streamed.apart_from_ids() == expected.apart_from_ids()


# ---------------------------------------------------------------------------------------------------------------------
# Tool calls


Answers = Mapping[str, Asked]
"""Text -> what comes of it when the model writes it."""


@pytest.fixture(scope="module")
def answers(scripted: Scripted) -> Callable[[str], Answers]:
    """Of all the texts in a parser's table. Its server has gone by the time they are looked at."""

    @cache
    def answers(parser: str) -> Answers:
        with scripted.serve("--tool-call-parser", parser) as server:
            texts = [case.text for case in CASES[parser]]
            return dict(zip(texts, ask_all(server, [script(text, tools=TOOLS) for text in texts]), strict=True))

    return answers


@pytest.mark.parametrize(
    ("parser", "case"),
    [pytest.param(parser, case, id=f"{parser}: {case.why}") for parser, cases in CASES.items() for case in cases],
)
def test_hard_answers(answers: Callable[[str], Answers], parser: str, case: Case) -> None:
    check(answers(parser)[case.text], Said(case.content, calls=case.calls))


CALL_IDS = {"mistral": r"[a-zA-Z0-9]{9}"}
"""Where it is not OpenAI's own form. Mistral's templates refuse every other."""


@pytest.mark.parametrize("parser", CASES)
def test_ids_of_calls_have_the_form_that_the_format_wants_and_differ(
    answers: Callable[[str], Answers], parser: str
) -> None:
    choices = [said for asked in answers(parser).values() for answer in asked for said in answer.result()]
    ids = [id for said in choices for id in said.ids]
    assert len(ids) == len(set(ids)) > 20
    assert [id for id in ids if not re.fullmatch(CALL_IDS.get(parser, r"call_[a-zA-Z0-9]{9,}"), id)] == []


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning, and calls after it

TURNS = {"qwen3": "<|im_start|>assistant\n", "deepseek_r1": "<｜Assistant｜>"}
"""Where the answer begins in the prompts of the table."""

CALL = f"<tool_call>\n{WEATHER}\n</tool_call>"
BARE = WEATHER.replace("arguments", "parameters")
CALLED = [("get_weather", PARIS)]


class Thought(NamedTuple):
    """``begun``: the beginning of the answer, which the prompt has. ``before``: the rest of the prompt."""

    text: str
    said: Said
    begun: str = ""
    before: str = ""
    tools: bool = True


OURS = {
    "qwen3": [
        Thought(f"<think>\nHm.\n</think>\n\n{CALL}", Said("", "Hm.", CALLED)),
        Thought(
            f"<think>\nI could {CALL}\n</think>\n\nOk.\n{CALL}\n{CALL}\n",
            Said("Ok.", f"I could {CALL}", CALLED * 2),
        ),
        Thought(f"Hm. {CALL}\n</think>\n\n{CALL}北京", Said("北京", f"Hm. {CALL}", CALLED), begun="<think>\n"),
        Thought(f" so.</think>{CALL}", Said("", " so.", CALLED), begun="<think>\nIt is"),
        Thought(CALL, Said("", "", CALLED), begun="<think>\n\n</think>\n\n"),
        Thought(CALL, Said("", "", CALLED)),
        Thought(f"<think>\n{CALL}", Said("", CALL)),
        Thought(f"<think>\n{CALL}</think>\n\nNo <tool_call>.", Said("No <tool_call>.", CALL)),
    ],
    "deepseek_r1": [
        Thought(f"Hm.\n</think>\n\n{BARE}", Said("", "Hm.", CALLED)),
        Thought(
            f"<think>\n{BARE}, or not 🤔\n</think>\n\nOk. <|python_tag|>{BARE}; {BARE}",
            Said("Ok.", f"{BARE}, or not 🤔", CALLED * 2),
        ),
        Thought(f"Hm.</think>\n{BARE} Done.", Said(" Done.", "Hm.", CALLED), begun="<think>\n"),
        Thought(BARE, Said("", BARE)),
        Thought(BARE, Said("", "", CALLED), begun="</think>"),
    ],
}


def thought_of_table(parser: str, prompt: str, text: str, events: list[Event]) -> Thought:
    before, turn, begun = prompt.rpartition(TURNS[parser])
    content, reasoning = [
        "".join(event.text for event in events if isinstance(event, kind)) for kind in (Text, Reasoning)
    ]
    return Thought(text, Said(content, reasoning), begun, before + turn, tools=False)


THOUGHTS = {
    parser: [*ours, *(thought_of_table(parser, *case) for name, *case in REASONING_CASES if name == parser)]
    for parser, ours in OURS.items()
}


@pytest.fixture(scope="module")
def thoughts(scripted: Scripted) -> Callable[[str], list[Asked]]:
    """What comes of a parser's thoughts, in their order."""

    @cache
    def thoughts(parser: str) -> list[Asked]:
        tool_parser = {"qwen3": "qwen25", "deepseek_r1": "llama3"}[parser]
        with scripted.serve("--reasoning-parser", parser, "--tool-call-parser", tool_parser) as server:
            return ask_all(
                server,
                [
                    script(
                        thought.text,
                        thought.before,
                        chat_template_kwargs={"begun": thought.begun},
                        **({"tools": TOOLS} if thought.tools else {}),
                    )
                    for thought in THOUGHTS[parser]
                ],
            )

    return thoughts


@pytest.mark.parametrize(
    ("parser", "number"),
    [
        pytest.param(parser, number, id=f"{parser}: {thought.begun!r}, {thought.text!r}")
        for parser, several in THOUGHTS.items()
        for number, thought in enumerate(several)
    ],
)
def test_thoughts(thoughts: Callable[[str], list[Asked]], parser: str, number: int) -> None:
    check(thoughts(parser)[number], THOUGHTS[parser][number].said)


# ---------------------------------------------------------------------------------------------------------------------
# The model itself


@pytest.fixture(scope="module")
def cramped(scripted: Scripted) -> Iterator[Server]:
    """With a cache of a few answers and steps of less than a prompt."""
    options = ["--max-total-tokens", "1500", "--max-batch-tokens", "64", "--tool-call-parser", "qwen25"]
    with scripted.serve(*options) as server:
        assert "ScriptedForCausalLM (scripted/scripted (--plugin lightllm.testing.scripted))" in server.log
        yield server
        assert "Traceback" not in server.log


def ask(server: Server, text: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=script(text, **fields), timeout=600)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_script_is_followed_in_full_batches_when_prompts_come_in_chunks_and_answers_are_preempted(
    cramped: Server,
) -> None:
    """Six prompts fill the cache, and an answer is nearly as long as its prompt."""
    texts = [f"{i}. 北京今天晴,25°C 👩‍👩‍👧. " + "Word. " * (10 + i % 13) + f"{i}" * 30 for i in range(24)]
    requests = [script(text, "A beginning that all share. ", n=1 + i % 2) for i, text in enumerate(texts)]
    for i, (text, asked) in enumerate(zip(texts, ask_all(cramped, requests), strict=True)):
        for answer in asked:
            assert [said.apart_from_ids() for said in answer.result()] == [(text, "", [], "stop")] * (1 + i % 2)


def test_the_script_is_followed_from_a_cached_prompt(cramped: Server) -> None:
    text = "The same again. " * 10
    first, second = ask(cramped, text), ask(cramped, text)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert first["choices"] == second["choices"]
    assert second["choices"][0]["message"]["content"] == text


def test_marks_in_a_script_are_tokens_special_or_not(cramped: Server) -> None:
    text = "[TOOL_CALLS][ARGS][CALL_ID]<|python_tag|><tool_call></tool_call><think></think>"
    answer = ask(cramped, text)
    assert answer["usage"]["completion_tokens"] == 8 + 1
    assert answer["choices"][0]["message"]["content"] == "<tool_call></tool_call><think></think>"
    assert ask(cramped, text, skip_special_tokens=False)["choices"][0]["message"]["content"] == text


CITIES = ["Oslo", "Paris", "Rome"]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
ROME = '{"city":"Rome"}'


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("text", "cities"), [(ROME, ["Rome"]), ("I will not.", CITIES)])
def test_a_schema_is_stronger_than_the_script(
    cramped: Server, text: str, cities: list[str], temperature: float
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    (choice,) = ask(cramped, text, response_format=form, temperature=temperature)["choices"]
    assert json.loads(choice["message"]["content"])["city"] in cities
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    ("text", "cities"), [(CALL.replace(PARIS, ROME), ["Rome"]), (ROME, CITIES), ("I will not.", CITIES)]
)
def test_a_required_call_is_stronger_than_the_script(
    cramped: Server, text: str, cities: list[str], temperature: float
) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
    fields = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "temperature": temperature}
    (choice,) = ask(cramped, text, **fields)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in cities
    assert choice["finish_reason"] == "tool_calls"
