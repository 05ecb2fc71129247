"""Where plugins come from: entry points of installed distributions, and ``--plugin``. The only reader of entry points.

Nothing is imported here; a `Plugin` knows how to (`Plugin.source`), and what it was made for is checked before.
"""

from __future__ import annotations

import contextlib
import email
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import importlib_metadata

from lightllm.checks import Wrong
from lightllm.hookspecs import VERSION
from lightllm.interfaces import Record

if TYPE_CHECKING:
    from packaging.requirements import Requirement

GROUP = "lightllm"
DISTRIBUTION = "lightllm-serve"

Status = Literal["ok", "broken", "incompatible", "blocked"]


class Incompatible(Wrong):
    """A plugin made for another version than this."""


@dataclass(eq=False)
class Plugin:
    """One plugin: who it is, and how it fares. ``reason``: why it is broken or incompatible.

    ``asked_for``: given by ``--plugin``. ``target``: what its entry point names. ``requires``: what its distribution
    does. ``warnings``: what somebody should change.
    """

    name: str
    distribution: str
    version: str
    source: Callable[[], object]
    target: str = ""
    requires: Sequence[str] = ()
    asked_for: bool = False
    status: Status = "ok"
    reason: str = ""
    module: object = None
    hooks: list[str] = field(default_factory=list)
    records: dict[str, list[Record]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def label(self) -> str:
        return f"{self.name} ({self.origin})"

    @property
    def builtin(self) -> bool:
        return self.distribution == DISTRIBUTION


def installed() -> list[Plugin]:
    """Built-ins first, then by distribution and name: the same order everywhere, however sys.path lies."""
    found: dict[tuple[str, str, str], Plugin] = {}
    own = importlib_metadata.version(DISTRIBUTION)
    for point in importlib_metadata.entry_points(group=GROUP):
        name, version, requires = _described(point.dist)
        source: Callable[[], object]
        source = lambda point=point, requires=requires: _import_point(point, requires, own)  # type: ignore[misc] # noqa: E731
        # One distribution may be seen twice on sys.path.
        found.setdefault(
            (name, point.name, point.value),
            Plugin(point.name, name, version, source, target=point.value, requires=requires),
        )
    return sorted(found.values(), key=lambda p: (not p.builtin, p.distribution.lower(), p.name))


def given(wanted: Sequence[str], known: Sequence[Plugin]) -> list[Plugin]:
    """What ``--plugin`` names: a file, a package's folder, a module, or module:object, as entry points do. One that is
    installed is among the ``known`` already, and marked."""
    found = []
    for what in dict.fromkeys(wanted):
        path = Path(what)
        is_path = path.suffix == ".py" or len(path.parts) > 1
        module, _, attribute = (path.stem, "", "") if is_path else what.partition(":")
        same = [plugin for plugin in known if plugin.target.partition(":")[0] == module]
        if same and (not is_path or _is_home(path, importlib.util.find_spec(module))):
            for plugin in same:
                plugin.asked_for = True
        else:
            source: Callable[[], object]
            if is_path:
                source = lambda path=path: _import_path(path)  # type: ignore[misc] # noqa: E731
            else:
                source = lambda module=module, attribute=attribute: _import(module, attribute)  # type: ignore[misc] # noqa: E731
            name = module.rpartition(".")[2].replace("_", "-")
            found.append(Plugin(name, f"--plugin {what}", "", source, target=module, asked_for=True))
    return found


def check_requires(module: object) -> None:
    """A plugin says by ``lightllm_requires = "<0.2"`` which versions of the hooks it was written for."""
    requires = getattr(module, "lightllm_requires", None)
    if requires is None:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        fits = SpecifierSet(requires).contains(VERSION, prereleases=True)
    except (InvalidSpecifier, TypeError, AttributeError):
        raise Wrong(f"lightllm_requires is {requires!r:.80}, no version specifier such as '>=0.1,<0.2'") from None
    if not fits:
        raise Incompatible(f"it needs hooks {requires}, and this is {VERSION}")


def _described(dist: importlib_metadata.Distribution | None) -> tuple[str, str, list[str]]:
    """Name, version and requirements; what a damaged METADATA does not say, its folder's name does.

    The library parses the whole METADATA, README and all, for each of them, and raises for a damaged one.
    """
    if dist is None:
        return "?", "", []
    try:
        text = dist.read_text("METADATA") or dist.read_text("PKG-INFO")  # an egg's
    except (OSError, UnicodeDecodeError):
        text = None
    fields = email.message_from_string((text or "").partition("\n\n")[0])
    name, _, version = Path(str(getattr(dist, "_path", "?"))).stem.partition("-")
    return fields["Name"] or name, fields["Version"] or version, fields.get_all("Requires-Dist", [])


def _import_point(point: importlib_metadata.EntryPoint, requires: Sequence[str], own: str) -> object:
    if ours := [text for text in requires if text.lower().startswith("lightllm")]:
        _check_requirements(ours, own)
    try:
        return point.load()
    except ImportError as error:
        if missing := _missing(requires):
            text = f"{type(error).__name__}: {error}"
            raise Wrong(f"{text} (not installed, though it needs them: {', '.join(missing)})") from error
        raise


def _check_requirements(requires: Sequence[str], own: str) -> None:
    """pip lets people install a plugin beside a version it was not made for; it then fails far from the cause."""
    from packaging.utils import canonicalize_name

    for requirement in _applying(requires):
        ours = canonicalize_name(requirement.name) == DISTRIBUTION
        if ours and not requirement.specifier.contains(own, prereleases=True):
            raise Incompatible(f"it needs {DISTRIBUTION} {requirement.specifier}, and this is {own}")


def _missing(requires: Sequence[str]) -> list[str]:
    """Requirements that nothing installed meets by name."""
    missing = []
    for requirement in _applying(requires):
        try:
            importlib_metadata.version(requirement.name)
        except importlib_metadata.PackageNotFoundError:
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing


def _applying(requires: Sequence[str]) -> list[Requirement]:
    """Those that count here, without extras. A line that cannot be read is none."""
    from packaging.requirements import Requirement

    applying = []
    for text in requires:
        with contextlib.suppress(ValueError):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                applying.append(requirement)
    return applying


def extra_of(module: str, requires: Sequence[str]) -> str | None:
    """The extra that brings the distribution of this module's name: what an installation may do without."""
    for text in requires:
        name = re.split(r"[^\w.-]", text, maxsplit=1)[0]
        if (extra := _EXTRA.search(text)) and name.replace("-", "_").lower() == module.lower():
            return extra[1]
    return None


_EXTRA = re.compile(r"extra == ['\"]([\w.-]+)['\"]")


def _import_path(path: Path) -> Any:
    if not path.exists():
        raise Wrong("there is no such file")
    path = path.resolve()
    # At the end, so that it hides nothing: as with any script, modules beside it can be imported.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(path.stem)
    if spec is None:
        raise Wrong("it is no module that can be imported")
    if not _is_home(path, spec):
        raise Wrong(f"another module is called {path.stem}, too ({spec.origin}): rename the file")
    return importlib.import_module(path.stem)


def _is_home(path: Path, spec: ModuleSpec | None) -> bool:
    """Whether this file or package's folder is the module's own."""
    path = path.resolve()
    home = path if path.is_file() else path / "__init__.py"
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == home


def _import(module: str, attribute: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if error.name != module.partition(".")[0] or here in sys.path:
            raise
        sys.path.append(here)
        found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
