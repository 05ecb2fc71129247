"""`lightllm-serve plugins new`: a plugin of one's own, copied from a small one of its kind that works.

templates/<kind>/ holds the kind's files and templates/common/ what all kinds share. They are real Python: a
distribution ``example-plugin`` with the module ``example_plugin`` and classes called ``ExamplePlugin...``. Nothing but
these three words is replaced.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from lightllm.checks import suggestion
from lightllm.discovery import DISTRIBUTION, installed
from lightllm.interfaces import UserError
from lightllm.options import UsageError

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "tool-parser": "reads tool calls out of a model's text, and can force them (--tool-call-parser)",
        "reasoning-parser": "tells a model's thought from its answer (--reasoning-parser)",
        "model": "an architecture, made of lightllm.nn's layers",
        "attention-backend": "attention over the KV pool (--attention-backend)",
        "operators": "norms, activations and rotations (--operators)",
        "sampler": "picks the next token (--sampler)",
        "logits-processor": "changes logits for requests that set a field of its own",
        "linear-method": "holds and multiplies linear weights its own way, quantized for one (--quantization)",
        "weight-format": "reads checkpoints of a format of its own",
        "grammar-backend": "holds answers to a grammar (--grammar-backend)",
        "executor": "says where the model runs (--executor)",
        "listener": "hears of every request and its end",
        "routes": "HTTP routes beside the API",
        "model-source": "finds the files of a --model NAME",
        "chat-template": "chooses a chat template for a model",
        "lifespan": "does something while the server is up, with an option of its own",
    }
)
"""What can be written, and a line about each."""

TEMPLATES = Path(__file__).parent / "templates"

_WORDS = re.compile("example-plugin|example_plugin|ExamplePlugin")


def new(name: str, kind: str, folder: Path) -> Path:
    """Write a plugin into a new folder in ``folder``, called as it is; the new folder. Raises UserError."""
    if kind not in KINDS:
        raise UserError(
            f"there is no kind of plugin called {kind!r}.{suggestion(kind, KINDS)} Kinds: {', '.join(KINDS)}."
        )
    distribution, module = _names(name)
    home = folder / distribution
    if home.exists():
        raise UserError(f"{home} is there already: choose another name, or another place with --into")
    _check_free(distribution, module)
    words = {
        "example-plugin": distribution,
        "example_plugin": module,
        "ExamplePlugin": "".join(part.capitalize() for part in module.split("_")),
    }
    sources = [TEMPLATES / "common", TEMPLATES / kind]
    files = [(source, path) for source in sources for path in sorted(source.rglob("*")) if path.is_file()]
    try:
        for source, path in files:
            if path.suffix == ".pyc":  # installers compile the templates
                continue
            target = home / _replaced(str(path.relative_to(source)), words)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_replaced(path.read_text(encoding="utf-8"), words), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{home} cannot be written: {error}") from error
    return home


def main(argv: Sequence[str]) -> int:
    """The command line after ``plugins new``."""
    kinds = "\n".join(f"  {kind:18} {line}" for kind, line in KINDS.items())
    parser = _Parser(
        prog="lightllm-serve plugins new",
        description="Write a small plugin that works, with its tests, as a beginning for your own.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="of the plugin and its distribution, such as my-parser")
    parser.add_argument("--kind", required=True, metavar="KIND", help="see below")
    parser.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="where to write it; default: here")
    given = parser.parse_args(argv)
    home = new(given.name, given.kind, given.into)
    shown = home if home.is_absolute() or ".." in home.parts else f"./{home}"
    sys.stdout.write(
        f"{shown} is a small {given.kind} plugin that works. Next:\n"
        f"  pip install -e {shown}\n"
        f"  pip install pytest httpx\n"
        f"  pytest {shown}\n"
        f"Its README.md says how to use it; what to change is in {shown}/src.\n"
    )
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; try {self.prog} --help")


def _names(name: str) -> tuple[str, str]:
    """(distribution, module). Raises UserError."""
    # https://packaging.python.org/en/latest/specifications/name-normalization/
    if not re.fullmatch(r"[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9]", name):
        raise UserError(f"{name!r} is no name for a plugin: use letters, digits and hyphens, as in my-parser")
    distribution = re.sub(r"[-_.]+", "-", name).lower()
    module = distribution.replace("-", "_")
    if not module.isidentifier() or keyword.iskeyword(module):
        raise UserError(f"{name!r} is no name for a plugin: its module could not be called {module!r} in Python")
    return distribution, module


def _check_free(distribution: str, module: str) -> None:
    """Raise UserError if something is called so."""
    if distribution == DISTRIBUTION or importlib.util.find_spec(module) is not None:
        raise UserError(f"{distribution!r} is no name for a plugin: there is a module {module!r} already")
    for plugin in installed():
        if plugin.name == distribution:
            raise UserError(f"{distribution!r} is no name for a plugin: there is {plugin.label} already")


def _replaced(text: str, words: Mapping[str, str]) -> str:
    return _WORDS.sub(lambda found: words[found[0]], text)
