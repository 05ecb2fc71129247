"""What can be wrong with what a plugin provides: its records and their targets, held against `interfaces`."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import msgspec

from lightllm import interfaces
from lightllm.grammar import GrammarError
from lightllm.interfaces import Record

RECORDS: Mapping[str, tuple[type[Record], type]] = MappingProxyType(
    {
        "models": (interfaces.ModelRecord, interfaces.Model),
        "attention_backends": (interfaces.AttentionBackendRecord, interfaces.AttentionBackend),
        "operators": (interfaces.OperatorsRecord, interfaces.Operators),
        "samplers": (interfaces.SamplerRecord, interfaces.Sampler),
        "logits_processors": (interfaces.LogitsProcessorRecord, interfaces.LogitsProcessor),
        "tool_parsers": (interfaces.ToolParserRecord, interfaces.ToolParser),
        "reasoning_parsers": (interfaces.ReasoningParserRecord, interfaces.ReasoningParser),
        "weight_formats": (interfaces.WeightFormatRecord, interfaces.WeightFormat),
        "linear_methods": (interfaces.LinearMethodRecord, interfaces.LinearMethod),
        "grammar_backends": (interfaces.GrammarBackendRecord, interfaces.GrammarBackend),
        "executors": (interfaces.ExecutorRecord, interfaces.Executor),
    }
)
"""Kind of record -> its type, and the contract of its target. The hook that lists a kind is ``lightllm_<kind>``."""

INTERRUPTS = (KeyboardInterrupt, GeneratorExit)
"""What passes through us. All else that a plugin's code raises is its fault; a panic in Rust is no Exception."""


class Wrong(Exception):
    """What is wrong with a plugin, said in full: shown without an exception's name."""


@contextmanager
def blamed(who: str) -> Iterator[None]:
    """What a plugin's code raises within becomes a `Wrong` that names it. What speaks for itself passes."""
    try:
        yield
    except (Wrong, interfaces.UserError, GrammarError, *INTERRUPTS):
        raise
    except BaseException as error:
        raise Wrong(f"{who} failed: {describe(error)}") from error


def import_target(target: str) -> Any:
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def as_list(hook: str, answer: Any) -> list[Any]:
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise Wrong(f"{hook} answered {answer!r:.80}, which is no list")
    return list(answer)


def check_records(records: list[Record]) -> None:
    """msgspec does not check what a struct is built with; a wrong record must not surface amid a start."""
    seen: set[str] = set()
    for record in records:
        for spec in msgspec.structs.fields(type(record)):
            value = getattr(record, spec.name)
            what = f"record {record.name!r}: {spec.name} is {value!r:.80}"
            if "Callable" in str(spec.type):
                if not callable(value) and (value is not None or spec.required):
                    raise Wrong(f"{what}, which cannot be called")
                continue
            try:
                msgspec.convert(value, spec.type)
            except msgspec.ValidationError as error:
                raise Wrong(f"{what}: {error}") from None
            if spec.name in ("target", "checkpoint") and not all(value.partition(":")[::2]):
                raise Wrong(f"{what}, not module:attr")
            if spec.name == "adapters":
                for key, target in value.items():
                    if not all(key.partition("/")[::2]) or not all(target.partition(":")[::2]):
                        raise Wrong(f"{what}, not format/name to module:attr")
        if "/" in record.name or record.name.split() != [record.name]:
            raise Wrong(f"a record is called {record.name!r}: names hold no slash and no space")
        if record.name in ("auto", "none"):
            raise Wrong(f"a record is called {record.name!r}: options mean something else by it")
        if record.name in seen:
            raise Wrong(f"it lists {record.name!r} twice")
        seen.add(record.name)


def check_target(target: str, contract: type | None = None) -> None:
    """Import it, and hold its members and what they can be called with against the contract."""
    try:
        found = import_target(target)
    except INTERRUPTS:
        raise
    except BaseException as error:
        raise Wrong(f"{target} cannot be imported: {describe(error)}") from error
    if contract is None:
        return
    missing = [name for name in contract_members(contract) if not hasattr(found, name)]
    if missing:
        raise Wrong(f"{target} is no {contract.__name__}: it lacks {', '.join(missing)}")
    for name, method in vars(contract).items():
        # typing puts an __init__ of its own into Protocols without one, and Python 3.10 into all
        if inspect.isfunction(method) and method.__module__ != "typing":
            _check_call(found if name == "__init__" else getattr(found, name), method, f"{target}: {name}")


def _check_call(found: Any, method: Callable[..., Any], what: str) -> None:
    """``found`` can be called as the contract's method is."""
    wanted = list(inspect.signature(method).parameters.values())
    if inspect.isclass(found):  # called without self
        wanted = wanted[1:]
    positional = [p.name for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {p.name: None for p in wanted if p.kind is p.KEYWORD_ONLY}
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError):  # not written in Python
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        shown = ", ".join([*positional, *named])
        raise Wrong(f"{what}{signature} cannot be called with ({shown}): {error}") from None


def contract_members(contract: type) -> list[str]:
    """What a target must have: the methods and class variables of a contract, by name."""
    variables = [name for name, hint in inspect.get_annotations(contract).items() if str(hint).startswith("ClassVar")]
    methods = [name for name, value in vars(contract).items() if inspect.isfunction(value) and name[0] != "_"]
    return variables + methods


def culprit(error: BaseException, parts: Mapping[type, str]) -> str | None:
    """Whose code raised it: of these parts' methods the innermost in its traceback. ``parts``: class -> name.

    So that nothing need be wrapped around what runs in every layer of every step.
    """
    found, trace = None, error.__traceback__
    while trace is not None:
        found = parts.get(type(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def describe(error: BaseException) -> str:
    """An exception in one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its own __str__ fails
        text = ""
    if isinstance(error, Wrong):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
