"""Where plugins come from: what they were made for, what they lack, ``--plugin``, and the same in every process."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import msgspec
import pluggy
import pytest
from distributions import Site, site_in
from servers import run_command

from lightllm import HOOKS_VERSION, UserError, hookspecs
from lightllm import plugins as plugins_module
from lightllm.plugins import PluginReport, Plugins, Recipe

GOOD = """
    @hookimpl
    def lightllm_tool_parsers():
        return [ToolParserRecord(name="good", target="good_work:Parser")]
"""
WORK = """
    class Parser:
        def __init__(self, tools): pass
        def push(self, text): return ()
        def close(self): return ()
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield from site_in(tmp_path, monkeypatch)


def report_of(name: str, plugins: Plugins) -> PluginReport:
    (report,) = [report for report in plugins.report() if report.name == name]
    return report


# --- versions


def with_hooks(site: Site, requires: str, monkeypatch: pytest.MonkeyPatch, version: str = HOOKS_VERSION) -> Plugins:
    monkeypatch.setattr("lightllm.discovery.VERSION", version)
    site.install("good-dist", {"good": "good_module"}, {"good_module": f"{GOOD}\n    lightllm_requires = {requires}\n"})
    return Plugins.discover()


def test_a_plugin_for_other_hooks_says_so_in_one_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of("good", with_hooks(site, "'<0.2'", monkeypatch, "0.2.1"))
    assert report.status == "incompatible"
    assert report.reason == "it needs hooks <0.2, and this is 0.2.1"
    assert report.provides == {}


def test_a_plugin_for_these_hooks_is_served(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_of("good", with_hooks(site, "'>=0.1,<0.2'", monkeypatch, "0.1.7")).status == "ok"


@pytest.mark.parametrize("requires", ["'soon'", "3", "None"])
def test_a_version_that_is_none_is_said(site: Site, monkeypatch: pytest.MonkeyPatch, requires: str) -> None:
    report = report_of("good", with_hooks(site, requires, monkeypatch))
    assert ("no version specifier" in report.reason) == (requires != "None")


def test_an_incompatible_plugin_is_quoted_where_it_is_missed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = with_hooks(site, "'>9'", monkeypatch)
    with pytest.raises(UserError, match=r"Plugin good \(good-dist 1\.2\) is incompatible: it needs hooks >9"):
        plugins.find("tool_parsers", "good")


def test_what_is_not_installed_though_needed_is_named(site: Site) -> None:
    source = "import a_thing_that_is_not_there\n" + dedent(GOOD)
    site.install("good-dist", {"good": "good_module"}, {"good_module": source}, requires=["a-thing>=2", "pluggy"])
    reason = report_of("good", Plugins.discover()).reason
    assert "No module named 'a_thing_that_is_not_there'" in reason
    assert "(not installed, though it needs them: a-thing>=2)" in reason


def test_what_only_an_extra_brings_is_no_fault(site: Site) -> None:
    work = "import fast_thing\n" + dedent(WORK)
    requires = ["lightllm-serve", "fast-thing>=2; platform_system == 'Linux' and extra == 'fast'"]
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": work}, requires=requires)
    plugins = Plugins.discover()
    plugins.check()
    report = report_of("good", plugins)
    assert report.status == "ok"
    assert report.warnings == ["good needs fast_thing, which is not installed (pip install 'good-dist[fast]')"]


ODD = ["foo (bar>=1", "lightllm-x (", "baz; python_version ~ '3'", "lightllm-serve>=0.0.1"]


def test_a_requirement_that_cannot_be_read_is_passed_over(site: Site) -> None:
    requires = [*ODD, "a-thing>=2", "fast-thing>=2; extra == 'fast'"]
    work = "import fast_thing\n" + dedent(WORK)
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": work}, requires=requires)
    site.install("bad-dist", {"bad": "bad_module"}, {"bad_module": "import a_thing"}, requires=requires)
    plugins = Plugins.discover()
    plugins.check()
    assert "needs fast_thing, which is not installed" in report_of("good", plugins).warnings[0]
    assert "(not installed, though it needs them: a-thing>=2)" in report_of("bad", plugins).reason


# --- damaged distributions

DAMAGED = {
    "no METADATA": (None, "good_dist 1.2"),
    "no name": ("Metadata-Version: 2.1\nVersion: 1.3\n\n", "good_dist 1.3"),
    "no version": ("Metadata-Version: 2.1\nName: good-dist\n\n", "good-dist 1.2"),
    "nothing": ("", "good_dist 1.2"),
    "no text": (b"\xff\xfe\x00", "good_dist 1.2"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_distributions_plugin_goes_by_what_is_known_of_it(site: Site, tmp_path: Path, case: str) -> None:
    metadata, origin = DAMAGED[case]
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK})
    site.install("bad-dist", {"bad": "bad_module"}, {"bad_module": "import no_such_thing"})
    for folder in ("good_dist", "bad_dist"):
        path = tmp_path / f"{folder}-1.2.dist-info" / "METADATA"
        path.unlink()
        if metadata is not None:
            path.write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    plugins = Plugins.discover()
    report = report_of("good", plugins)
    assert (report.status, f"{report.distribution} {report.version}") == ("ok", origin)
    assert "No module named 'no_such_thing'" in report_of("bad", plugins).reason
    assert report_of("good", Plugins.discover(plugins.recipe)).status == "ok"


# --- deprecation


def test_a_deprecated_hook_works_and_is_warned_about(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    specs = types.ModuleType("specs")
    vars(specs).update({k: v for k, v in vars(hookspecs).items() if k.startswith("lightllm_")})
    old = DeprecationWarning("lightllm_tool_parsers goes in 0.3: answer lightllm_other instead")

    def lightllm_tool_parsers() -> None: ...

    specs.lightllm_tool_parsers = pluggy.HookspecMarker("lightllm")(warn_on_impl=old)(lightllm_tool_parsers)  # type: ignore[attr-defined]
    monkeypatch.setattr(plugins_module, "hookspecs", specs)
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK})
    report = report_of("good", Plugins.discover())
    assert report.status == "ok" and report.provides == {"tool_parsers": ["good"]}
    assert report.warnings == [str(old)]
    assert f"plugin good (good-dist 1.2): {old}" in caplog.text


# --- --plugin


def write_file(folder: Path, name: str = "try_out.py", source: str = "") -> Path:
    path = folder / name
    work = GOOD.replace("good_work", Path(name).stem)
    path.write_text("from lightllm import *\n" + dedent(source or work + WORK))
    return path


def test_a_file_is_a_plugin(site: Site, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = write_file(tmp_path / "elsewhere")
    plugins = Plugins.discover(Recipe(given=(str(path),)))
    report = report_of("try-out", plugins)
    assert (report.status, report.distribution) == ("ok", f"--plugin {path}")
    assert plugins.load(plugins.find("tool_parsers", "try-out/good")).__name__ == "Parser"
    plugins.check()
    assert report_of("try-out", plugins).status == "ok"


def test_a_module_is_a_plugin_and_an_installed_one_is_there_once(site: Site) -> None:
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK, "loose": GOOD})
    plugins = Plugins.discover(Recipe(given=("loose", "good_module", "loose")))
    names = [report.name for report in plugins.report()]
    assert (names.count("good"), names.count("loose"), names.count("good-module")) == (1, 1, 0)


def test_an_object_of_a_module_is_a_plugin(site: Site) -> None:
    source = GOOD.replace("lightllm_tool_parsers()", "lightllm_tool_parsers(self)").replace("\n", "\n    ")
    site.install("x", {}, {"holder": f"class Plugin:{source}\nit = Plugin()\n"})
    plugins = Plugins.discover(Recipe(given=("holder:it",)))
    assert report_of("holder", plugins).provides == {"tool_parsers": ["good"]}


def test_a_module_in_the_working_folder_is_found(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    write_file(tmp_path / "here", "found_here.py")
    monkeypatch.chdir(tmp_path / "here")
    assert report_of("found-here", Plugins.discover(Recipe(given=("found_here",)))).status == "ok"


def test_the_file_of_an_installed_plugin_must_work_like_any_that_is_asked_for(site: Site, tmp_path: Path) -> None:
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK})
    path = tmp_path / "good_module.py"
    plugins = Plugins.discover(Recipe(given=(str(path),)))
    assert [report.name for report in plugins.report() if "good" in report.name] == ["good"]
    path.write_text("import no_such_thing")
    del sys.modules["good_module"]
    assert report_of("good", Plugins.discover()).status == "broken"
    for given in (str(path), "good_module"):
        with pytest.raises(UserError, match=r"good \(good-dist 1\.2\) is broken: .*no_such_thing"):
            Plugins.discover(Recipe(given=(given,)))


@pytest.mark.parametrize("blocked", [(), ("good",)])
def test_a_file_with_the_name_of_an_installed_plugins_module_must_be_renamed(
    site: Site, tmp_path: Path, blocked: tuple[str, ...]
) -> None:
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK})
    (tmp_path / "elsewhere").mkdir()
    path = write_file(tmp_path / "elsewhere", "good_module.py")
    with pytest.raises(UserError, match=r"another module is called good_module, too .*: rename the file"):
        Plugins.discover(Recipe(given=(str(path),), blocked=blocked))


def test_what_is_asked_for_and_blocked_is_said(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_file(tmp_path)
    plugins = Plugins.discover(Recipe(given=(str(path),), blocked=("try-out",)))
    assert report_of("try-out", plugins).status == "blocked"
    assert "is blocked by --no-plugin, though --plugin names it" in caplog.text


BAD = {
    "absent": ("nowhere.py", None, "there is no such file"),
    "not importable": ("bad_file.py", "def (", "SyntaxError"),
    "called as another module": ("json.py", "x = 1", "another module is called json, too"),
    "no plugin": ("bad_plugin.py", "x = 1", "it answers no hook"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_was_asked_for_and_is_broken_ends_the_start(site: Site, tmp_path: Path, case: str) -> None:
    name, source, reason = BAD[case]
    path = tmp_path / "elsewhere" / name
    path.parent.mkdir()
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError, match=reason):
        Plugins.discover(Recipe(given=(str(path),)))
    code, output = run_command("plugins", "--check", "--plugin", str(path))
    assert code == 1
    assert "Traceback" not in output


# --- the same in every process


def test_the_recipe_is_plain_data_that_loads_the_same(site: Site, tmp_path: Path) -> None:
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK})
    first = Plugins.discover(Recipe(blocked=("mistral",), given=(str(write_file(tmp_path)),)))
    sent = msgspec.json.decode(msgspec.json.encode(first.recipe), type=Recipe)
    second = Plugins.discover(sent)
    assert second.loaded() == first.loaded()
    assert {"good", "try-out", "llama"} <= second.loaded().keys()
    assert "mistral" not in second.loaded()


def test_a_process_with_another_version_says_so_at_once(site: Site, tmp_path: Path) -> None:
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK})
    recipe = Plugins.discover().recipe
    info = next(tmp_path.glob("good_dist*.dist-info/METADATA"))
    info.write_text(info.read_text().replace("Version: 1.2", "Version: 1.3"))
    with pytest.raises(UserError, match=r"cannot load the server's plugins: good \(good-dist 1\.2\) missing"):
        Plugins.discover(recipe)


def test_what_was_installed_since_is_left_out(site: Site) -> None:
    recipe = Plugins.discover().recipe
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": WORK})
    assert report_of("good", Plugins.discover(recipe)).status == "blocked"
