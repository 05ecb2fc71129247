"""The command line: `lightllm-serve [options]` serves, `lightllm-serve plugins` lists. Imports only what it runs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence

import msgspec

from lightllm.checks import Wrong
from lightllm.config import UsageError, read_config, read_plugin_choice
from lightllm.interfaces import UserError
from lightllm.plugins import PluginReport, Plugins, Recipe


def main(argv: Sequence[str] | None = None, *, lightllm_names: bool = False) -> int:
    """Run and return the exit code: 0, 1 for what went wrong, 2 for wrong usage, 130 when interrupted.

    ``lightllm_names``: see `read_config`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["engine"]:
            from lightllm.assemble import run_engine

            return run_engine(arguments[1:])
        if arguments[:1] == ["check-grammars"]:
            from lightllm.assemble import check_grammars

            return check_grammars()
        if arguments[:2] == ["plugins", "new"]:
            from lightllm import scaffold

            return scaffold.main(arguments[2:])
        if arguments[:1] == ["plugins"]:
            return _list_plugins(arguments[1:])
        return _serve(arguments, lightllm_names)
    except (UserError, Wrong) as error:
        logging.getLogger("lightllm").debug("%s", error, exc_info=True)
        sys.stderr.write(f"lightllm-serve: error: {' '.join(str(error).split())}\n")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


def _serve(argv: Sequence[str], lightllm_names: bool) -> int:
    plugins = Plugins.discover(Recipe(**read_plugin_choice(argv, os.environ)._asdict()))
    config = read_config(argv, os.environ, plugins, lightllm_names=lightllm_names)

    from lightllm.assemble import serve

    return serve(config, plugins)


def _list_plugins(argv: list[str]) -> int:
    """`lightllm-serve plugins [--json] [--check]`; takes the serving options too, so that it shows what they give."""
    as_json, check = "--json" in argv, "--check" in argv
    verbose = "--verbose" in argv
    options = [token for token in argv if token not in ("--json", "--check", "--verbose")]
    if "--help" in options or "-h" in options:
        sys.stdout.write(
            "usage: lightllm-serve plugins [--json] [--verbose] [--check] [--plugin FILE|MODULE] [--no-plugin NAME]\n"
            "       lightllm-serve plugins new NAME --kind KIND\n\n"
            "List the installed plugins and what they provide, or write a new one.\n\n"
            "  --json     the same as JSON, and more\n"
            "  --verbose  a line for everything they provide\n"
            "  --check    import everything they provide, and exit with 1 if anything is broken\n"
            "  --plugin   one more, that is not installed: a .py file or a module\n"
            "  new        write a small plugin that works; `lightllm-serve plugins new --help` lists the kinds\n"
        )
        return 0
    choice = read_plugin_choice(options, os.environ)
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # what a plugin prints is no JSON
        plugins = Plugins.discover(Recipe(blocked=choice.blocked, given=choice.given), quiet=True)
        read_config(options, os.environ, plugins)
        if check:
            plugins.check()
    reports = plugins.report()
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(reports), indent=2) + b"\n")
        sys.stdout.flush()
    else:
        _show(reports, verbose)
    broken = any(report.status in ("broken", "incompatible") for report in reports)
    return 1 if broken and (check or choice.strict) else 0


def _show(reports: Sequence[PluginReport], verbose: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("plugin", "distribution", "status", "provides"):
        table.add_column(heading, no_wrap=heading in ("plugin", "status"))
    styles = {"ok": "green", "broken": "bold red", "incompatible": "bold red", "blocked": "yellow"}
    for report in reports:
        provides = [
            f"{kind.replace('_', ' ')}: {', '.join(names)}" if names else kind.replace("_", " ")
            for kind, names in report.provides.items()
            if not (verbose and names)
        ]
        details = [
            f"{kind.replace('_', ' ').removesuffix('s')} {name}: {summary}"
            for kind, summaries in report.summaries.items()
            for name, summary in summaries.items()
            if verbose
        ]
        table.add_row(
            Text(report.name),
            Text(f"{'built in' if report.builtin else report.distribution} {report.version}".strip()),
            Text(report.status, styles[report.status]),
            Text(report.reason or "\n".join(filter(None, [*details, "; ".join(provides), *report.warnings]))),
        )
    Console().print(table)
