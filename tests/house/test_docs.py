"""The documentation is true: written from the code, built without a warning, and what it shows is what happens."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from distributions import Site, site_in

from lightllm import hookspecs, scaffold
from lightllm.config import read_config
from lightllm.plugins import Plugins
from lightllm.scaffold import KINDS, TEMPLATES
from lightllm.testing import serve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [page for page in PAGES if page.parent.name != "reference"]
"""By hand."""

COMMANDS = ("lightllm-serve ", "python -m lightllm.server.api_server ")
MISSPELT = (EXAMPLES / "misspelt.py").read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the code blocks, in order."""
    for language, content in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        if not languages or language in languages:
            yield language, content


def commands(page: Path) -> list[str]:
    return [
        line.removeprefix("$ ")
        for _, content in blocks(page, "console")
        for line in content.splitlines()
        if line.startswith("$ ")
    ]


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


# --- the reference


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCS / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_the_reference_is_what_the_code_says() -> None:
    done = generate("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_writing_the_reference_needs_no_torch() -> None:
    code = "import sys, generate; generate.pages(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=DOCS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reference_that_is_stale_is_told_by_its_difference(tmp_path: Path) -> None:
    for folder in ("docs", "core"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    page = tmp_path / "docs" / "reference" / "hooks.md"
    page.write_text(page.read_text().replace("Token samplers.", "Samplers of tokens."))
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "-Samplers of tokens.\n+Token samplers.\n" in done.stdout


@pytest.mark.parametrize("hook", [hook for hook in dir(hookspecs) if hook.startswith("lightllm_")])
def test_every_hook_is_described(hook: str) -> None:
    text = (DOCS / "reference" / "hooks.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## `{hook}`\n")[2].partition("\n## ")[0]
    assert re.search(r"Kind: \*\*(records|first answer wins|everyone)\*\*", section)
    assert re.search(r"used in: \*\*(server process|engine process|both processes)\*\*", section)
    assert f"@hookimpl\ndef {hook}(" in section
    assert re.search(rf'^--8<-- "core/lightllm/templates/.*:{hook}"$', section, re.M)


def test_every_public_name_is_described() -> None:
    import lightllm
    import lightllm.testing

    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    own = {"HOOKS_VERSION", "grammar", "hookimpl"}
    for public in {*lightllm.__all__, *lightllm.testing.__all__} - own:
        assert re.search(rf"^##+ `{public}`$", text, re.M), public
    assert all(word in text for word in ("lightllm.HOOKS_VERSION", "lightllm.grammar", "@hookimpl"))


# --- the site


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # with --quiet, --strict would let warnings pass
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built: every link, anchor and included file is there."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("contracts.md#sampler)", "contracts.md#no-such)"),
        ("reference/contracts.md", "reference/no-such.md"),
        ("sampler.py:ExamplePluginSampler", "sampler.py:NoSuch"),
        ("sampler/tests/test_", "sampler/tests/no_such_"),
    ],
)
def test_what_is_not_there_fails_the_build(right: str, wrong: str, tmp_path: Path) -> None:
    for folder in ("docs", "core"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    page = tmp_path / "docs" / "tutorials" / "sampler.md"
    text = page.read_text(encoding="utf-8")
    assert right in text
    page.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and re.search(r"no.?such", done.stderr, re.I)


def test_every_page_is_built_and_nothing_else_is_published(site: Path) -> None:
    built = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"}
    assert built == set(map(name, PAGES))
    assert not list(site.rglob("*.py"))


def test_a_page_shows_the_code_it_includes(site: Path) -> None:
    shown = re.sub(r"<[^>]*>", "", (site / "tutorials" / "sampler.html").read_text(encoding="utf-8"))
    assert "def sample(self, logits: Tensor, rows: Sequence[SamplingRow], history: History) -&gt; Tensor:" in shown
    assert not any("--8&lt;--" in path.read_text(encoding="utf-8") for path in site.rglob("*.html"))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", path.read_text())
        canonical = [url for url in loaded if re.match(r"(https?:)?//", url)]
        assert canonical == [], path


# --- what the pages hold


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_tutorial_of_its_own_files(kind: str) -> None:
    page = DOCS / "tutorials" / f"{kind}.md"
    assert f"lightllm-serve plugins new example-plugin --kind {kind}" in commands(page)
    included = re.findall(r'^--8<-- "core/lightllm/templates/([\w-]+)/([^":]+)', page.read_text(encoding="utf-8"), re.M)
    assert {owner for owner, _ in included} == {kind}
    own = {str(path.relative_to(TEMPLATES / kind)) for path in (TEMPLATES / kind).rglob("*.py")}
    assert {path for _, path in included} == own, "it shows each of its files"


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_python_on_a_page_is_a_file_that_tests_run(page: Path) -> None:
    for _, content in blocks(page, "python"):
        found = re.fullmatch(r'--8<-- "((?:core/lightllm/templates|docs/examples)/[^":]+)(:[\w.,]+)?"\n', content)
        assert found, content
        assert (ROOT / found[1]).is_file()


def test_every_example_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in WRITTEN)
    assert all(f'"docs/examples/{path.name}' in text for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_json_and_toml_on_a_page_are_valid(page: Path) -> None:
    for language, content in blocks(page, "json", "toml"):
        if include := re.fullmatch(r'--8<-- "([^"]+)"\n', content):
            content = (ROOT / include[1]).read_text(encoding="utf-8")
        (json.loads if language == "json" else tomllib.loads)(content)
    for command in commands(page):
        words = shlex.split(command)
        for flag, value in pairwise(words):
            if flag in ("-d", "--json") and words[0] == "curl":
                json.loads(value)


def template(kind: str) -> ModuleType:
    path = TEMPLATES / kind / "src" / "example_plugin" / "__init__.py"
    spec = importlib.util.spec_from_file_location(f"template_{kind}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_line_is_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Plugins.discover(extra=[("example-plugin", template(page.stem))] if page.stem in KINDS else [])
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, tmp_path)
    toml = [content for _, content in blocks(page, "toml")]
    (tmp_path / "server.toml").write_text("\n".join(toml[:1]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shown = commands(page)
    shown += re.findall(
        r"`((?:lightllm-serve|python -m lightllm\.server\.api_server) --?[^`]*)`", page.read_text("utf-8")
    )
    for command in shown:
        if not command.startswith(COMMANDS):
            assert not re.match(r"(lightllm|python -m lightllm)", command), command
            continue
        arguments = shlex.split(command.partition(" # ")[0])
        arguments = arguments[3:] if arguments[0] == "python" else arguments[1:]
        if arguments[:2] == ["plugins", "new"]:
            if arguments[2:] != ["--help"] and "KIND" not in arguments:
                assert scaffold.main([*arguments[2:], "--into", str(tmp_path)]) == 0
            continue
        if arguments in (["--help"], ["[options]"]):
            continue
        arguments = [word for word in arguments if word not in ("plugins", "--check", "--json")]
        read_config(arguments, {}, known)


# --- what the pages say is printed


def spaced(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_commands_print_what_is_shown(page: Path, tmp_path: Path) -> None:
    """Of lightllm-serve's, where a page shows it."""
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, tmp_path)
    for _, content in blocks(page, "console"):
        for command, shown in re.findall(r"^\$ (lightllm-serve .*)\n((?:[^$].*\n)+)", content, re.M):
            line = [sys.executable, "-m", "lightllm", *shlex.split(command)[1:]]
            done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
            printed = (done.stdout + done.stderr).replace(str(tmp_path), "/home/you")
            assert spaced(printed) == spaced(shown), command


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """With `docs/examples/misspelt.py` installed as the distribution my-plugin."""
    for site in site_in(tmp_path, monkeypatch):
        site.install("my-plugin", {"misspelt": "misspelt"}, {"misspelt": MISSPELT})
        yield site


@pytest.mark.usefixtures("demo_model")  # else the log tells of a download
def test_a_broken_plugin_is_told_of_as_the_page_says(broken: Site) -> None:
    command = [sys.executable, "-m", "lightllm", "--model", "demo", "--sampler", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    text = (DOCS / "plugins" / "index.md").read_text(encoding="utf-8")
    for line in done.stderr.splitlines():
        assert line in text.splitlines()
    assert done.returncode == 1


def test_a_request_that_a_plugin_fails_is_answered_as_the_page_says() -> None:
    (shown,) = [text for _, text in blocks(DOCS / "plugins" / "index.md", "json") if "fragile" in text]
    with serve(EXAMPLES / "fragile.py", options=["--tool-call-parser", "fragile"]) as server:
        tools = [{"type": "function", "function": {"name": "now"}}]
        body = {"messages": [{"role": "user", "content": "2 < 3"}], "tools": tools}
        answer = server.http.post("/v1/chat/completions", json=body)
        found = re.search(r"error id (\w+)", answer.text)
        assert answer.status_code == 500 and found
        here = answer.text.replace(f"{EXAMPLES}/", "/home/you/").replace(found[1], "9eea96ab82bf")
        assert json.loads(here) == json.loads(shown)
        log = server.log
    assert "Traceback" in log and f"error {found[1]}: the tool parser fragile/fragile" in log


def test_the_examples_print_what_the_pages_say() -> None:
    found = {
        (file, printed)
        for page in WRITTEN
        for file, printed in re.findall(
            r'```python\n--8<-- "docs/examples/(\w+\.py)"\n```\n(?:(?!```).)*?```text\n(.*?)```',
            page.read_text(encoding="utf-8"),
            re.S,
        )
    }
    assert {file for file, _ in found} == {"chat.py", "stream.py", "structured.py", "tools.py"}
    plugin = str(EXAMPLES / "timing.py")
    with serve(plugin, model="demo", options=["--tool-call-parser", "qwen25"]) as server:
        for file, printed in sorted(found):
            code = (EXAMPLES / file).read_text(encoding="utf-8")
            assert "http://127.0.0.1:8000" in code
            code = code.replace("http://127.0.0.1:8000", server.url)
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"PYTHONUTF8": "1"},
                capture_output=True,
                encoding="utf-8",
                timeout=600,
                check=False,
            )
            assert done.stdout == printed, done.stderr
        log = server.log
    assert len(re.findall(r"INFO lightllm\.timing: chat\.completions: \d+ tokens in \d+\.\d s\n", log)) == len(found)
