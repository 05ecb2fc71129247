# ruff: noqa: E501  (the templates are as published)
import functools
import json

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from lightllm import CallArguments, CallStart, Reasoning, Text, UserError
from lightllm.chat import ChatError, ChatTemplate, OutputParser, merged

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MISTRAL = """{%- set ns = namespace(index=0) %}
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
"""
FEATURES = """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{% generation %}{% set x = m.content %}[{{ x }}]{% endgeneration %}
{% if loop.index == 3 %}{% break %}{% endif %}
  {% endfor %}
{{ strftime_now('%Y') }} {{ dict(a=1)|tojson }} {{ mood | default('none') }} {{ pad_token }}"""
TEMPLATES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "mistral": MISTRAL,
    "features": FEATURES,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "获取指定城市的当前天气信息 <b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HELLO = [{"role": "user", "content": " Hello, 世界 <&> "}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *HELLO]
TURNS = [*SYSTEM, {"role": "assistant", "content": " Hi. "}, {"role": "user", "content": "And?"}]
CALL = {"id": "abcdefghi", "type": "function"}
CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "tool_calls": [{**CALL, "function": {"name": "get_current_weather", "arguments": {"city": "北京", "n": 1.0}}}],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
]


@functools.cache
def reference_tokenizer():
    from transformers import PreTrainedTokenizerFast

    raw = RawTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def ours(template: str, messages, **options) -> str:
    return ChatTemplate(template, "<s>", "</s>").render(messages, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [HELLO, SYSTEM, TURNS, CALLED], ids=["hello", "system", "turns", "called"])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["", "tools"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
def test_prompts_are_those_of_transformers(name, messages, tools, prompt):
    def theirs() -> str:
        return reference_tokenizer().apply_chat_template(
            messages,
            tools=tools,
            chat_template=TEMPLATES[name],
            add_generation_prompt=prompt,
            tokenize=False,
            mood="odd",
        )

    def mine() -> str:
        # to us a call's arguments come as text
        sent = json.loads(json.dumps(messages))
        for message in sent:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return ours(TEMPLATES[name], sent, tools=tools, add_generation_prompt=prompt, kwargs={"mood": "odd"})

    try:
        expected = theirs()
    except jinja2.UndefinedError as error:
        # a message that only calls has no content: where a template cannot do without, it is empty
        assert "no attribute 'content'" in str(error) and messages is CALLED
        assert mine()
    except Exception:
        with pytest.raises(ChatError):
            mine()
    else:
        assert mine() == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2.5"])
@pytest.mark.parametrize("content", ["Once upon", "Once upon ", "  x"])
def test_a_final_message_is_continued_as_transformers_does(name, content):
    messages = [*HELLO, {"role": "assistant", "content": content}]
    expected = reference_tokenizer().apply_chat_template(
        messages, chat_template=TEMPLATES[name], continue_final_message=True, tokenize=False
    )
    template = TEMPLATES[name]
    assert ours(template, messages, continue_final_message=True, add_generation_prompt=False) == expected
    with pytest.raises(ChatError, match="add_generation_prompt"):
        ours(template, messages, continue_final_message=True)


def test_text_parts_are_joined_for_a_template_that_wants_a_string():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in ours(CHATML, [{"role": "user", "content": parts}])


PARTS_ONLY = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}<{{ c.text }}>{% endif %}{% endfor %}{% endfor %}"
EITHER = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}<{{ c.text }}>{% endfor %}{% endif %}{% endfor %}"


def test_a_template_gets_content_in_the_form_it_wants():
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    text = [{"role": "user", "content": "one"}]
    assert ours(PARTS_ONLY, parts) == ours(EITHER, parts) == "<one><two>"
    assert ours(PARTS_ONLY, text) == "<one>"
    assert ours(EITHER, text) == "one"


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        ([], "messages", "empty"),
        (["hello"], "messages[0]", "object"),
        ([{"content": "x"}], "messages[0].role", "role"),
        ([*HELLO, {"role": "user"}], "messages[1].content", "needs a content"),
        ([{"role": "user", "content": 3}], "messages[0].content", "string or a list"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}],
            "messages[0].content[1]",
            "'image_url' are not supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "needs a text"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "messages[0].tool_calls[0]", "function"),
    ],
)
def test_messages_that_cannot_be_are_refused_by_name(messages, param, reason):
    with pytest.raises(ChatError, match=reason) as caught:
        ours(CHATML, messages)
    assert caught.value.param == param


def test_the_developer_is_the_system_of_templates_that_do_not_know_it():
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert ours(CHATML, messages).startswith("<|im_start|>system\nBe brief.")
    assert ours("{{ messages[0].role }}{# developer #}", messages) == "developer"


def test_arguments_that_are_no_json_object_stay_text():
    template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"

    def shown(arguments) -> str:
        calls = [{**CALL, "function": {"name": "f", "arguments": arguments}}]
        return ours(template, [{"role": "assistant", "content": None, "tool_calls": calls}])

    assert shown('{"a": 1}') == '{"a": 1}'
    assert shown("{oops") == '"{oops"'
    assert shown("") == shown(None) == "{}"


def test_a_templates_own_complaint_is_passed_on():
    with pytest.raises(ChatError, match="Only user and assistant roles are supported!"):
        ours(MISTRAL, [*HELLO, {"role": "critic", "content": "x"}])
    with pytest.raises(ChatError, match="chat template"):
        ours("{{ messages[0].nothing.at_all }}", HELLO)


def test_a_broken_template_is_an_error_at_once():
    with pytest.raises(UserError, match="line 2"):
        ChatTemplate("{{ 1 }}\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() | length }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    ],
)
def test_templates_are_kept_in_their_sandbox(source):
    with pytest.raises(ChatError):
        ours(source, HELLO)


def test_template_variables_cannot_replace_the_messages():
    with pytest.raises(ChatError) as caught:
        ours(CHATML, HELLO, kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs"
    assert ours("{{ flag }}", HELLO, kwargs={"flag": True}) == "True"


# --- the model's text


class Think:
    """<t>...</t> is thought."""

    def __init__(self, prompt: str = "") -> None:
        self.inside = False

    def push(self, text):
        for char in text:
            if char in "<>":
                self.inside = char == "<"
            else:
                yield Reasoning(char) if self.inside else Text(char)

    def close(self):
        return [Text("/")]


class Calls:
    """[name] is a call."""

    def __init__(self, tools=()) -> None:
        self.held = ""
        self.count = 0

    def push(self, text):
        for char in text:
            if char == "!":
                raise RuntimeError("no exclamation marks")
            if char == "[" or self.held:
                self.held += char
                if char == "]":
                    yield CallStart(self.count, self.held[1:-1])
                    yield CallArguments(self.count, "{")
                    yield CallArguments(self.count, "}")
                    self.count, self.held = self.count + 1, ""
            else:
                yield Text(char)

    def close(self):
        return [Text(self.held)]


def test_without_parsers_all_is_text():
    parser = OutputParser()
    assert parser.push("a<b>[c]") == [Text("a<b>[c]")]
    assert parser.push("") == parser.close() == []


def test_reasoning_goes_before_tools():
    parser = OutputParser(Think(), Calls())
    assert parser.push("ab<[x]>c[f]d[") == [
        Text("ab"),
        Reasoning("[x]"),
        Text("c"),
        CallStart(0, "f"),
        CallArguments(0, "{}"),
        Text("d"),
    ]
    # what reasoning held back still goes through the tool parser
    assert parser.close() == [Text("[/")]


@given(text=st.text("ab<>[]", max_size=40), sizes=st.lists(st.integers(1, 5), max_size=40))
def test_a_streamed_answer_is_the_whole_one(text, sizes):
    whole, cut = OutputParser(Think(), Calls()), OutputParser(Think(), Calls())
    expected = merged([*whole.push(text), *whole.close()])
    events, position = [], 0
    for size in [*sizes, len(text)]:
        events += cut.push(text[position : position + size])
        position += size
    assert merged([*events, *cut.close()]) == expected


def test_a_parser_that_raises_loses_no_text_and_is_named():
    parser = OutputParser(None, Calls())
    assert parser.push("ab") == [Text("ab")]
    assert parser.push("c!d") == [Text("c!d")]
    assert parser.failure is not None
    assert "the tool parser failed: RuntimeError: no exclamation marks" in parser.failure
    assert parser.push("e!") == [Text("e!")]
    assert parser.close() == []


def test_a_reasoning_parser_that_raises_leaves_the_rest_to_the_tool_parser():
    class Broken(Think):
        def push(self, text):
            raise ValueError("no")

    parser = OutputParser(Broken(), Calls())
    assert parser.push("a[f]") == [Text("a"), CallStart(0, "f"), CallArguments(0, "{}")]
    assert "the reasoning parser failed: ValueError: no" in (parser.failure or "")


class Panic(BaseException):
    """Like pyo3's of a panic in Rust."""


@pytest.mark.parametrize("error", [SystemExit(3), Panic("poisoned")], ids=repr)
@pytest.mark.parametrize("method", ["push", "close"])
def test_whatever_a_parser_raises_is_its_own_fault(error, method):
    def fails(*_):
        raise error

    think, calls = Think(), Calls()
    setattr(think, method, fails)
    setattr(calls, method, fails)
    for parser in (OutputParser(None, calls), OutputParser(think, None)):
        assert merged([*parser.push("a"), *parser.close()])[0] == Text("a")
        assert f"parser failed: {type(error).__name__}: {error}" in parser.failure


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, GeneratorExit])
def test_an_interrupt_is_no_fault(interrupt):
    class Interrupted(Calls):
        def push(self, text):
            raise interrupt

    with pytest.raises(interrupt):
        OutputParser(None, Interrupted()).push("a")


GARBAGE = {
    "numbers": ([1, 2], "1, but the events of this parser are of the types Text, CallStart, CallArguments"),
    "text": ("hello", "'h', but the events of this parser are of the types"),
    "nothing": (None, "TypeError"),
    "thought": ([Reasoning("a")], "Reasoning(text='a'), but the events of this parser are of the types Text, CallS"),
    "no text": ([Text(None)], "Text(text=None), but an event's fields are of their types"),
    "no call": ([CallArguments(7, "{}")], "but a call's CallStart comes before its CallArguments"),
    "no name": ([CallStart(0, "")], "but a call has a name"),
    "miscounted": ([CallStart(1, "f")], "but calls are counted from 0 (expected: index=0)"),
    "no index": ([CallStart(0, "f"), CallArguments([], "{}")], "but a call's CallStart comes before"),
}


@pytest.mark.parametrize("case", GARBAGE)
@pytest.mark.parametrize("method", ["push", "close"])
def test_a_parser_that_answers_garbage_is_named_and_loses_no_text(case, method):
    answer, reason = GARBAGE[case]
    calls = Calls()
    setattr(calls, method, lambda *_: answer)
    parser = OutputParser(None, calls)
    assert merged([*parser.push("a"), *parser.close()]) == [Text("a")]
    assert parser.failure.startswith("the tool parser failed: ") and reason in parser.failure


def test_a_reasoning_parser_makes_no_calls():
    think = Think()
    think.push = lambda text: [CallStart(0, "f")]
    parser = OutputParser(think, Calls())
    assert parser.push("a") == [Text("a")]
    assert "the reasoning parser failed: it gave CallStart(index=0, name='f'), but" in parser.failure
