"""The tools of a request, and which of them may or must be called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lightllm.server.protocol import ApiError, ChatRequest, Tool, convert
from lightllm.server.schemas import check_schema


@dataclass(frozen=True)
class Tools:
    """``shown``: what the template is given, as the client sent it. ``callable``: those that may be called.

    ``required``: at least one of them must be, ``parallel``: and perhaps several. ``indices``: of the callable ones in
    the request.
    """

    shown: list[dict[str, Any]]
    callable: list[dict[str, Any]]
    indices: list[int]
    required: bool
    parallel: bool

    @property
    def strict(self) -> bool:
        return any(tool["function"].get("strict") for tool in self.callable)


class _Name(msgspec.Struct, kw_only=True):
    name: str


class _Named(msgspec.Struct, kw_only=True):
    """``tool_choice`` of one function, and what is listed in `_Some`."""

    type: Literal["function"]
    function: _Name


class _Some(msgspec.Struct, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_Named], Meta(min_length=1)]


class _Allowed(msgspec.Struct, kw_only=True):
    """``tool_choice`` of several functions."""

    allowed_tools: _Some


def read_tools(request: ChatRequest) -> Tools:
    """Raises `ApiError` for what is no tool, or a choice that cannot be made."""
    tools = check_tools(request.tools)
    choice = request.tool_choice
    everything = list(range(len(tools)))
    parallel = request.parallel_tool_calls is not False
    if choice is None or choice == "auto":
        return Tools(tools, tools, everything, False, parallel)
    if choice == "none":
        return Tools([], [], [], False, parallel)
    if isinstance(choice, str) and choice != "required":
        raise ApiError("tool_choice is none, auto, required, a function or allowed_tools.", param="tool_choice")
    if not tools:
        raise ApiError("tool_choice can only be used with tools.", param="tool_choice")
    if isinstance(choice, str):
        return Tools(tools, tools, everything, True, parallel)
    kind = choice.get("type", "function")
    if kind == "function":
        indices = _indices(tools, [convert(choice, _Named, "tool_choice")])
        return Tools(tools, [tools[i] for i in indices], indices, True, False)  # who is named is called once
    if kind == "allowed_tools":
        allowed = convert(choice, _Allowed, "tool_choice").allowed_tools
        indices = _indices(tools, allowed.tools)
        return Tools(tools, [tools[i] for i in indices], indices, allowed.mode == "required", parallel)
    raise ApiError(
        f"tool_choice of type {kind!r} is not supported, only 'function' and 'allowed_tools'.", param="tool_choice"
    )


def _indices(tools: Sequence[dict[str, Any]], chosen: Sequence[_Named]) -> list[int]:
    numbers = {tool["function"]["name"]: i for i, tool in enumerate(tools)}
    for named in chosen:
        if named.function.name not in numbers:
            raise ApiError(f"There is no tool called {named.function.name!r} among the tools.", param="tool_choice")
    return sorted({numbers[named.function.name] for named in chosen})


def check_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The tools as they were sent, for templates to show. Raises `ApiError` for what is no tool."""
    names: set[str] = set()
    for i, tool in enumerate(convert(tools or [], list[Tool], "tools")):
        if tool.type != "function":
            raise ApiError(f"Tools of type {tool.type!r} are not supported, only 'function'.", param=f"tools[{i}].type")
        if tool.function.name in names:
            raise ApiError(f"There are two tools called {tool.function.name!r}.", param=f"tools[{i}].function.name")
        names.add(tool.function.name)
        if tool.function.parameters is not None:
            check_schema(tool.function.parameters, f"tools[{i}].function.parameters")
    return tools or []
