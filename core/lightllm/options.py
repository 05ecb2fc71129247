"""One option, however it is given: what it is called, what it may be, and what to say when it is not.

Core options come from Config's fields, the plugins' from `OptionGroup.add`; both go the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import msgspec.inspect

from lightllm.interfaces import UserError


class UsageError(UserError):
    """The command line, the environment or the config file is wrong; exit code 2."""


ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "model-dir": "model",
        "model-name": "served-model-name",
        "max-total-token-num": "max-total-tokens",
        "max-req-total-len": "max-model-len",
        "running-max-req-size": "max-running-requests",
        "batch-max-tokens": "max-batch-tokens",
        "data-type": "dtype",
    }
)
"""LightLLM's names of our options."""

DTYPES: Mapping[str, str] = MappingProxyType(
    {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
)

CORE = "lightllm-serve itself"

_NUMBERS = (msgspec.inspect.IntType, msgspec.inspect.FloatType)
_LISTS = (msgspec.inspect.ListType, msgspec.inspect.VarTupleType)
_TEXT = msgspec.inspect.StrType
_PLAIN = (_TEXT, msgspec.inspect.BoolType, msgspec.inspect.LiteralType)


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option, however it is given. ``name`` is spelt with hyphens and without the leading two."""

    name: str
    type: Any
    default: Any
    help: str
    owner: str = CORE

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"LIGHTLLM_{self.key.upper()}"

    @property
    def is_flag(self) -> bool:
        return isinstance(_plain_types(self.type)[0], msgspec.inspect.BoolType)

    @property
    def is_list(self) -> bool:
        return isinstance(_plain_types(self.type)[0], _LISTS)

    def parse(self, text: str | Sequence[str], source: str) -> Any:
        """The value of what was typed. ``source`` names where: ``--port`` or ``LIGHTLLM_PORT``."""
        texts = [text] if isinstance(text, str) else text
        value: Any = texts[-1].strip()
        if self.is_list:
            value = [item for given in texts for item in (part.strip() for part in given.split(",")) if item]
        elif self.is_flag:
            value = {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value.lower())
        # Not strict, msgspec takes the text "null" for None: an API key of that name would open the server.
        is_text = isinstance(_plain_types(self.type)[0], _TEXT)
        converted = self.convert(value, source, strict=is_text)
        if converted is None:
            raise UsageError(f"{source}: {value!r} is not {self.allowed()}")
        return converted

    def convert(self, value: Any, source: str, *, strict: bool) -> Any:
        """Check a value against the option's type. Raises UsageError saying what is allowed."""
        if value == "" or (isinstance(value, list) and (not value or "" in value)):
            raise UsageError(f"{source}: the value is empty")  # an API key of no letters would open the server
        if self.key == "dtype" and isinstance(value, str):
            value = DTYPES.get(value, value)
        try:
            value = msgspec.convert(value, self.type, strict=strict)
            if self.key == "kv_cache_memory" and value is not None:
                parse_size(value)
        except (msgspec.ValidationError, ValueError, OverflowError):
            raise UsageError(f"{source}: {value!r} is not {self.allowed()}") from None
        return value

    def allowed(self) -> str:
        """What a value must be, in words."""
        if self.key == "kv_cache_memory":
            return "a size in bytes, such as 4GiB, 512MB or 1.5G"
        return " or ".join(_in_words(t) for t in _plain_types(self.type))

    def spellings(self) -> list[str]:
        """What it occupies on the command line, without the leading hyphens."""
        return [self.name, f"no-{self.name}"] if self.is_flag else [self.name]

    def metavar(self) -> str:
        """What stands for the value in the help text."""
        info = _plain_types(self.type)[0]
        if isinstance(info, msgspec.inspect.LiteralType):
            return f"{{{','.join(str(value) for value in info.values)}}}"
        if isinstance(info, _NUMBERS):
            return "N"
        return self.key.rpartition("_")[2].upper()


class OptionGroup:
    """Collects the options that plugins add. Each plugin is handed one that knows its owner."""

    def __init__(self, owner: str, options: dict[str, Option]) -> None:
        self._owner = owner
        self._options = options

    def of(self, owner: str) -> OptionGroup:
        return OptionGroup(owner, self._options)

    def withdraw(self) -> None:
        """Take back what this owner has added: it broke half way."""
        for option in [option for option in self._options.values() if option.owner == self._owner]:
            del self._options[option.name]

    def add(self, name: str, *, type: Any = str, default: Any = None, help: str = "") -> None:
        """Add ``--my-option``. Its value is ``config.plugin_options["my_option"]``, ``default`` unless given.

        ``type``: str, int, float, bool, a Literal, a tuple or list of these, or any of them Annotated with
        msgspec.Meta. A bool becomes ``--my-option`` and ``--no-my-option``. A name that is taken is a UserError
        naming both owners.
        """
        if not re.fullmatch(r"--[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
            raise ValueError(f"option {name!r}: give it as --lower-case-words")
        annotation = type if default is not None else type | None
        option = Option(name=spelling(name), type=annotation, default=default, help=help, owner=self._owner)
        if not isinstance(_plain_types(annotation)[0], (*_NUMBERS, *_LISTS, *_PLAIN)):
            raise TypeError(f"option {name}: {type} cannot be typed on a command line")
        msgspec.convert(default, annotation)
        taken = {word: other.owner for other in self._options.values() for word in other.spellings()}
        taken |= dict.fromkeys([*ALIASES, "cache", "config", "help", "version"], CORE)  # LIGHTLLM_CACHE is a folder
        for word in option.spellings():
            if owner := taken.get(word):
                raise UsageError(
                    f"option {name} is added by {self._owner}, but belongs to {owner}: block a plugin with --no-plugin"
                )
        self._options[option.name] = option


def parse_size(text: str) -> int:
    """Bytes of ``4GiB``, ``512MB``, ``1.5G`` or ``1024``. Raises ValueError unless that is one byte or more.

    As in GNU coreutils, K, M, G, T (and KiB, Ki ...) are powers of 1024; KB, MB, GB, TB powers of 1000.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(IB?|B)?|B)?", text.strip().upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size in bytes, such as 4GiB, 512MB or 1.5G")
    number, unit, suffix = match.groups()
    size = int(float(number) * (1000 if suffix == "B" else 1024) ** (" KMGT".index(unit or " ")))
    if size <= 0:
        raise ValueError(f"{text!r} is no bytes at all")
    return size


def spelling(name: str) -> str:
    return name.removeprefix("--").replace("_", "-")


def _plain_types(annotation: Any) -> list[msgspec.inspect.Type]:
    """The alternatives of a type, None aside."""
    return _alternatives(msgspec.inspect.type_info(annotation))


def _alternatives(info: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
    while isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    types = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    return [t for t in types if not isinstance(t, msgspec.inspect.NoneType)]


def _in_words(info: msgspec.inspect.Type) -> str:
    if isinstance(info, msgspec.inspect.LiteralType):
        return f"one of {', '.join(str(value) for value in info.values)}"
    if isinstance(info, msgspec.inspect.BoolType):
        return "true or false"
    if isinstance(info, _LISTS):
        (item, *_) = _alternatives(info.item_type)
        return "a list of names" if isinstance(item, _TEXT) else f"a list in which each item is {_in_words(item)}"
    if not isinstance(info, (msgspec.inspect.IntType, msgspec.inspect.FloatType)):
        return "a text"
    what = "a whole number" if isinstance(info, msgspec.inspect.IntType) else "a number"
    if info.ge is not None and info.le is not None:
        return f"{what} from {info.ge} to {info.le}"
    limits = {"at least": info.ge, "at most": info.le, "more than": info.gt, "less than": info.lt}
    return " and ".join(f"{what} {word} {limit}" for word, limit in limits.items() if limit is not None) or what
