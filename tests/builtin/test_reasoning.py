"""The built-in reasoning parsers."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm import CallArguments, CallStart, Event, Reasoning, Text
from lightllm.chat import OutputParser, merged
from lightllm.testing import check_reasoning_parser
from lightllm.testing.parsers import joined
from lightllm_builtin.reasoning import lightllm_reasoning_parsers
from lightllm_builtin.reasoning.think import DeepSeekR1Parser, Qwen3Parser
from lightllm_builtin.tool_parsers.qwen25 import Qwen25Parser

PARSERS = {"deepseek_r1": DeepSeekR1Parser, "qwen3": Qwen3Parser}

QWEN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
DEEPSEEK = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
GEMMA = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
OPEN = "<think>\n"
SKIPPED = "<think>\n\n</think>\n\n"


def parse(format: str, prompt: str, pieces: list[str]) -> list[Event]:
    return joined(lambda: PARSERS[format](prompt), (Text, Reasoning), pieces)


def thought(reasoning: str, content: str = "") -> list[Event]:
    return merged([Reasoning(reasoning), Text(content)])


CASES = [
    # --- qwen3: thought is what is opened
    ("qwen3", QWEN, "<think>\nHm.\n</think>\n\nHello!", thought("Hm.", "Hello!")),
    ("qwen3", QWEN, "<think>Hm.</think>Hello!", thought("Hm.", "Hello!")),
    ("qwen3", QWEN, " \n<think>\n\nHm.\n\n so \n</think> \n\n Hello!\n", thought("Hm.\n\n so", "Hello!\n")),
    ("qwen3", QWEN, "Hello!", [Text("Hello!")]),
    ("qwen3", QWEN, "\n Hello! \n", [Text("\n Hello! \n")]),
    ("qwen3", QWEN, " \n", [Text(" \n")]),
    ("qwen3", QWEN, "", []),
    ("qwen3", QWEN, "<think>\n\n</think>\n\nHello!", [Text("Hello!")]),
    ("qwen3", QWEN, "<think>Hm.\n</think>\n", thought("Hm.")),
    ("qwen3", QWEN, "The tag <think>a</think>.", [Text("The tag <think>a</think>.")]),
    ("qwen3", QWEN, "Hello!</think>", [Text("Hello!</think>")]),
    ("qwen3", QWEN, "<think>a</think>b<think>c</think>d", thought("a", "b<think>c</think>d")),
    ("qwen3", QWEN, "<think>a <think> b < c </thin </think>d", thought("a <think> b < c </thin", "d")),
    ("qwen3", QWEN, "<think>想一想😀</think>你好", thought("想一想😀", "你好")),
    # cut off
    ("qwen3", QWEN, "\n<thi", [Text("\n<thi")]),
    ("qwen3", QWEN, "<thinking>", [Text("<thinking>")]),
    ("qwen3", QWEN, "<think>", []),
    ("qwen3", QWEN, "<think>\nHm. \n", thought("Hm. \n")),
    ("qwen3", QWEN, "<think>Hm.\n</thin", thought("Hm.\n</thin")),
    # opened by the prompt
    ("qwen3", QWEN + OPEN, "Hm.\n</think>\n\nHello!", thought("Hm.", "Hello!")),
    ("qwen3", QWEN + "<think>", "\nHm.", thought("Hm.")),
    ("qwen3", QWEN + OPEN, "<think>\nHm.\n</think>Hello!", thought("Hm.", "Hello!")),
    ("qwen3", QWEN + OPEN, "\n</think>\n\nHello!", [Text("Hello!")]),
    # a thought to be continued keeps its whitespace, and its tag is text
    ("qwen3", QWEN + OPEN + "I was", " saying.\n</think>\nHello!", thought(" saying.", "Hello!")),
    ("qwen3", QWEN + OPEN + "I was", "\n<think> here", thought("\n<think> here")),
    # closed by the prompt
    ("qwen3", QWEN + SKIPPED, "Hello!", [Text("Hello!")]),
    ("qwen3", QWEN + SKIPPED, "<think>Hm.</think>Hello!", thought("Hm.", "Hello!")),
    # a tag in somebody's message opens nothing
    ("qwen3", QWEN.replace("Hi", "What is <think>?"), "Hello!", [Text("Hello!")]),
    ("qwen3", "<think>a</think>b" + QWEN, "Hello!", [Text("Hello!")]),
    ("qwen3", "[INST] What does <think> do? [/INST]", "It opens.", [Text("It opens.")]),
    ("qwen3", "[INST] <think> [/INST]", "A tag.", [Text("A tag.")]),
    ("qwen3", GEMMA.replace("Hi", "What does <think> do?"), "It opens.", [Text("It opens.")]),
    ("qwen3", GEMMA.replace("Hi", "<think>"), "A tag.", [Text("A tag.")]),
    ("qwen3", GEMMA + "<think>I was", " saying.</think>Hello!", thought(" saying.", "Hello!")),
    ("qwen3", "User: What does <think> do?\nAssistant:", " It opens.", [Text(" It opens.")]),
    ("qwen3", "User: Hi\nAssistant: <think>", "Hm.</think>Hello!", thought("Hm.", "Hello!")),
    ("qwen3", QWEN + OPEN + "About <think>, I", " was.</think>Hello!", thought(" was.", "Hello!")),
    ("qwen3", QWEN + OPEN + "Hm.\n</think>\nHello", "\n<think>", [Text("\n<think>")]),
    # --- deepseek_r1: thought from the start
    ("deepseek_r1", DEEPSEEK, "Hm.\n</think>\n\nHello!", thought("Hm.", "Hello!")),
    ("deepseek_r1", DEEPSEEK, "<think>\nHm.\n</think>\n\nHello!", thought("Hm.", "Hello!")),
    ("deepseek_r1", DEEPSEEK, "\n\n<think>Hm.</think>Hello!", thought("Hm.", "Hello!")),
    ("deepseek_r1", DEEPSEEK, "</think>Hello!", [Text("Hello!")]),
    ("deepseek_r1", DEEPSEEK, "\n\nHm.", thought("Hm.")),
    ("deepseek_r1", DEEPSEEK, "Hm. \n", thought("Hm. \n")),
    ("deepseek_r1", DEEPSEEK, "<thi", thought("<thi")),
    ("deepseek_r1", DEEPSEEK, " \n", []),
    ("deepseek_r1", DEEPSEEK, "a <think> b</think>c</think>", thought("a <think> b", "c</think>")),
    ("deepseek_r1", DEEPSEEK + OPEN, "Hm.</think>Hello!", thought("Hm.", "Hello!")),
    ("deepseek_r1", DEEPSEEK + "<think>Ok", " so</think>Hello!", thought(" so", "Hello!")),
    ("deepseek_r1", DEEPSEEK.replace("Hi", "What is <think>?"), "Hm.</think>Hello!", thought("Hm.", "Hello!")),
    # V3.1 without thinking
    ("deepseek_r1", DEEPSEEK + "</think>", "Hello!", [Text("Hello!")]),
    # an answer to be continued
    ("deepseek_r1", DEEPSEEK + "<think>Hm.</think>The answer", " is 4.", [Text(" is 4.")]),
    ("deepseek_r1", DEEPSEEK + "</think>The answer", " is </think>.", [Text(" is </think>.")]),
    ("deepseek_r1", DEEPSEEK.replace("Hi", "And </think>?"), "Hm.</think>Hello!", thought("Hm.", "Hello!")),
    ("deepseek_r1", "", "Hm.</think>Hello!", thought("Hm.", "Hello!")),
]


@pytest.mark.parametrize(("format", "prompt", "text", "expected"), CASES)
def test_answers(format: str, prompt: str, text: str, expected: list[Event]) -> None:
    reasoning, content = [
        "".join(event.text for event in expected if isinstance(event, kind)) for kind in (Reasoning, Text)
    ]
    said = {"reasoning": reasoning, "content": content}
    check_reasoning_parser(PARSERS[format], text, prompt=prompt, **said, grammar=False)
    assert parse(format, prompt, [text]) == expected


bits = st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", " ", "\n", "\t", "a", "天", "😀", "<"])


@settings(max_examples=400, deadline=None)
@given(
    format=st.sampled_from(list(PARSERS)),
    prompt=st.sampled_from([QWEN, QWEN + OPEN, QWEN + OPEN + "I was", QWEN + SKIPPED]),
    pieces=st.lists(bits, max_size=30),
    sizes=st.lists(st.integers(0, 9), max_size=40),
)
def test_every_cutting_gives_the_same_events(format: str, prompt: str, pieces: list[str], sizes: list[int]) -> None:
    text = "".join(pieces)
    cut, rest = [], text
    for size in sizes:
        cut.append(rest[:size])
        rest = rest[size:]
    whole = parse(format, prompt, [text])
    assert parse(format, prompt, [*cut, rest]) == parse(format, prompt, pieces) == whole
    # nothing is lost but the tags and the whitespace beside them
    left = "".join(event.text for event in whole)
    assert "".join(left.split()) in (
        "".join(variant.split())
        for variant in (
            text,
            text.replace("<think>", "", 1),
            text.replace("</think>", "", 1),
            text.replace("<think>", "", 1).replace("</think>", "", 1),
        )
    )


def test_thought_leaves_as_it_comes() -> None:
    parser = DeepSeekR1Parser(DEEPSEEK)
    assert parser.push("So") == [Reasoning("So")]
    assert parser.push(",\n") == [Reasoning(",")]
    assert parser.push("well </th") == [Reasoning("\nwell")]
    assert parser.push("e") == [Reasoning(" </the")]
    assert parser.push("</think>\n") == []
    assert parser.push("Hi\n") == [Text("Hi\n")]


def test_a_call_in_the_thought_is_thought() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = OutputParser(Qwen3Parser(QWEN), Qwen25Parser([{"type": "function", "function": {"name": "f"}}]))
    events = [*parser.push(f"<think>\nI could {call}\n</think>\n\nOk.\n{call}"), *parser.close()]
    assert merged(events) == [Reasoning(f"I could {call}"), Text("Ok."), CallStart(0, "f"), CallArguments(0, "{}")]


def test_each_name_leads_to_its_parser() -> None:
    found = {}
    for record in lightllm_reasoning_parsers():
        module, _, attribute = record.target.partition(":")
        found[record.name] = getattr(importlib.import_module(module), attribute)
    assert found == PARSERS
