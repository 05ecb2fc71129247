"""Finding plugins, keeping the broken ones from harming anyone, and answering for what they provide.

The only caller of entry points and of pluggy. pluggy's own entry-point loader stops at the first import that fails and
drops duplicate names in silence; this one isolates, warns in one line and remembers why.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import importlib_metadata
import msgspec
import pluggy

from lightllm import hookspecs
from lightllm.interfaces import (
    AttentionBackendRecord,
    LinearMethodRecord,
    Listener,
    LogitsProcessorRecord,
    ModelInfo,
    ModelRecord,
    ReasoningParserRecord,
    Record,
    SamplerRecord,
    ToolParserRecord,
    UserError,
    WeightFormatRecord,
)

if TYPE_CHECKING:
    from lightllm.config import Config, OptionGroup

log = logging.getLogger("lightllm.plugins")

GROUP = "lightllm"
DISTRIBUTION = "lightllm-serve"

RECORDS: Mapping[str, type[Record]] = {
    "models": ModelRecord,
    "attention_backends": AttentionBackendRecord,
    "samplers": SamplerRecord,
    "logits_processors": LogitsProcessorRecord,
    "tool_parsers": ToolParserRecord,
    "reasoning_parsers": ReasoningParserRecord,
    "weight_formats": WeightFormatRecord,
    "linear_methods": LinearMethodRecord,
}
"""Kind of record -> its type. The hook that lists a kind is called ``lightllm_<kind>``."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Enough to load the same plugins in another process, or on another machine."""

    blocked: tuple[str, ...] = ()
    strict: bool = False


@dataclass
class Plugin:
    """One entry point: who it is, and how it fares. ``reason``: why it is broken."""

    name: str
    distribution: str
    version: str
    target: str
    status: Literal["ok", "broken", "blocked"] = "ok"
    reason: str = ""
    module: Any = None

    @property
    def label(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def builtin(self) -> bool:
        return self.distribution == DISTRIBUTION


@dataclass(frozen=True)
class Provided:
    """A record and the plugin it came from."""

    record: Any
    plugin: Plugin

    @property
    def label(self) -> str:
        return f"{self.plugin.name}/{self.record.name} ({self.plugin.distribution} {self.plugin.version})"


@dataclass
class Plugins:
    """The plugins of this process. Records are gathered once, at discovery."""

    recipe: Recipe
    plugins: list[Plugin] = field(default_factory=list)
    _manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(GROUP))
    _records: dict[str, list[Provided]] = field(default_factory=lambda: {kind: [] for kind in RECORDS})

    @classmethod
    def discover(cls, recipe: Recipe | None = None) -> Plugins:
        """Load every installed plugin but the blocked ones. Raises UserError when one is broken and ``strict`` is set."""
        self = cls(recipe or Recipe())
        self._manager.add_hookspecs(hookspecs)
        points = sorted(importlib_metadata.entry_points(group=GROUP), key=_order)
        for point in points:
            self._register(point)
        unknown = set(self.recipe.blocked) - {plugin.name for plugin in self.plugins}
        for name in sorted(unknown):
            log.warning("--no-plugin %s: no plugin of that name is installed", name)
        for kind, type_ in RECORDS.items():
            for plugin, records in self._ask(f"lightllm_{kind}"):
                wrong = next((r for r in records if not isinstance(r, type_)), None)
                if wrong is not None:
                    self._break(plugin, f"lightllm_{kind} gave a {type(wrong).__name__}, not a {type_.__name__}")
                else:
                    self._records[kind] += [Provided(record, plugin) for record in records]
        # A plugin found broken by a later hook takes all it provides with it.
        for kind, provided in self._records.items():
            self._records[kind] = [p for p in provided if p.plugin.status == "ok"]
        return self

    # --- records

    def records(self, kind: str) -> list[Provided]:
        """All records of a kind: a key of `RECORDS`."""
        return self._records[kind]

    def find(self, kind: str, name: str) -> Provided:
        """The record called ``name`` or ``plugin/name``. Raises UserError when there is none, or several."""
        found = [p for p in self.records(kind) if name in (p.record.name, f"{p.plugin.name}/{p.record.name}")]
        if len(found) == 1:
            return found[0]
        what = kind.replace("_", " ").removesuffix("s")
        if found:
            choices = " or ".join(f"{p.plugin.name}/{p.record.name}" for p in found)
            owners = ", ".join(p.label for p in found)
            raise UserError(f"several plugins provide a {what} called {name!r}: {owners}. Say {choices}")
        names = sorted({p.record.name for p in self.records(kind)})
        close = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        there = f"Installed: {', '.join(names)}." if names else "No plugin provides one."
        raise UserError(f"there is no {what} called {name!r}. {there}{hint}{self.broken_note()}")

    def load(self, provided: Provided, target: str | None = None) -> Any:
        """Import a record's target. Raises UserError naming the plugin when that fails."""
        target = target or provided.record.target
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{provided.label}: cannot import {target}: {_describe(error)}") from error

    def broken_note(self) -> str:
        """What is broken, as an end to an error message: it may be why something is missing."""
        broken = [f" Plugin {p.label} is broken: {p.reason}." for p in self.plugins if p.status == "broken"]
        return "".join(broken)

    # --- the other hooks

    def resolve_model(self, name: str, revision: str | None, config: Config) -> Path:
        """The first answer. Raises UserError when nobody knows the name, or as the plugin that knows it says."""
        asked = []
        for plugin, caller in self._callers("lightllm_resolve_model"):
            asked.append(plugin.name)
            with self._guard(plugin, "lightllm_resolve_model"):
                answer = caller(name=name, revision=revision, config=config)
                if answer is not None:
                    return Path(answer)
        raise UserError(
            f"--model {name}: not a folder or .gguf file here, and no model source knows it "
            f"(asked: {', '.join(asked) or 'none'}).{self.broken_note()}"
        )

    def choose_chat_template(self, info: ModelInfo, config: Config) -> str | None:
        for plugin, caller in self._callers("lightllm_choose_chat_template"):
            with self._guard(plugin, "lightllm_choose_chat_template"):
                answer = caller(info=info, config=config)
                if answer is not None:
                    return str(answer)
        return None

    def add_options(self, group: OptionGroup) -> None:
        for plugin, caller in self._callers("lightllm_add_options"):
            with self._guard(plugin, "lightllm_add_options"):
                caller(group=group.of(plugin.label))

    def listeners(self, config: Config) -> list[tuple[Plugin, Listener]]:
        answers = self._ask("lightllm_listeners", config=config)
        return [(plugin, listener) for plugin, listeners in answers for listener in listeners]

    def routes(self, config: Config) -> list[Any]:
        return [route for _, routes in self._ask("lightllm_routes", config=config) for route in routes]

    def lifespans(self, config: Config) -> list[AbstractAsyncContextManager[None]]:
        spans = []
        for plugin, caller in self._callers("lightllm_lifespan"):
            with self._guard(plugin, "lightllm_lifespan"):
                spans.append(caller(config=config))
        return spans

    def report(self) -> list[dict[str, Any]]:
        """Every plugin as plain data: name, distribution, version, builtin, status, provides, reason."""
        rows = []
        for plugin in self.plugins:
            provides = {
                kind: [p.record.name for p in provided if p.plugin is plugin]
                for kind, provided in self._records.items()
                if any(p.plugin is plugin for p in provided)
            }
            for caller in self._manager.get_hookcallers(plugin.module) or [] if plugin.status == "ok" else []:
                kind = caller.name.removeprefix("lightllm_")
                if kind not in RECORDS:
                    provides[kind] = []
            rows.append(
                {
                    "name": plugin.name,
                    "distribution": plugin.distribution,
                    "version": plugin.version,
                    "builtin": plugin.builtin,
                    "status": plugin.status,
                    "provides": provides,
                    "reason": plugin.reason,
                }
            )
        return rows

    # --- loading

    def _register(self, point: importlib_metadata.EntryPoint) -> None:
        dist = point.dist
        plugin = Plugin(point.name, dist.name if dist else "?", dist.version if dist else "?", point.value)
        twin = next((p for p in self.plugins if p.name == plugin.name), None)
        if twin and (twin.distribution, twin.target) == (plugin.distribution, plugin.target):
            return  # one distribution seen twice on sys.path
        self.plugins.append(plugin)
        if plugin.name in self.recipe.blocked:
            plugin.status = "blocked"
            return
        if twin:
            self._break(plugin, f"its name is taken by {twin.distribution} {twin.version}")
            return
        try:
            plugin.module = point.load()
        except Exception as error:
            self._break(plugin, _describe(error))
            return
        if problem := _misspelt(plugin.module):
            self._break(plugin, problem)
            return
        try:
            self._manager.register(plugin.module, name=plugin.name)
        except Exception as error:
            self._break(plugin, _describe(error))

    def _break(self, plugin: Plugin, reason: str) -> None:
        """Take a plugin out of service and say so; fatal when strict."""
        plugin.status, plugin.reason = "broken", reason
        if plugin.module is not None and self._manager.is_registered(plugin.module):
            self._manager.unregister(plugin.module)
        message = f"plugin {plugin.label} is broken: {reason}"
        if self.recipe.strict:
            raise UserError(message)
        log.warning(message)

    # --- asking

    def _callers(self, hook: str) -> Iterator[tuple[Plugin, Callable[..., Any]]]:
        """Each plugin's own implementation of a hook, so that one that raises stops nobody else."""
        for plugin in list(self.plugins):
            if plugin.status != "ok":
                continue
            others = [p.module for p in self.plugins if p.status == "ok" and p is not plugin]
            caller = self._manager.subset_hook_caller(hook, others)
            if caller.get_hookimpls():
                yield plugin, _single(caller)

    def _ask(self, hook: str, **arguments: Any) -> list[tuple[Plugin, list[Any]]]:
        """Every plugin's list. Listed here, inside the guard: a generator runs only when it is read."""
        answers = []
        for plugin, caller in self._callers(hook):
            with self._guard(plugin, hook):
                answers.append((plugin, list(caller(**arguments))))
        return answers

    def _guard(self, plugin: Plugin, hook: str) -> _Guard:
        return _Guard(self, plugin, hook)


class _Guard:
    """Turns an exception in a plugin's hook into a broken plugin; a UserError is the plugin's own word and passes."""

    def __init__(self, plugins: Plugins, plugin: Plugin, hook: str) -> None:
        self.plugins, self.plugin, self.hook = plugins, plugin, hook

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return False
        self.plugins._break(self.plugin, f"{self.hook} raised {_describe(error)}")
        return True


def _single(caller: pluggy.HookCaller) -> Callable[..., Any]:
    """Call a hook that one plugin implements: a list of one answer, or the answer itself, becomes the answer."""

    def call(**arguments: Any) -> Any:
        answer = caller(**arguments)
        if caller.spec is not None and caller.spec.opts.get("firstresult"):
            return answer
        return answer[0] if answer else None

    return call


def _order(point: importlib_metadata.EntryPoint) -> tuple[bool, str, str]:
    """Built-ins first, then by distribution and name: the same order everywhere."""
    distribution = point.dist.name if point.dist else ""
    return (distribution != DISTRIBUTION, distribution, point.name)


def _misspelt(module: Any) -> str:
    """What is wrong with a plugin's hook implementations: a name or an argument the core does not know."""
    for name, member in inspect.getmembers(module):
        if not (callable(member) and hasattr(member, "lightllm_impl")):
            continue
        spec = getattr(hookspecs, name, None)
        if spec is None or not hasattr(spec, "lightllm_spec"):
            known = [n for n in dir(hookspecs) if hasattr(getattr(hookspecs, n), "lightllm_spec")]
            close = difflib.get_close_matches(name, known, 1)
            return f"there is no hook {name}" + (f", did you mean {close[0]}?" if close else "")
        takes = set(inspect.signature(spec).parameters)
        for argument in inspect.signature(member).parameters:
            if argument not in takes and argument != "self":
                return f"{name} has no argument {argument!r} (it has: {', '.join(sorted(takes)) or 'none'})"
    return ""


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
