"""Discovery, isolation, conflicts and report, with real distributions on sys.path."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from distributions import Site, site_in

from lightllm import ModelInfo, UserError, hookimpl, hookspecs
from lightllm.checks import RECORDS, contract_members
from lightllm.config import Config
from lightllm.interfaces import Model, ToolParser
from lightllm.plugins import PluginReport, Plugins, Recipe

GOOD = """
    @hookimpl
    def lightllm_tool_parsers():
        return [ToolParserRecord(name="good", target="good_work:Parser")]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from site_in(tmp_path, monkeypatch)


def report_of(name: str, plugins: Plugins) -> PluginReport:
    (report,) = [report for report in plugins.report() if report.name == name]
    return report


def names(kind: str, plugins: Plugins) -> list[str]:
    return [provided.record.name for provided in plugins.records(kind)]


def install_tool_parser(site: Site, distribution: str, plugin: str, record: str, version: str = "1.2") -> None:
    module = f"{plugin.replace('-', '_')}_module"
    source = f"""
        @hookimpl
        def lightllm_tool_parsers():
            return [ToolParserRecord(name={record!r}, target="{module}:Parser")]
        class Parser:
            def __init__(self, tools): pass
            def push(self, text): return ()
            def close(self): return ()
    """
    site.install(distribution, {plugin: module}, {module: source}, version=version)


def test_every_hook_that_lists_records_has_a_kind() -> None:
    listing = {
        name.removeprefix("lightllm_")
        for name, hook in vars(hookspecs).items()
        if hasattr(hook, "lightllm_spec") and "Record]" in hook.__annotations__["return"]
    }
    assert listing == set(RECORDS)


def test_the_built_in_plugins_come_through_entry_points() -> None:
    assert {"llama", "mistral", "qwen2"} <= set(names("models", Plugins.discover()))


def test_a_pip_package_provides_records(site: Site) -> None:
    install_tool_parser(site, "foo-dist", "foo", "foo-calls")
    provided = Plugins.discover().find("tool_parsers", "foo-calls")
    assert provided.plugin.name == "foo"
    assert provided.plugin.distribution == "foo-dist"
    assert provided.plugin.version == "1.2"
    assert provided.address == "foo/foo-calls"
    assert not provided.plugin.builtin


def test_built_in_records_come_first_whatever_the_order_on_sys_path(site: Site) -> None:
    source = """
        @hookimpl
        def lightllm_models():
            return [ModelRecord(name="aaa", target="a:B", architectures=("A",))]
    """
    site.install("aaa", {"aaa": "aaa_module"}, {"aaa_module": source})
    assert names("models", Plugins.discover())[:4] == ["llama", "mistral", "qwen2", "aaa"]


def test_a_target_is_imported_only_when_loaded(site: Site) -> None:
    install_tool_parser(site, "good-dist", "other", "x")
    site.install("lazy-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": "class Parser: pass"})
    plugins = Plugins.discover()
    assert "good_work" not in sys.modules
    assert plugins.load(plugins.find("tool_parsers", "good")).__name__ == "Parser"
    assert "good_work" in sys.modules


def test_a_target_that_cannot_be_imported_is_blamed_on_its_plugin(site: Site) -> None:
    site.install("lazy-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": "import no_such_thing"})
    plugins = Plugins.discover()
    with pytest.raises(UserError, match=r"good/good \(lazy-dist 1\.2\).*good_work:Parser.*no_such_thing"):
        plugins.load(plugins.find("tool_parsers", "good"))


def test_another_target_of_a_record_can_be_loaded(site: Site) -> None:
    site.install("lazy-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": "class Other: pass"})
    plugins = Plugins.discover()
    provided = plugins.find("tool_parsers", "good")
    assert plugins.load(provided, "good_work:Other").__name__ == "Other"
    with pytest.raises(UserError, match="good_work:Parser"):
        plugins.load(provided)


BROKEN = {
    "import error": ("import no_such_thing", "No module named 'no_such_thing'"),
    "syntax error": ("def (", "SyntaxError"),
    "leaves at import": ("raise SystemExit('bye')", "SystemExit: bye"),
    "panics at import": ("class Panic(BaseException): pass\nraise Panic('poisoned')", "Panic: poisoned"),
    "panics in a hook": (
        "class Panic(BaseException): pass\n@hookimpl\ndef lightllm_models(): raise Panic('poisoned')",
        "lightllm_models raised Panic: poisoned",
    ),
    "an exception without words": (
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute",
        "Mute",
    ),
    "wrong argument": ("@hookimpl\ndef lightllm_models(device): return []", "lightllm_models.*'device'"),
    "misspelt hook": ("@hookimpl\ndef lightllm_modles(): return []", "lightllm_modles. Did you mean lightllm_models"),
    "no decorator": ("def lightllm_models(): return []", "lightllm_models lacks the @hookimpl decorator"),
    "no hook at all": ("x = 1", "answers no hook"),
    "a wrapper": ("@hookimpl(wrapper=True)\ndef lightllm_models():\n    return (yield)", "hook wrapper"),
    "raises": (
        "@hookimpl\ndef lightllm_models(): raise OSError('no\\ndisk')",
        "lightllm_models raised OSError: no disk",
    ),
    "raises late": (
        "@hookimpl\ndef lightllm_models():\n    yield from ()\n    raise OSError('late')",
        "lightllm_models raised OSError: late",
    ),
    "another record": (
        "@hookimpl\ndef lightllm_models(): return [SamplerRecord(name='x', target='a:b')]",
        "SamplerRecord.*no ModelRecord",
    ),
    "no list": ("@hookimpl\ndef lightllm_models(): return 7", "answered 7, which is no list"),
    "a string for a tuple": (
        "@hookimpl\ndef lightllm_models():\n"
        "    return [ModelRecord(name='x', target='a:b', architectures='LlamaForCausalLM')]",
        "record 'x': architectures",
    ),
    "no module:attr": (
        "@hookimpl\ndef lightllm_samplers(): return [SamplerRecord(name='x', target='a.b')]",
        "module:attr",
    ),
    "no callable": (
        "@hookimpl\ndef lightllm_weight_formats():\n"
        "    return [WeightFormatRecord(name='x', target='a:b', checkpoint='a:c', matches=None)]",
        "matches is None, which cannot be called",
    ),
    "a slash in a name": (
        "@hookimpl\ndef lightllm_samplers(): return [SamplerRecord(name='a/b', target='a:b')]",
        "names hold no slash",
    ),
    "auto for a name": (
        "@hookimpl\ndef lightllm_samplers(): return [SamplerRecord(name='auto', target='a:b')]",
        "called 'auto': options mean something else",
    ),
    "none for a name": (
        "@hookimpl\ndef lightllm_samplers(): return [SamplerRecord(name='none', target='a:b')]",
        "called 'none': options mean something else",
    ),
    "one name twice": (
        "@hookimpl\ndef lightllm_samplers(): return [SamplerRecord(name='x', target='a:b')] * 2",
        "lists 'x' twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_harms_only_itself(case: str, site: Site, caplog: pytest.LogCaptureFixture) -> None:
    source, reason = BROKEN[case]
    good = "@hookimpl\ndef lightllm_samplers(): return [SamplerRecord(name='fine', target='a:b')]\n"
    site.install("bad-dist", {"bad": "bad_module"}, {"bad_module": source}, version="0.3")
    site.install("fine-dist", {"fine": "fine_module"}, {"fine_module": good})
    with caplog.at_level(logging.WARNING):
        plugins = Plugins.discover()

    report = report_of("bad", plugins)
    assert report.status == "broken"
    assert not report.provides
    assert "fine" in names("samplers", plugins)
    warnings = [record.getMessage() for record in caplog.records if "bad-dist" in record.getMessage()]
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert "bad (bad-dist 0.3)" in warnings[0]
    with pytest.raises(UserError, match=rf"no tool parser called 'x'.*bad \(bad-dist 0\.3\) is broken: .*{reason}"):
        plugins.find("tool_parsers", "x")


def test_a_plugin_that_breaks_in_one_hook_provides_nothing(site: Site) -> None:
    source = """
        @hookimpl
        def lightllm_models():
            return [ModelRecord(name="half", target="a:B", architectures=("A",))]
        @hookimpl
        def lightllm_samplers():
            raise RuntimeError
    """
    site.install("half-dist", {"half": "half_module"}, {"half_module": source})
    plugins = Plugins.discover()
    assert report_of("half", plugins).status == "broken"
    assert "half" not in names("models", plugins)


def test_strictness_makes_a_broken_plugin_fatal(site: Site) -> None:
    site.install("bad-dist", {"bad": "bad_module"}, {"bad_module": "import no_such_thing"})
    builtin = tuple(report.name for report in Plugins.discover().report() if report.builtin)
    with pytest.raises(UserError, match=r"bad \(bad-dist 1\.2\) is broken: .*no_such_thing"):
        Plugins.discover(Recipe(strict=True, blocked=builtin))


def test_a_blocked_plugin_is_not_imported(site: Site) -> None:
    install_tool_parser(site, "foo-dist", "foo", "foo-calls")
    plugins = Plugins.discover(Recipe(blocked=("foo",)))
    assert "foo_module" not in sys.modules
    assert report_of("foo", plugins).status == "blocked"
    assert "foo-calls" not in names("tool_parsers", plugins)


def test_blocking_what_is_not_there_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Plugins.discover(Recipe(blocked=("nobody",)))
    assert any("--no-plugin nobody" in record.getMessage() for record in caplog.records)


def test_two_records_of_one_name_are_both_addressable_and_the_bare_name_is_an_error(site: Site) -> None:
    install_tool_parser(site, "one-dist", "one", "calls", version="1.0")
    install_tool_parser(site, "two-dist", "two", "calls", version="2.0")
    plugins = Plugins.discover()
    assert plugins.find("tool_parsers", "one/calls").plugin.distribution == "one-dist"
    assert plugins.find("tool_parsers", "two/calls").plugin.distribution == "two-dist"
    with pytest.raises(UserError, match=r"one/calls \(one-dist 1\.0\) or two/calls \(two-dist 2\.0\)"):
        plugins.find("tool_parsers", "calls")


def test_two_plugins_of_one_name_leave_the_first_and_name_both(site: Site) -> None:
    install_tool_parser(site, "a-dist", "twin", "from-a")
    site.install("b-dist", {"twin": "twin_b"}, {"twin_b": GOOD})
    plugins = Plugins.discover()
    ours, theirs = (report for report in plugins.report() if report.name == "twin")
    assert (ours.distribution, ours.status) == ("a-dist", "ok")
    assert (theirs.distribution, theirs.status) == ("b-dist", "broken")
    assert "twin (a-dist 1.2)" in theirs.reason
    assert "good" not in names("tool_parsers", plugins)


def test_no_package_can_take_the_name_of_a_built_in_plugin(site: Site) -> None:
    site.install("a-dist", {"llama": "llama_thief"}, {"llama_thief": GOOD})
    reports = [report for report in Plugins.discover().report() if report.name == "llama"]
    assert [(report.builtin, report.status) for report in reports] == [(True, "ok"), (False, "broken")]


def test_a_plugin_made_for_another_version_is_broken(site: Site) -> None:
    site.install(
        "old", {"old": "old_module"}, {"old_module": GOOD}, requires=["LightLLM_serve>=99; python_version>'3'"]
    )
    site.install("new", {"new": "new_module"}, {"new_module": GOOD}, requires=["lightllm-serve>=0.0.1"])
    plugins = Plugins.discover()
    assert "it needs lightllm-serve >=99, and this is" in report_of("old", plugins).reason
    assert "old_module" not in sys.modules
    assert report_of("new", plugins).status == "ok"


def test_an_unknown_name_lists_what_there_is_and_suggests(site: Site) -> None:
    install_tool_parser(site, "foo-dist", "foo", "foo-calls")
    with pytest.raises(UserError, match=r"no tool parser called 'foo-call'\. Available: .*foo-calls.*mean foo-calls\?"):
        Plugins.discover().find("tool_parsers", "foo-call")


def test_a_recipe_crosses_to_another_process_and_gives_the_same_plugins(site: Site) -> None:
    install_tool_parser(site, "foo-dist", "foo", "foo-calls")
    plugins = Plugins.discover(Recipe(blocked=("foo",)))
    recipe = msgspec.msgpack.decode(msgspec.msgpack.encode(plugins.recipe), type=Recipe)
    assert Plugins.discover(recipe).report() == plugins.report()


def test_later_processes_do_not_repeat_the_warnings(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.install("bad-dist", {"bad": "bad_module"}, {"bad_module": "import no_such_thing"})
    with caplog.at_level(logging.WARNING):
        Plugins.discover(quiet=True)
    assert not caplog.records


# --- the other hooks


class Source:
    """Resolves names that begin with a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    @hookimpl
    def lightllm_resolve_model(self, name: str) -> Any:
        if name.startswith("raise"):
            raise RuntimeError("cannot")
        if name.startswith("theirs"):
            raise UserError("theirs: not for you")
        if name.startswith("text"):
            return "/a/text"
        return Path(self.prefix) if name.startswith(self.prefix) else None


def only(*extra: tuple[str, object], strict: bool = False) -> Plugins:
    """Plugins without the built-in ones."""
    blocked = tuple(report.name for report in Plugins.discover(quiet=True).report())
    return Plugins.discover(Recipe(blocked=blocked, strict=strict), extra=extra)


def test_the_first_answer_wins_and_later_plugins_are_asked_before_earlier_ones() -> None:
    plugins = only(("one", Source("a")), ("two", Source("ab")))
    assert plugins.resolve_model("abc", None, Config()) == Path("ab")
    assert plugins.resolve_model("acd", None, Config()) == Path("a")


def test_a_model_nobody_knows_is_an_error_that_says_who_was_asked() -> None:
    plugins = only(("one", Source("a")), ("two", Source("b")))
    with pytest.raises(UserError, match=r"--model zzz.*asked: two \(extra\), one \(extra\)"):
        plugins.resolve_model("zzz", None, Config())


def test_a_source_that_raises_is_broken_and_the_next_one_is_asked() -> None:
    class Sound:
        @hookimpl
        def lightllm_resolve_model(self, name: str) -> Path:
            return Path("sound")

    plugins = only(("sound", Sound()), ("bad", Source("b")))
    assert plugins.resolve_model("raise", None, Config()) == Path("sound")
    assert report_of("bad", plugins).reason == "lightllm_resolve_model raised RuntimeError: cannot"
    assert report_of("sound", plugins).status == "ok"


def test_a_source_that_answers_with_text_for_a_path_is_broken() -> None:
    plugins = only(("bad", Source("b")))
    with pytest.raises(UserError, match=r"bad \(extra\) is broken: .*'/a/text', which is no Path"):
        plugins.resolve_model("text", None, Config())


def test_what_a_source_tells_the_user_passes_through() -> None:
    plugins = only(("one", Source("a")))
    with pytest.raises(UserError, match=r"^theirs: not for you$"):
        plugins.resolve_model("theirs", None, Config())
    assert report_of("one", plugins).status == "ok"


def test_under_strictness_a_hook_that_fails_later_is_fatal_too() -> None:
    plugins = only(("bad", Source("b")), strict=True)
    with pytest.raises(UserError, match=r"bad \(extra\) is broken: .*cannot"):
        plugins.resolve_model("raise", None, Config())


def test_everyone_takes_part_in_routes_listeners_and_lifespans() -> None:
    from contextlib import asynccontextmanager

    from lightllm import Listener

    class One:
        @hookimpl
        def lightllm_routes(self, config: Config) -> list[Any]:
            return [f"route at {config.port}"]

        @hookimpl
        def lightllm_listeners(self) -> Iterator[Listener]:
            yield Listener(name="ear")

        @hookimpl
        def lightllm_lifespan(self) -> Any:
            @asynccontextmanager
            async def span() -> Any:
                yield

            return span()

        @hookimpl
        def lightllm_choose_chat_template(self, info: ModelInfo) -> str | None:
            return info.chat_template

    class Wrong:
        @hookimpl
        def lightllm_lifespan(self) -> Any:
            return 3

    plugins = only(("one", One()), ("two", One()), ("wrong", Wrong()))
    assert [routes for _, routes in plugins.routes(Config(port=5))] == [["route at 5"], ["route at 5"]]
    assert [(plugin.name, listener.name) for plugin, listener in plugins.listeners(Config())] == [
        ("one", "ear"),
        ("two", "ear"),
    ]
    assert len(plugins.lifespans(Config())) == 2
    assert report_of("wrong", plugins).status == "broken"
    info = ModelInfo(path="", architecture="", config={}, chat_template="{{ hi }}")
    assert plugins.choose_chat_template(info, Config()) == "{{ hi }}"
    assert report_of("one", plugins).provides.keys() == {"routes", "listeners", "lifespan", "choose_chat_template"}


# --- checking targets


def test_the_members_of_a_contract_are_its_methods_and_class_variables() -> None:
    assert contract_members(Model) == ["weights", "forward", "logits"]
    assert contract_members(ToolParser) == ["push", "close"]


def test_check_breaks_a_plugin_whose_target_lacks_a_method(site: Site) -> None:
    site.install("lazy-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": "class Parser:\n push = 1"})
    plugins = Plugins.discover()
    plugins.check()
    report = report_of("good", plugins)
    assert report.status == "broken"
    assert report.reason == "good_work:Parser is no ToolParser: it lacks close"
    assert report.provides == {"tool_parsers": ["good"]}


# Python 3.10 does not keep the __init__ of a Protocol
CALLS = {
    "too few arguments": ("def push(self): return ()", "push.* cannot be called with .self, text.: too many"),
    "one too many": ("def push(self, text, end): return ()", "push.* cannot be called with .self, text.: missing"),
    **(
        {"a constructor of its own": ("def __init__(self): pass", "__init__.* cannot be called with .tools.")}
        if sys.version_info >= (3, 11)
        else {}
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_check_breaks_a_plugin_whose_methods_take_other_arguments(site: Site, case: str) -> None:
    method, reason = CALLS[case]
    work = f"""
        class Parser:
            def __init__(self, tools): pass
            def push(self, text): return ()
            def close(self): return ()
            {method}
    """
    site.install("good-dist", {"good": "good_module"}, {"good_module": GOOD, "good_work": work})
    plugins = Plugins.discover()
    plugins.check()
    assert re.search(f"good_work:Parser: {reason}", report_of("good", plugins).reason)


def test_check_breaks_a_plugin_whose_target_cannot_be_imported(site: Site) -> None:
    site.install("lazy-dist", {"good": "good_module"}, {"good_module": GOOD})
    plugins = Plugins.discover()
    plugins.check()
    assert "good_work:Parser cannot be imported" in report_of("good", plugins).reason


def test_the_targets_of_the_built_in_plugins_fulfil_their_contracts() -> None:
    plugins = Plugins.discover()
    plugins.check()
    assert {r.name: r.reason for r in plugins.report() if r.builtin and r.status != "ok"} == {}
