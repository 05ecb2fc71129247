"""Messages to prompt, and the model's text to content, reasoning and tool calls.

Prompts are rendered as transformers renders them (its utils/chat_template_utils.py is the reference). A whole answer
and a streamed one are parsed by the same machine: a whole answer is one push and a close.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightllm.checks import INTERRUPTS, Wrong, describe
from lightllm.interfaces import (
    CallArguments,
    CallStart,
    Event,
    Reasoning,
    ReasoningParser,
    Text,
    ToolParser,
    UserError,
)

log = logging.getLogger("lightllm.server")


class ChatError(ValueError):
    """These messages cannot become a prompt. ``param``: the request field at fault, e.g. ``messages[2].content``."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


class ChatTemplate:
    """A checkpoint's jinja2 template. ``special_tokens``: further ones by name (``pad_token``), for it to use.

    Raises UserError when the source is no template.
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        # like transformers, one that is not set is undefined, not None
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template has an error in line {error.lineno}: {error.message}") from None
        self._knows_developer = "developer" in source
        self._needs_content = False
        self._takes_text, self._takes_parts = self._probe("text"), self._probe("parts")
        self._needs_content = self._cannot_do_without_content()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens included: encode it without adding any.

        ``messages`` and ``tools`` are OpenAI's, ``kwargs`` further variables for the template. With
        ``continue_final_message`` the prompt ends where the last message does. Raises `ChatError`.
        """
        if not messages:
            raise ChatError("messages must not be empty")
        prepared = [self._prepare(message, f"messages[{i}]") for i, message in enumerate(messages)]
        variables = dict(kwargs or {})
        if clash := _RESERVED & variables.keys():
            raise ChatError(f"{', '.join(sorted(clash))} cannot be set here", "chat_template_kwargs")
        if not continue_final_message:
            return self._render(prepared, tools, add_generation_prompt, variables)
        if add_generation_prompt:
            raise ChatError("continue_final_message needs add_generation_prompt to be false", "continue_final_message")
        final = _mark_end(prepared[-1])
        text = self._render(prepared, tools, False, variables)
        end = text.rfind(_END.strip())
        if end < 0 or final.strip() not in text:
            raise ChatError("the chat template does not end with the final message's text", "continue_final_message")
        # a template that trims its messages has trimmed the mark's own space too
        return text[:end] if text.startswith(_END, end) else text[:end].rstrip()

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._tokens, **variables},
            )
        except _TEMPLATE_ERRORS as error:
            raise ChatError(f"the chat template refused these messages: {error}") from None

    def _prepare(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """One of OpenAI's messages as templates expect it. Keys that are null are left out, as transformers does."""
        if not isinstance(message, Mapping):
            raise ChatError("a message must be an object", where)
        prepared = {key: value for key, value in message.items() if value is not None}
        role = prepared.get("role")
        if not isinstance(role, str):
            raise ChatError("a message needs a role", f"{where}.role")
        if role == "developer" and not self._knows_developer:
            prepared["role"] = "system"
        if "content" in prepared:
            prepared["content"] = self._content(prepared["content"], f"{where}.content")
        elif role in ("system", "developer", "user", "tool"):
            raise ChatError(f"a message of role {role} needs a content", f"{where}.content")
        elif self._needs_content:
            prepared["content"] = ""
        if "tool_calls" in prepared:
            prepared["tool_calls"] = _tool_calls(prepared["tool_calls"], f"{where}.tool_calls")
            if not prepared["tool_calls"]:
                del prepared["tool_calls"]
        reasoning = next((prepared[key] for key in _REASONING if key in prepared), None)
        if reasoning is not None:
            prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
        return prepared

    def _content(self, content: Any, where: str) -> Any:
        if isinstance(content, str):
            if self._takes_parts and not self._takes_text:
                return [{"type": "text", "text": content}]
            return content
        if not isinstance(content, list):
            raise ChatError("content must be a string or a list of parts", where)
        texts = []
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in _TEXT_PARTS or not isinstance(part.get(_TEXT_PARTS[kind]), str):
                what = "a text part needs a text" if kind in _TEXT_PARTS else f"content parts of type {kind!r} are not"
                raise ChatError(what if kind in _TEXT_PARTS else f"{what} supported by this model", f"{where}[{i}]")
            texts.append(part[_TEXT_PARTS[kind]])
        if self._takes_parts:
            return [{"type": "text", "text": text} for text in texts]
        return "\n".join(texts)

    def _probe(self, form: str) -> bool:
        """Whether the template shows content of this form as it is."""
        mark = "probe of the content"
        content: Any = mark if form == "text" else [{"type": "text", "text": mark}]
        try:
            text = self._render([{"role": "user", "content": content}], None, True, {})
        except ChatError:
            return False
        return mark in text and "'text'" not in text

    def _cannot_do_without_content(self) -> bool:
        """Whether an assistant's message that only calls must have an empty content for this template."""
        call = {"id": "call_123", "type": "function", "function": {"name": "f", "arguments": {}}}
        calling: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
        user = {"role": "user", "content": [{"type": "text", "text": "x"}] if not self._takes_text else "x"}
        try:
            self._render([user, calling], None, False, {})
        except ChatError:
            try:
                self._render([user, {**calling, "content": ""}], None, False, {})
            except ChatError:
                return False
            return True
        return False


_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS: Mapping[Any, str] = {"text": "text", "input_text": "text", "refusal": "refusal"}
_END = "END-OF-THE-FINAL-MESSAGE "


def _mark_end(message: dict[str, Any]) -> str:
    """Append the mark to a message's text, in place; the text without it."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END
        return content
    if content:
        text: str = content[-1]["text"]
        content[-1]["text"] = text + _END
        return text
    raise ChatError("the final message has no content to continue", "continue_final_message")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's tool calls carry their arguments as JSON text, templates want them as objects."""
    if not isinstance(calls, list):
        raise ChatError("tool_calls must be a list", where)
    prepared = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError("a tool call needs a function with a name", f"{where}[{i}]")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError):
                value = None
            # what a model once wrote need not be JSON; then the text is all there is to show
            arguments = value if isinstance(value, dict) else arguments
        prepared.append({**call, "function": {**function, "arguments": arguments}})
    return prepared


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012  (the base class has it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a scope, as the reference's call block is one
        return [jinja2.nodes.Scope(body).set_lineno(line)]


class _Dict:
    """`dict` for templates, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, closed to names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that a template may set a field called self
        fields = dict(*rest, **kwargs)
        for name in fields:
            _check_field(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_field(name)
        super().__setitem__(name, value)


def _check_field(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not set a namespace's field {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# ---------------------------------------------------------------------------------------------------------------------


TOOL_EVENTS: tuple[type, ...] = (Text, CallStart, CallArguments)
REASONING_EVENTS: tuple[type, ...] = (Text, Reasoning)


class OutputParser:
    """Reasoning first, then tool calls in what is left; without parsers all is `Text`.

    A parser that raises, or answers with what is no event of its, is left out from there on: its text comes through as
    it is, and ``failure`` says whose fault it was, for the request to end with: ``reasoning_name`` or ``tools_name``.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        *,
        reasoning_name: str = "the reasoning parser",
        tools_name: str = "the tool parser",
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._reasoning_name, self._tools_name = reasoning_name, tools_name
        self._calls = 0
        self.failure: str | None = None

    def push(self, text: str) -> list[Event]:
        return merged(self._think(text)) if text else []

    def close(self) -> list[Event]:
        """What the parsers held back. Nothing may be pushed afterwards."""
        return merged([*self._think(None), *self._call(None)])

    def _think(self, text: str | None) -> list[Event]:
        if self._reasoning is None:
            return [] if text is None else self._call(text)
        out: list[Event] = []
        for event in self._ask(self._reasoning, text, REASONING_EVENTS):
            out += self._call(event.text) if isinstance(event, Text) else [event]
        return out

    def _call(self, text: str | None) -> list[Event]:
        if self._tools is None:
            return [] if text is None else [Text(text)]
        return self._ask(self._tools, text, TOOL_EVENTS)

    def _ask(self, parser: ReasoningParser | ToolParser, text: str | None, allowed: tuple[type, ...]) -> list[Event]:
        """What it makes of the text, or None: of its end."""
        try:
            events: list[Event] = list(parser.close() if text is None else parser.push(text))
            for event in events:
                if type(event) is Text and type(event.text) is str:  # as nearly all are
                    continue
                if rule := broken_rule(event, allowed, self._calls):
                    raise Wrong(f"it gave {event!r:.80}, but {rule}")
                self._calls += type(event) is CallStart
            return events
        except INTERRUPTS:
            raise
        except BaseException as error:
            self._fail(parser, error)
            return [] if text is None else [Text(text)]

    def _fail(self, parser: object, error: BaseException) -> None:
        name = self._tools_name if parser is self._tools else self._reasoning_name
        self.failure = f"{name} failed: {describe(error)}"
        log.error("%s", self.failure, exc_info=error)
        if parser is self._tools:
            self._tools = None
        else:
            self._reasoning = None


def broken_rule(event: Any, allowed: tuple[type, ...], started: int) -> str | None:
    """The rule of a parser's events that this one breaks, ``started`` calls having begun before."""
    if type(event) not in allowed:
        return f"the events of this parser are of the types {', '.join(kind.__name__ for kind in allowed)}"
    if isinstance(event, CallStart):
        if not (isinstance(event.name, str) and event.name):
            return "a call has a name"
        return None if event.index == started else f"calls are counted from 0 (expected: index={started})"
    if not isinstance(_text(event), str):
        return "an event's fields are of their types"
    if isinstance(event, CallArguments) and event.index not in range(started):
        return "a call's CallStart comes before its CallArguments"
    return None


def merged(events: Iterable[Event]) -> list[Event]:
    """Successive pieces of the same text as one; empty ones dropped."""
    out: list[Event] = []
    for (kind, index), pieces in itertools.groupby(filter(_says_something, events), _kind):
        if kind is CallStart:
            out += pieces
            continue
        text = "".join([_text(piece) for piece in pieces])
        out.append(CallArguments(index, text) if kind is CallArguments else kind(text))
    return out


def _kind(event: Event) -> tuple[Any, int]:
    return type(event), event.index if isinstance(event, CallArguments) else 0


def _text(event: Event) -> str:
    if isinstance(event, CallStart):
        return event.name
    return event.fragment if isinstance(event, CallArguments) else event.text


def _says_something(event: Event) -> bool:
    return isinstance(event, CallStart) or bool(_text(event))
