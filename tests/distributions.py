"""Installs pretended third-party distributions: a real dist-info folder and real modules, in a folder on sys.path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent

import pytest


class Site:
    """A folder on sys.path; ``install`` does what pip would have done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        distribution: str,
        points: Mapping[str, str],
        modules: Mapping[str, str],
        *,
        version: str = "1.2",
        requires: Sequence[str] = (),
    ) -> None:
        """``points``: entry-point name -> target. ``modules``: module name -> source."""
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {text}" for text in requires]) + "\n\n")
        (info / "entry_points.txt").write_text(
            "[lightllm]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        )
        for name, source in modules.items():
            (self.folder / f"{name}.py").write_text("from lightllm import *\n" + dedent(source))
        importlib.invalidate_caches()


def site_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The body of a fixture: the folder is on sys.path, in this process and its children, until the test ends."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield Site(folder)
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
