"""The commands as a user runs them: exit codes, what is printed where, and nobody else's traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
from distributions import Site, site_in

import lightllm.assemble
from lightllm import UserError
from lightllm.cli import main
from lightllm.config import Config
from lightllm.plugins import Plugins

PARSER = """
    @hookimpl
    def lightllm_tool_parsers():
        return [ToolParserRecord(name="mine", target="mine_work:Parser")]
    @hookimpl
    def lightllm_add_options(group):
        group.add("--mine-option", type=int, default=1)
"""
WORK = """
    class Parser:
        def __init__(self, tools): pass
        def push(self, text): return ()
        def close(self): return ()
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from site_in(tmp_path, monkeypatch)


def without_plugins(config: Config) -> Config:
    """Whatever is installed besides may have added options."""
    return msgspec.structs.replace(config, plugin_options={})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that `serve` was called with; nothing is served."""
    configs: list[Config] = []

    def serve(config: Config, plugins: Plugins) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(lightllm.assemble, "serve", serve)
    return configs


def run(*line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True, timeout=600, check=False)


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return {report["name"]: report for report in json.loads(capsys.readouterr().out)}


def test_without_a_subcommand_it_serves(served: list[Config]) -> None:
    assert main(["--port", "81", "--tool_call_parser", "x"]) == 0
    assert [without_plugins(config) for config in served] == [Config(port=81, tool_call_parser="x")]


def test_a_plugins_option_is_known_when_serving(site: Site, served: list[Config]) -> None:
    site.install("mine-dist", {"mine": "mine_module"}, {"mine_module": PARSER, "mine_work": WORK})
    assert main(["--mine_option", "7"]) == 0
    assert served[0].plugin_options["mine_option"] == 7


def test_a_blocked_plugins_option_is_unknown(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("mine-dist", {"mine": "mine_module"}, {"mine_module": PARSER, "mine_work": WORK})
    assert main(["--no-plugin", "mine", "--mine-option", "7"]) == 2
    assert "unknown option --mine-option" in capsys.readouterr().err


def test_wrong_usage_is_one_line_on_stderr_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "lightllm-serve: error: --port: 'x' is not a whole number from 0 to 65535\n"
    assert captured.out == ""


@pytest.mark.parametrize(("error", "code"), [(UserError("two\nlines"), 1), (KeyboardInterrupt(), 130)])
def test_what_stops_the_server_is_no_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(config: Config, plugins: Plugins) -> int:
        raise error

    monkeypatch.setattr(lightllm.assemble, "serve", serve)
    assert main([]) == code
    assert capsys.readouterr().err == ("lightllm-serve: error: two lines\n" if code == 1 else "")


def test_the_engine_subcommand_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightllm.assemble, "run_engine", lambda argv: len(argv))
    assert main(["engine", "folder"]) == 1


def test_strict_plugins_refuses_to_start(site: Site, served: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    site.install("bad-dist", {"aaa": "bad_module"}, {"bad_module": "import no_such_thing"})
    blocked = ",".join(report.name for report in Plugins.discover(quiet=True).report() if report.builtin)
    assert main(["--strict-plugins", "--no-plugin", blocked]) == 1
    assert "aaa (bad-dist 1.2) is broken" in capsys.readouterr().err
    assert main(["--no-plugin", blocked]) == 0
    assert len(served) == 1


# --- lightllm-serve plugins


def test_the_list_as_json_says_everything(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("mine-dist", {"mine": "mine_module"}, {"mine_module": PARSER, "mine_work": WORK})
    site.install("bad-dist", {"bad": "bad_module"}, {"bad_module": "import no_such_thing"})
    assert main(["plugins", "--json", "--no-plugin", "llama"]) == 0
    reports = listed(capsys)
    assert reports["mine"] == {
        "name": "mine",
        "distribution": "mine-dist",
        "version": "1.2",
        "builtin": False,
        "status": "ok",
        "provides": {"tool_parsers": ["mine"], "add_options": []},
        "summaries": {"tool_parsers": {"mine": ""}},
        "reason": "",
        "warnings": [],
    }
    assert reports["bad"]["status"] == "broken"
    assert "no_such_thing" in reports["bad"]["reason"]
    assert reports["llama"]["status"] == "blocked"
    assert reports["qwen2"]["builtin"]


def test_the_table_shows_name_origin_status_and_reason(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    site.install("mine-dist", {"mine": "mine_module"}, {"mine_module": PARSER, "mine_work": WORK})
    site.install("bad-dist", {"bad": "bad_module"}, {"bad_module": "raise OSError('[bold]')"})
    assert main(["plugins"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mine", "mine-dist", "1.2", "ok", "tool", "parsers:", "mine;", "add", "options"] in lines
    assert ["bad", "bad-dist", "1.2", "broken", "OSError:", "[bold]"] in lines
    assert ["qwen2", "built", "in", version("lightllm-serve"), "ok", "models:", "qwen2"] in lines


def test_verbose_has_a_line_for_every_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plugins", "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert "reasoning parser deepseek_r1: " in shown and "model llama: Llama 2 to 3.3" in shown
    assert len(shown.splitlines()) > len(Plugins.discover(quiet=True).report()) + 5


def test_check_finds_a_target_that_is_not_what_it_says(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("mine-dist", {"mine": "mine_module"}, {"mine_module": PARSER, "mine_work": "class Parser: pass"})
    builtin = ",".join(report.name for report in Plugins.discover(quiet=True).report() if report.builtin)
    line = ["plugins", "--json", "--no-plugin", builtin]
    assert main(line) == 0
    assert listed(capsys)["mine"]["status"] == "ok"
    assert main([*line, "--check"]) == 1
    assert listed(capsys)["mine"]["reason"] == "mine_work:Parser is no ToolParser: it lacks push, close"


def test_check_of_sound_plugins_exits_with_0(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install("mine-dist", {"mine": "mine_module"}, {"mine_module": PARSER, "mine_work": WORK})
    builtin = ",".join(report.name for report in Plugins.discover(quiet=True).report() if report.builtin)
    assert main(["plugins", "--json", "--check", "--no-plugin", builtin]) == 0
    assert listed(capsys)["mine"]["status"] == "ok"


def test_what_plugins_print_is_not_among_the_json(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    source = PARSER.replace("    @hookimpl", "    print('imported')\n    @hookimpl", 1)
    source = source.replace("(group):", "(group):\n        print('asked')")
    site.install(
        "mine-dist", {"mine": "mine_module"}, {"mine_module": source, "mine_work": f"    print('checked')\n{WORK}"}
    )
    builtin = ",".join(report.name for report in Plugins.discover(quiet=True).report() if report.builtin)
    del sys.modules["mine_module"]
    capsys.readouterr()
    assert main(["plugins", "--json", "--check", "--no-plugin", builtin]) == 0
    captured = capsys.readouterr()
    assert [report["status"] for report in json.loads(captured.out) if report["name"] == "mine"] == ["ok"]
    assert captured.err.split() == ["imported", "asked", "checked"]


def test_an_unknown_option_of_the_list_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--jsno"]) == 2
    assert "unknown option --jsno" in capsys.readouterr().err


def test_the_lists_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--help"]) == 0
    assert "--check" in capsys.readouterr().out


# --- the ways to start it


def test_python_m_lightllm_is_the_same_command() -> None:
    result = run("lightllm", "--version")
    assert result.returncode == 0
    assert result.stdout.startswith("lightllm-serve ")


def test_lightllms_own_line_starts_the_same_server_with_every_model_name(
    served: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy

    line = "x --model_dir DIR --port 8088 --tp 1 --tool_call_parser qwen25"
    monkeypatch.setattr(sys, "argv", line.split(" "))
    monkeypatch.delitem(sys.modules, "lightllm.server.api_server", raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("lightllm.server.api_server", run_name="__main__")
    assert caught.value.code == 0
    expected = Config(model="DIR", port=8088, tool_call_parser="qwen25", any_model_name=True)
    assert [without_plugins(config) for config in served] == [expected]


def test_the_console_script_reports_a_mistake_with_exit_code_2() -> None:
    script = Path(sys.executable).with_name("lightllm-serve")
    result = subprocess.run([script, "--prot", "1"], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 2
    assert "lightllm-serve: error: unknown option --prot. Did you mean --port?" in result.stderr
    assert "Traceback" not in result.stderr
