"""Finding plugins, keeping the broken ones from harming anyone, and answering for what they provide.

The only caller of pluggy. pluggy's own entry-point loader stops at the first import that fails and drops duplicates in
silence; this one isolates, warns in one line and remembers why.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pluggy

from lightllm import hookspecs, interfaces
from lightllm.checks import (
    INTERRUPTS,
    RECORDS,
    Wrong,
    as_list,
    check_records,
    check_target,
    describe,
    import_target,
    suggestion,
)
from lightllm.discovery import GROUP, Incompatible, Plugin, Status, check_requires, extra_of, given, installed
from lightllm.interfaces import Listener, ModelInfo, UserError

if TYPE_CHECKING:
    from lightllm.config import Config, OptionGroup

log = logging.getLogger("lightllm.plugins")


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Enough to load the same plugins in another process, or on another machine.

    ``given``: files (absolute) and modules of ``--plugin``. ``loaded``: name and origin of what the first process had
    in service; the others load these and nothing else, and say so at once when they cannot.
    """

    blocked: tuple[str, ...] = ()
    strict: bool = False
    given: tuple[str, ...] = ()
    loaded: dict[str, str] | None = None


@dataclass(frozen=True)
class Provided:
    """A record and the plugin it came from."""

    record: Any
    plugin: Plugin

    @property
    def address(self) -> str:
        """``plugin/name``: names this record whatever else is installed."""
        return f"{self.plugin.name}/{self.record.name}"

    @property
    def label(self) -> str:
        return self.address if self.plugin.builtin else f"{self.address} ({self.plugin.origin})"


class PluginReport(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `lightllm-serve plugins`. ``provides``: kind -> record names, none for hooks that list no records;
    ``summaries``: kind -> record name -> its summary."""

    name: str
    distribution: str
    version: str
    builtin: bool
    status: Status
    provides: dict[str, list[str]]
    summaries: dict[str, dict[str, str]]
    reason: str
    warnings: list[str]


class Plugins:
    """The plugins of this process. Records are gathered once, at discovery; the other hooks are called when asked.

    A UserError raised by a hook that was given the configuration speaks to the user, and passes. Anything else that
    a hook raises, or answers wrongly, breaks its plugin and only it.
    """

    def __init__(self, plugins: Sequence[Plugin], recipe: Recipe, *, quiet: bool = False) -> None:
        self._recipe = recipe
        self.plugins = plugins
        self._quiet = quiet
        self._manager = _new_manager()
        for name in recipe.blocked:
            if all(plugin.name != name for plugin in plugins):
                self._warn(f"--no-plugin {name}: no plugin of that name is installed")
        taken: dict[str, Plugin] = {}
        for plugin in plugins:
            wanted = recipe.loaded is None or not plugin.target or recipe.loaded.get(plugin.name) == plugin.origin
            if plugin.name in recipe.blocked or not wanted:
                plugin.status = "blocked"
                if plugin.asked_for and plugin.name in recipe.blocked:
                    self._warn(f"plugin {plugin.label} is blocked by --no-plugin, though --plugin names it")
            elif plugin.name in taken:
                self._break(plugin, f"the name {plugin.name!r} is already taken by {taken[plugin.name].label}")
            else:
                taken[plugin.name] = plugin
                self._start(plugin)
        lacking = dict((recipe.loaded or {}).items() - self.loaded().items())
        if lacking:
            raise UserError(
                f"this process cannot load the server's plugins: {', '.join(f'{n} ({o})' for n, o in lacking.items())} "
                f"missing; restart the server, or install the same here.{self.broken_note()}"
            )

    @classmethod
    def discover(
        cls, recipe: Recipe | None = None, *, extra: Iterable[tuple[str, object]] = (), quiet: bool = False
    ) -> Plugins:
        """Load every installed plugin but the blocked ones, and what ``--plugin`` names.

        Raises UserError when one of the latter is broken, any is and strictness is on, or what is here is not what the
        recipe's first process had loaded. ``extra``: (name, module or object) pairs to load besides, for tests.
        ``quiet``: log what is broken at debug level only, for processes after the first and for listing.
        """
        recipe = recipe or Recipe()
        found = installed()
        objects = [Plugin(name, "extra", "", lambda module=module: module) for name, module in extra]  # type: ignore[misc]
        return cls([*found, *given(recipe.given, found), *objects], recipe, quiet=quiet)

    @property
    def recipe(self) -> Recipe:
        """What another process needs to load the same."""
        return msgspec.structs.replace(self._recipe, loaded=self.loaded())

    @property
    def strict(self) -> bool:
        """What is broken ends the start."""
        return self._recipe.strict

    def loaded(self) -> dict[str, str]:
        """Name and origin of the plugins in service. Objects given for tests cannot be another process's."""
        return {plugin.name: plugin.origin for plugin in self._active() if plugin.target}

    # --- records

    def records(self, kind: str) -> list[Provided]:
        """All records of a kind, a key of `RECORDS`; the built-in plugins' first."""
        RECORDS[kind]
        return [Provided(record, plugin) for plugin in self._active() for record in plugin.records.get(kind, ())]

    def find(self, kind: str, name: str) -> Provided:
        """The record called ``name`` or ``plugin/name``. Raises UserError when there is none, or several."""
        records = self.records(kind)
        found = [p for p in records if name in (p.record.name, p.address)]
        if len(found) == 1:
            return found[0]
        what = kind.replace("_", " ").removesuffix("s")
        if found:
            choices = " or ".join(f"{p.address} ({p.plugin.origin})" for p in found)
            raise UserError(f"several plugins provide a {what} called {name!r}: say {choices}")
        names = [p.record.name for p in records]
        shown = sorted({p.address if names.count(p.record.name) > 1 else p.record.name for p in records})
        there = f"Available: {', '.join(shown)}." if shown else "No plugin provides one."
        raise UserError(f"no {what} called {name!r}. {there}{suggestion(name, shown)}{self.broken_note()}")

    def load(self, provided: Provided, target: str | None = None) -> Any:
        """Import the record's target, or another "module:attr" it names. Raises UserError naming the plugin when that
        fails."""
        target = target or provided.record.target
        try:
            return import_target(target)
        except INTERRUPTS:
            raise
        except BaseException as error:
            log.debug("importing %s", target, exc_info=True)
            raise UserError(f"{provided.label}: cannot import {target}: {describe(error)}") from error

    # --- the other hooks

    def resolve_model(self, name: str, revision: str | None, config: Config) -> Path:
        """The first answer. Raises UserError when nobody knows the name, or as the plugin that knows it says."""
        asked: list[str] = []
        hook = "lightllm_resolve_model"
        answers: Iterator[Path] = self._first(hook, Path, asked, name=name, revision=revision, config=config)
        if (path := next(answers, None)) is not None:
            return path
        raise UserError(
            f"--model {name}: not a folder or .gguf file here, and no model source knows it "
            f"(asked: {', '.join(asked) or 'none'}).{self.broken_note()}"
        )

    def choose_chat_template(self, info: ModelInfo, config: Config) -> str | None:
        """A chat template that a plugin prefers to the checkpoint's own."""
        answers: Iterator[str] = self._first("lightllm_choose_chat_template", str, [], info=info, config=config)
        return next(answers, None)

    def add_options(self, group: OptionGroup) -> None:
        """Let every plugin add its command-line options, each in its own name."""
        for plugin in self._active():
            own = group.of(f"plugin {plugin.label}")
            self._ask(plugin, "lightllm_add_options", type(None), group=own)
            if plugin.status != "ok":
                own.withdraw()

    def listeners(self, config: Config) -> list[tuple[Plugin, Listener]]:
        hook = "lightllm_listeners"
        return [(p, item) for p in self._active() for item in self._ask(p, hook, Listener, listed=True, config=config)]

    def routes(self, config: Config) -> list[tuple[Plugin, list[Any]]]:
        hook = "lightllm_routes"
        answers = [(p, self._ask(p, hook, object, listed=True, config=config)) for p in self._active()]
        return [(plugin, routes) for plugin, routes in answers if routes]

    def lifespans(self, config: Config) -> list[tuple[Plugin, AbstractAsyncContextManager[None]]]:
        """Contexts to enter in this order, and to leave in the reverse."""
        hook = "lightllm_lifespan"
        return [(p, c) for p in self._active() for c in self._ask(p, hook, AbstractAsyncContextManager, config=config)]

    # --- the state of things

    def check(self) -> None:
        """Import every target and hold it against its contract; what fails is broken from then on.

        A target that only lacks what an extra of its distribution brings is not: that is warned about.
        """
        for plugin in self._active():
            for kind, records in plugin.records.items():
                for record in records:
                    if plugin.status == "ok":
                        self._check(plugin, record, RECORDS[kind][1])

    def _check(self, plugin: Plugin, record: Any, contract: type) -> None:
        targets: list[tuple[str, type | None]] = [(record.target, contract)]
        if isinstance(record, interfaces.WeightFormatRecord):
            targets.append((record.checkpoint, interfaces.Checkpoint))
        if isinstance(record, interfaces.ModelRecord):
            targets += [(target, None) for target in record.adapters.values()]
        for target, wanted in targets:
            try:
                check_target(target, wanted)
            except INTERRUPTS:
                raise
            except BaseException as error:
                cause = error.__cause__
                lacking = (isinstance(cause, ModuleNotFoundError) and cause.name) or ""
                if extra := extra_of(lacking, plugin.requires):
                    install = f"pip install '{plugin.distribution}[{extra}]'"
                    plugin.warnings.append(f"{record.name} needs {lacking}, which is not installed ({install})")
                else:
                    self._break(plugin, describe(error))
                return

    def report(self) -> list[PluginReport]:
        return [
            PluginReport(
                name=plugin.name,
                distribution=plugin.distribution,
                version=plugin.version,
                builtin=plugin.builtin,
                status=plugin.status,
                provides=self._provides(plugin),
                summaries={kind: {r.name: r.summary for r in records} for kind, records in plugin.records.items()},
                reason=plugin.reason,
                warnings=plugin.warnings,
            )
            for plugin in self.plugins
        ]

    def broken_note(self) -> str:
        """What is broken, as an end to an error message: it may be why something is missing."""
        broken = [plugin for plugin in self.plugins if plugin.status in ("broken", "incompatible")]
        return "".join(
            f" Plugin {p.label} is {p.status}: {p.reason}{'' if p.reason[-1:] in '.?' else '.'}" for p in broken
        )

    # --- loading

    def _start(self, plugin: Plugin) -> None:
        try:
            module = plugin.source()
            check_requires(module)
            plugin.hooks, plugin.warnings = _register(self._manager, plugin.name, module)
        except INTERRUPTS:
            raise
        except BaseException as error:
            log.debug("loading plugin %s", plugin.name, exc_info=True)
            self._break(plugin, describe(error), "incompatible" if isinstance(error, Incompatible) else "broken")
            return
        for warning in plugin.warnings:
            self._warn(f"plugin {plugin.label}: {warning}")
        plugin.module = module
        for kind, (record_type, _) in RECORDS.items():
            hook = f"lightllm_{kind}"
            if plugin.status == "ok" and hook in plugin.hooks:
                plugin.records[kind] = self._ask(plugin, hook, record_type, listed=True, check=check_records)

    def _break(self, plugin: Plugin, reason: str, status: Status = "broken") -> None:
        """Take a plugin out of service, with all it provides, and say so; fatal when strict, or when asked for."""
        plugin.status, plugin.reason = status, reason
        if plugin.module is not None:
            self._manager.unregister(name=plugin.name)
            plugin.module = None
        if self._recipe.strict or (plugin.asked_for and not self._quiet):
            raise UserError(f"plugin {plugin.label} is {status}: {reason}")
        self._warn(f"plugin {plugin.label} is {status} and left out: {reason}")

    def _warn(self, message: str) -> None:
        log.log(logging.DEBUG if self._quiet else logging.WARNING, "%s", message)

    def _active(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.status == "ok"]

    def _provides(self, plugin: Plugin) -> dict[str, list[str]]:
        provides = {kind: [record.name for record in records] for kind, records in plugin.records.items() if records}
        others = [hook.removeprefix("lightllm_") for hook in plugin.hooks] if plugin.module is not None else []
        return provides | {hook: [] for hook in others if hook not in RECORDS}

    # --- asking

    def _ask(
        self,
        plugin: Plugin,
        hook: str,
        answer_type: type,
        *,
        listed: bool = False,
        check: Callable[[list[Any]], None] = lambda _: None,
        **arguments: Any,
    ) -> list[Any]:
        """One plugin's answers; ``listed``: each answer is a list of them. Empty when it breaks."""
        others = [p.module for p in self.plugins if p.module is not None and p is not plugin]
        try:
            result = self._manager.subset_hook_caller(hook, others)(**arguments)
            # A firstresult hook answers once; the others give a list with an item for each implementation.
            answers = [answer for answer in (result if isinstance(result, list) else [result]) if answer is not None]
            if listed:
                # A generator runs only when it is read: here, within reach of the except below.
                answers = [item for answer in answers for item in as_list(hook, answer)]
            for answer in answers:
                if not isinstance(answer, answer_type):
                    raise Wrong(f"{hook} answered {answer!r:.80}, which is no {answer_type.__name__}")
            check(answers)
            return answers
        except INTERRUPTS:
            raise
        except BaseException as error:
            if isinstance(error, UserError) and arguments:
                raise
            log.debug("plugin %s: %s", plugin.name, hook, exc_info=True)
            reason = describe(error) if isinstance(error, Wrong) else f"{hook} raised {describe(error)}"
            self._break(plugin, reason)
            return []

    def _first(self, hook: str, answer_type: type, asked: list[str], **arguments: Any) -> Iterator[Any]:
        """Answers in pluggy's order: the last registered first, so that a plugin is asked before the built-ins."""
        implementations = getattr(self._manager.hook, hook).get_hookimpls()
        for name in dict.fromkeys(implementation.plugin_name for implementation in reversed(implementations)):
            plugin = next(p for p in self._active() if p.name == name)
            asked.append(plugin.label)
            yield from self._ask(plugin, hook, answer_type, **arguments)


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    return manager


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong


def _register(manager: pluggy.PluginManager, name: str, module: object) -> tuple[list[str], list[str]]:
    """The hooks it answers, and what of them is deprecated (pluggy's ``warn_on_impl``).

    Raises `Wrong` for what pluggy would accept in silence, or says in an unclear way; the plugin is then not there.
    """
    known = [hook for hook in vars(hookspecs) if hook.startswith("lightllm_")]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            manager.register(module, name)
        callers = manager.get_hookcallers(module) or []
        for caller in callers:
            if not caller.has_spec():
                raise Wrong(f"there is no hook called {caller.name}.{suggestion(caller.name, known)}")
            if any(i.plugin is module and (i.wrapper or i.hookwrapper) for i in caller.get_hookimpls()):
                raise Wrong(f"{caller.name} is a hook wrapper: a plugin answers for itself, not for others")
        hooks = [caller.name for caller in callers]
        for hook in known:
            function = None if hook in hooks else getattr(module, hook, None)
            if inspect.isroutine(function) and not hasattr(function, "lightllm_spec"):
                raise Wrong(f"{hook} lacks the @hookimpl decorator")
        if not callers:
            raise Wrong("it answers no hook")
    except INTERRUPTS:
        raise
    except BaseException as error:
        if manager.get_plugin(name) is module:
            manager.unregister(name=name)
        if isinstance(error, pluggy.PluginValidationError):
            raise Wrong(str(error).removeprefix(f"Plugin {name!r} for hook ")) from None
        raise
    return hooks, list(dict.fromkeys(str(warning.message) for warning in caught))
