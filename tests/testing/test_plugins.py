"""The kit as a package, and its check of a plugin as a whole."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from distributions import site_in

import lightllm.testing
from lightllm import LinearMethodRecord, SamplerRecord, hookimpl
from lightllm.testing import check_plugin


def test_what_a_parsers_author_needs_imports_no_torch() -> None:
    code = """
import sys
from lightllm.testing import check_plugin, check_reasoning_parser, check_tool_parser, serve
import lightllm.testing.call_grammars, lightllm.testing.fixtures, lightllm.testing.scripted
assert not {"torch", "transformers"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_every_name_of_the_kit_is_there() -> None:
    for name in lightllm.testing.__all__:
        assert getattr(lightllm.testing, name).__name__ == name
    assert [name for name in dir(lightllm.testing) if name.startswith("check_")] == sorted(
        name for name in lightllm.testing.__all__ if name.startswith("check_")
    )
    with pytest.raises(AttributeError, match="has no attribute 'check_nothing'"):
        lightllm.testing.check_nothing  # noqa: B018


def test_nothing_else_of_lightllm_imports_the_kit() -> None:
    core = Path(lightllm.testing.__file__).parents[1]
    kit, templates = core / "testing", core / "templates"
    imports = re.compile(r"(import|from) lightllm\.testing|from lightllm import .*testing")
    importing = [path for path in core.rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))]
    assert [path for path in importing if kit not in path.parents and templates not in path.parents] == []


@pytest.mark.parametrize("plugin", ["lightllm.testing.scripted", "lightllm_builtin.sampling"])
def test_a_plugin_in_order_passes(plugin: str) -> None:
    check_plugin(plugin)
    check_plugin(importlib.import_module(plugin))


def test_a_file_is_a_plugin(tmp_path: Path) -> None:
    path = tmp_path / "a_plugin_in_a_file.py"
    path.write_text(
        "from lightllm import SamplerRecord, hookimpl\n"
        "class Sampler:\n"
        "    overlaps = False\n"
        "    def sample(self, logits, rows, history): ...\n"
        "@hookimpl\n"
        "def lightllm_samplers():\n"
        "    return [SamplerRecord(name='mine', target=f'{__name__}:Sampler')]\n"
    )
    check_plugin(path)
    check_plugin(str(path))
    path.write_text(path.read_text().replace("def sample(", "def simple("))
    sys.modules.pop("a_plugin_in_a_file")
    assert "a_plugin_in_a_file:Sampler is no Sampler: it lacks sample" in reason(path)


def test_what_an_extra_brings_may_be_missing_as_it_may_for_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = """
        @hookimpl
        def lightllm_samplers():
            return [SamplerRecord(name="fast", target="fast_work:Sampler")]
    """
    modules = {"fast_plugin": records, "fast_work": "import fast_thing"}
    with contextlib.contextmanager(site_in)(tmp_path, monkeypatch) as site:
        requires = ["fast-thing; extra == 'fast'"]
        site.install("fast-dist", {"fast": "fast_plugin"}, modules, requires=requires)
        for plugin in ("fast_plugin", importlib.import_module("fast_plugin"), tmp_path / "fast_plugin.py"):
            check_plugin(plugin)
        metadata = tmp_path / "fast_dist-1.2.dist-info" / "METADATA"
        metadata.write_text(metadata.read_text().replace("fast-thing;", "slow-thing;"))
        assert "No module named 'fast_thing'" in reason("fast_plugin")


def reason(plugin: Any) -> str:
    with pytest.raises(AssertionError, match=r"^this rule is broken: a plugin's hooks, records and targets") as broken:
        check_plugin(plugin)
    return str(broken.value)


def module(**hooks: Any) -> ModuleType:
    found = ModuleType("a_plugin")
    vars(found).update(hooks)
    return found


@hookimpl
def wrong_kind() -> list[Any]:
    return [LinearMethodRecord(name="a", target="a:b")]


@hookimpl
def no_target() -> list[Any]:
    return [SamplerRecord(name="a", target="nothing_of_this_name:b")]


@hookimpl
def raising() -> list[Any]:
    raise KeyError("b")


@pytest.mark.parametrize(
    ("hooks", "why"),
    [
        ({}, "it answers no hook"),
        ({"lightllm_sampler": raising}, "there is no hook called lightllm_sampler. Did you mean lightllm_samplers?"),
        ({"lightllm_samplers": lambda: []}, "lightllm_samplers lacks the @hookimpl decorator"),
        ({"lightllm_samplers": wrong_kind}, "which is no SamplerRecord"),
        ({"lightllm_samplers": raising}, "lightllm_samplers raised KeyError: 'b'"),
        ({"lightllm_samplers": no_target}, "nothing_of_this_name:b cannot be imported"),
    ],
)
def test_what_is_wrong_is_said(hooks: dict[str, Any], why: str) -> None:
    assert why in reason(module(**hooks))


def test_a_plugin_that_is_not_there_is_named() -> None:
    assert "nothing_of_this_name" in reason("nothing_of_this_name")
    assert "there is no such file" in reason("/nowhere/nothing.py")
