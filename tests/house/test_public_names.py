"""What plugins are written against, name by name. A change here is a change for every plugin author.

After one that is meant: ``python tests/house/test_public_names.py > tests/house/public_names.txt``. Something new
raises the last number of `lightllm.HOOKS_VERSION`; something gone or changed raises the second, and is in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

GOLDEN = Path(__file__).with_name("public_names.txt")
MODULES = (
    "lightllm",
    "lightllm.grammar",
    "lightllm.hookspecs",
    "lightllm.nn.batch",
    "lightllm.nn.layers",
    "lightllm.nn.rope",
    "lightllm.testing",
)


def lines() -> Iterator[str]:
    yield f"version {importlib.import_module('lightllm').HOOKS_VERSION}"
    for module in map(importlib.import_module, MODULES):
        for name in public(module):
            yield from described(f"{module.__name__}.{name}", getattr(module, name))


def public(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted(name for name in own if name[0] != "_")


def described(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, type) or hasattr(value, "__origin__"):
        yield f"{name}{signature(value) if inspect.isfunction(value) else ''}"
        return
    if issubclass(value, msgspec.Struct):
        fields = [f"{f.name}{'' if f.required else '?'}: {plain(f.type)}" for f in msgspec.structs.fields(value)]
        yield f"{name}({', '.join(fields)})"
        return
    yield f"{name} ({', '.join(base.__name__ for base in value.__bases__)})"
    for attribute, member in sorted(vars(value).items()):
        own = (
            inspect.isfunction(member) and member.__module__ == value.__module__
        )  # not what typing puts into Protocols
        if own and (attribute == "__init__" or attribute[0] != "_"):
            yield f"{name}.{attribute}{signature(member)}"
    yield from (f"{name}.{a}: {hint}" for a, hint in inspect.get_annotations(value).items() if a[0] != "_")


def signature(function: Any) -> str:
    """As it is called: which parameters have a default, not which default."""
    found = inspect.signature(function)
    shown = [p if p.default is p.empty else p.replace(default=...) for p in found.parameters.values()]
    return plain(found.replace(parameters=shown)).replace("Ellipsis", "...")


def plain(value: object) -> str:
    """How annotations are shown differs between versions of Python."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", str(value)).replace("'", "")
    return re.sub(r"\b(collections\.abc|typing|pathlib(\._local)?|lightllm\.interfaces)\.", "", text)


def test_the_public_names_are_those_that_were_agreed_on() -> None:
    golden, found = GOLDEN.read_text().splitlines(), list(lines())
    gone = sorted(set(golden) - set(found))
    new = sorted(set(found) - set(golden))
    assert found == golden, "\n".join(
        [__doc__ or "", *(f"gone: {line}" for line in gone), *(f"new:  {line}" for line in new)]
    )


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
