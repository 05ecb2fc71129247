"""`--tool-call-parser auto`: by the checkpoint's template and tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, models

from lightllm import ModelInfo, ToolParserRecord, UserError, hookimpl
from lightllm.assemble import choose_tool_parser
from lightllm.config import Config
from lightllm.plugins import Plugins, Recipe

# As in the templates of the models named; shortened to what shows how calls are written.
QWEN25 = r"""{{- "return a json object within <tool_call></tool_call> tags:\n<tool_call>\n{\"name\": <function-name>,
\"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}{{- '\n<tool_call>\n{"name": "' }}{{- call.name }}"""
QWEN3_CODER = (
    "{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{%- for name, value in tool_call.arguments %}"
)
GLM45 = "{{ '\\n<tool_call>' + tc.name }}{% for k, v in tc.arguments.items() %}<arg_key>{{ k }}</arg_key>"
LLAMA31 = """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument names}.' }}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}"""
MISTRAL = """{{- "[TOOL_CALLS] [" }}{{- '"name": "' + tool_call.function.name }}"""
LLAMA4 = "{{ '[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]' }}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def chosen(template: str | None, tokens: Sequence[str] = (), asked: str = "auto", plugins: Plugins | None = None):
    raw = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    raw.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    info = ModelInfo(path="/m", architecture="A", config={}, chat_template=template)
    found = choose_tool_parser(Config(tool_call_parser=asked), plugins or Plugins.discover(), info, raw)
    return found and found.record.name


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        (QWEN25, (), "qwen25"),
        (LLAMA31, ("<|python_tag|>",), "llama3"),
        (MISTRAL, (), "mistral"),
        (PLAIN, ("[TOOL_CALLS]", "[ARGS]"), "mistral"),
        (LLAMA4, (), "pythonic"),
        (PLAIN, ("<|python_start|>",), "pythonic"),
        (QWEN3_CODER, (), "hermes"),
        (GLM45, (), "hermes"),
        (PLAIN, (), "hermes"),
        (None, (), "hermes"),
    ],
)
def test_the_checkpoint_tells(template, tokens, name):
    assert chosen(template, tokens) == name


def test_it_says_why(caplog):
    with caplog.at_level(logging.INFO, "lightllm"):
        chosen(MISTRAL)
    assert "tool parser: tool-parsers/mistral (not " in caplog.text
    assert "not tool-parsers/qwen25: the chat template does not write <tool_call>;" in caplog.text


def test_what_is_asked_for_is_had():
    assert chosen(MISTRAL, asked="llama3") == "llama3"
    assert chosen(MISTRAL, asked="tool-parsers/llama3") == "llama3"
    assert chosen(MISTRAL, asked="none") is None
    with pytest.raises(UserError, match=r"no tool parser called 'lama3'.*Did you mean llama3"):
        chosen(MISTRAL, asked="lama3")


def test_a_plugin_goes_before_the_built_ins():
    class Mine:
        @hookimpl
        def lightllm_tool_parsers(self):
            fits = {"target": "x:X", "matches": lambda info, tokens: None}
            return [
                ToolParserRecord(name="silent", target="x:Y", priority=9),
                ToolParserRecord(name="mine", priority=1, **fits),
            ]

    assert chosen(QWEN25, plugins=Plugins.discover(extra=[("mine", Mine())])) == "mine"


def test_without_any_parser_the_server_does_without(caplog):
    providers = tuple({provided.plugin.name for provided in Plugins.discover().records("tool_parsers")})
    assert chosen(QWEN25, plugins=Plugins.discover(Recipe(blocked=providers))) is None
    assert "no tool parser can serve this model: none is installed" in caplog.text
