"""A plugin as a whole."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from lightllm.discovery import Plugin, given, installed
from lightllm.plugins import Plugins, Recipe
from lightllm.testing.rules import broken


def check_plugin(plugin: ModuleType | str | Path) -> None:
    """Its hooks and records are valid, and every target fulfils its contract: what `lightllm-serve plugins --check`
    finds of it, whatever else is installed. ``plugin``: a module, a module's name, or the path of a .py file."""
    known = installed()
    if isinstance(plugin, (str, Path)):
        what = str(plugin.resolve() if isinstance(plugin, Path) else plugin)
        (found, *_) = [*given((what,), known), *(one for one in known if one.asked_for)]
    else:
        what = getattr(plugin, "__name__", type(plugin).__name__)
        found = Plugin(what, "given to check_plugin", "", lambda: plugin)
        for one in known:
            if one.target == what:  # its extras, which need not be installed
                found.distribution, found.requires = one.distribution, one.requires
    plugins = Plugins([found], Recipe(), quiet=True)
    plugins.check()
    if found.status != "ok":
        raise broken(
            "a plugin's hooks, records and targets are valid", f"plugin: {what}", f"{found.status}: {found.reason}"
        )
