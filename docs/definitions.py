"""Python definitions by name, as they stand in a source file. A build hook of mkdocs too: a page includes one by

    --8<-- "path/from/the/repository.py:Class.method"

Several names are joined by commas. A file or a name that is not there fails the build.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

INCLUDE = re.compile(r'^(?P<indent> *)--8<-- "(?P<path>[^":]+\.py):(?P<names>[\w.,]+)"$', re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page, before pymdownx.snippets sees it."""

    def included(found: re.Match[str]) -> str:
        source = Source(found["path"])
        text = "\n\n\n".join(source.text(name) for name in found["names"].split(","))
        return textwrap.indent(text, found["indent"])

    return INCLUDE.sub(included, markdown)


class Source:
    """A file of the repository."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._text = (ROOT / path).read_text(encoding="utf-8")
        self._lines = self._text.splitlines()
        self.module = ast.parse(self._text, path)

    def definitions(self, of: ast.Module | ast.ClassDef | None = None) -> Iterator[tuple[str, ast.stmt]]:
        """Classes, functions and assigned names, in the file's order."""
        for node in (of or self.module).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name, node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id, node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                yield node.targets[0].id, node

    def find(self, name: str) -> ast.stmt:
        """``name``: also ``Class.method``. Raises LookupError."""
        within: ast.stmt | ast.Module = self.module
        for part in name.split("."):
            known = dict(self.definitions(within)) if isinstance(within, (ast.Module, ast.ClassDef)) else {}
            if part not in known:
                raise LookupError(f"{self.path} defines no {name}")
            within = known[part]
        assert isinstance(within, ast.stmt)
        return within

    def text(self, name: str) -> str:
        """The definition's lines, decorators included."""
        node = self.find(name)
        return self.lines(_first_line(node), node.end_lineno or node.lineno)

    def lines(self, first: int, last: int) -> str:
        return textwrap.dedent("\n".join(self._lines[first - 1 : last]))

    def doc(self, node: ast.stmt, of: ast.Module | ast.ClassDef | None = None) -> str:
        """A docstring; of an assigned name (in class ``of``) the string below it."""
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            return ast.get_docstring(node) or ""
        body = (of or self.module).body
        after = body[body.index(node) + 1 :][:1]
        if after and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant):
            return inspect.cleandoc(str(after[0].value.value))
        return ""

    def signature(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
        """``def name(...) -> type``, as it is laid out in the file, decorators left out."""
        text = self.lines(node.lineno, node.body[0].lineno)
        for colon in re.finditer(":", text):
            with suppress(SyntaxError):
                ast.parse(f"{text[: colon.start()]}: ...")
                return text[: colon.start()]
        raise ValueError(f"{self.path}: {node.name} has no signature")


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])
