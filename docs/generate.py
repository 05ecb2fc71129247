"""Writes docs/reference/ from the code: ``python docs/generate.py``; with ``--check`` it says what would change.

What is shown is read from the sources, so no torch is needed and nothing is listed by hand: a hook's kind comes from
pluggy's mark and its return type, its side from its docstring, its example from the template that answers it.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from definitions import ROOT, Source

from lightllm import config, hookspecs, options, selection
from lightllm.checks import RECORDS
from lightllm.scaffold import KINDS

REFERENCE = ROOT / "docs" / "reference"
TEMPLATES = "core/lightllm/templates"

MARK = "<!-- Written by docs/generate.py: change the code it reads, not this file. -->\n\n"

KIND_TEXTS = {
    "records": "Every plugin answers with a list, and all lists count. Which record serves is decided later.",
    "first answer wins": "Plugins are asked one after the other, yours before the built-in ones, until one answers "
    "something other than None.",
    "everyone": "Every plugin is asked, for what it does rather than for what it answers.",
}

INTERFACES = Source("core/lightllm/interfaces.py")
HOOKSPECS = Source("core/lightllm/hookspecs.py")
GRAMMAR = Source("core/lightllm/grammar.py")
NN = [Source(f"core/lightllm/nn/{name}.py") for name in ("layers", "batch", "rope")]
REQUEST = Source("core/lightllm/engine/request.py")
SCHEDULER = Source("core/lightllm/engine/scheduler.py")
OPTIONS = Source("core/lightllm/options.py")
PROTOCOL = Source("core/lightllm/server/protocol.py")
APP = Source("core/lightllm/server/app.py")


# ---------------------------------------------------------------------------------------------------------------------
# Definitions as Markdown


class Page:
    """A page that documents definitions, each under a heading of its name."""

    def __init__(self, name: str, title: str, intro: str) -> None:
        self.name, self.title, self.intro = name, title, intro
        self.entries: list[tuple[Source, str, str]] = []

    def add(self, source: Source, names: Iterable[str], heading: str = "") -> None:
        """``heading``: of the group that begins here."""
        for name in names:
            self.entries.append((source, name, heading))
            heading = ""

    def text(self, links: Mapping[str, str], before: Mapping[str, str] | None = None) -> str:
        """``before``: name -> what goes between its heading and its docstring."""
        level = "###" if any(heading for _, _, heading in self.entries) else "##"
        parts = [f"# {self.title}\n\n{linked(self.intro, links)}"]
        for source, name, heading in self.entries:
            if heading:
                parts.append(f"## {heading}")
            parts.append(f"{level} `{name}`")
            if before and name in before:
                parts.append(before[name])
            parts.extend(filter(None, definition(source, name, links)))
        return MARK + "\n\n".join(parts) + "\n"


def definition(source: Source, name: str, links: Mapping[str, str]) -> Iterator[str]:
    node = source.find(name)
    doc = linked(source.doc(node), links)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield code(f"{source.signature(node)}: ...")
        yield doc
    elif isinstance(node, ast.ClassDef):
        if doc:
            yield doc
        members = list(_members(source, node))
        yield code(_class(source, node, members))
        for member, where in members:
            if text := source.doc(member, where):
                yield f"- **`{_name(member)}`**: {textwrap.indent(linked(text, links), '    ').strip()}"
    else:
        yield code(source.text(name))
        yield doc


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def linked(text: str, links: Mapping[str, str]) -> str:
    """`Name` becomes a link to where Name is documented."""

    def link(found: re.Match[str]) -> str:
        short = re.sub(r"^lightllm\.([a-z]+\.)*", "", found[1])
        target = links.get(short) or links.get(short.partition(".")[0])
        return f"[`{short}`]({target})" if target else found[0]

    return re.sub(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", link, text)


def _members(source: Source, node: ast.ClassDef) -> Iterator[tuple[ast.stmt, ast.ClassDef]]:
    """Public members and the class they are written in; a struct's inherited fields first."""
    own = dict(source.definitions())
    for base in node.bases:
        if isinstance(base, ast.Name) and isinstance(inherited := own.get(base.id), ast.ClassDef):
            yield from _members(source, inherited)
    for name, member in source.definitions(node):
        if name == "__init__" or name[0] != "_":
            yield member, node


def _class(source: Source, node: ast.ClassDef, members: Sequence[tuple[ast.stmt, ast.ClassDef]]) -> str:
    bases = [text for base in node.bases if not (text := ast.unparse(base).removeprefix("msgspec.")).startswith("_")]
    shown = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    shown.append(f"class {node.name}({', '.join(bases)}):" if bases else f"class {node.name}:")
    if not members:
        return shown[-1] + " ..."
    before: ast.stmt | None = None
    for member, _ in members:
        if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if isinstance(before, (ast.Assign, ast.AnnAssign)):
                shown.append("")
            shown.extend(f"    @{ast.unparse(decorator)}" for decorator in member.decorator_list)
            text = f"{source.signature(member)}: ..."
        else:
            text = source.lines(member.lineno, member.end_lineno or member.lineno)
        shown.append(textwrap.indent(text, "    "))
        before = member
    return "\n".join(shown)


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return node.name


def public_classes(source: Source, *, base: str | None = None) -> list[str]:
    """Their names, in the file's order; ``base``: of those only that say so."""
    return [
        name
        for name, node in source.definitions()
        if isinstance(node, ast.ClassDef)
        and name[0] != "_"
        and (base is None or any(ast.unparse(found) == base for found in node.bases))
    ]


def public(source: Source) -> list[str]:
    """All public classes, functions and aliases, in the file's order."""
    return [name for name, node in source.definitions() if name[0] != "_" and not isinstance(node, ast.AnnAssign)]


# ---------------------------------------------------------------------------------------------------------------------
# The pages


def pages() -> dict[str, str]:
    """File name -> content."""
    records = Page(
        "records",
        "Records",
        "What hooks return: what there is, and under which name; where its code is, and when it can serve.",
    )
    records.add(INTERFACES, ["Record", *public_classes(INTERFACES, base="Record"), "Listener"])

    contracts = Page(
        "contracts",
        "Contracts",
        "What targets fulfil, and the plain data they are given. A target need not inherit from anything: "
        "`lightllm-serve plugins --check` looks whether its methods are there and can be called so.",
    )
    contracts.add(INTERFACES, public_classes(INTERFACES, base="Protocol"), "Contracts")
    contracts.add(INTERFACES, ["Adapters"])
    events = [part.strip() for part in INTERFACES.text("Event").partition("=")[2].split("|")]
    contracts.add(INTERFACES, ["Event", *events], "Events of parsers")
    known = {name for page in (records, contracts) for _, name, _ in page.entries}
    contracts.add(
        INTERFACES, [n for n in public_classes(INTERFACES, base="msgspec.Struct") if n not in known], "Plain data"
    )
    contracts.add(REQUEST, ["SamplingParams", "Ready"])
    contracts.add(SCHEDULER, ["Plan", "Item", "Result"])
    contracts.add(INTERFACES, ["UserError", "WorkerLost"], "Besides")
    contracts.add(OPTIONS, ["OptionGroup", "parse_size"])

    grammar = Page("grammar", "Grammars", _module_doc(GRAMMAR) + "\n\nIn `lightllm.grammar`.")
    grammar.add(GRAMMAR, public(GRAMMAR))

    nn = Page("nn", "Layers", "What model plugins are made of. Needs torch.")
    for source in NN:
        module = source.path.removeprefix("core/").removesuffix(".py").replace("/", ".")
        nn.add(source, public(source), f"{module}")

    testing = Page("testing", "Test kit", _module_doc(Source("core/lightllm/testing/__init__.py")))
    for source, name, heading in _kit():
        testing.add(source, [name], heading)

    links = {hook: f"hooks.md#{hook}" for hook in hook_names()}
    for page in (testing, nn, grammar, contracts, records):
        links |= {name: f"{page.name}.md#{name.lower()}" for _, name, _ in page.entries}
    links |= {"hookimpl": "hooks.md"}
    texts = {page.name: page.text(links) for page in (contracts, grammar, nn, testing)}
    texts["records"] = records.text(links, _record_facts(links))
    texts["hooks"] = _hooks(links)
    texts["options"] = _options()
    texts["api"] = _api(links)
    return {f"{name}.md": text for name, text in texts.items()}


def _module_doc(source: Source) -> str:
    return ast.get_docstring(source.module) or ""


def _record_facts(links: Mapping[str, str]) -> dict[str, str]:
    facts = {}
    for kind, (record, _) in RECORDS.items():
        text = f"Listed by [`lightllm_{kind}`]({links[f'lightllm_{kind}']})"
        if option := selection.OPTIONS.get(kind):
            text += f", chosen by `{option}`"
        facts[record.__name__] = f"{text}."
    facts["Listener"] = f"Listed by [`lightllm_listeners`]({links['lightllm_listeners']})."
    return facts


def _kit() -> Iterator[tuple[Source, str, str]]:
    """What `lightllm.testing` offers, by the imports it shows to type checkers, and its fixtures."""
    kit = Source("core/lightllm/testing/__init__.py")
    homes = {
        alias.name: Source(f"core/{node.module.replace('.', '/')}.py")
        for node in ast.walk(kit.module)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightllm.testing.")
        for alias in node.names
    }
    checks = [name for name in homes if name.startswith("check_")]
    for i, name in enumerate(checks):
        yield homes[name], name, "" if i else "Contracts as functions"
    for i, name in enumerate(name for name in homes if name not in checks):
        yield homes[name], name, "" if i else "Servers and models"
    fixtures = Source("core/lightllm/testing/fixtures.py")
    for i, name in enumerate(name for name in public(fixtures) if "fixture" in fixtures.text(name)):
        yield fixtures, name, "" if i else "Fixtures of pytest"


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


def hook_names() -> list[str]:
    return [name for name, _ in HOOKSPECS.definitions() if name.startswith("lightllm_")]


def hook_kind(name: str) -> str:
    """By pluggy's mark and the return type."""
    if getattr(hookspecs, name).lightllm_spec["firstresult"]:
        return "first answer wins"
    node = HOOKSPECS.find(name)
    assert isinstance(node, ast.FunctionDef) and node.returns is not None
    return "records" if ast.unparse(node.returns).startswith("Sequence[") else "everyone"


def hook_side(name: str) -> str:
    """By its docstring, which has to say it."""
    found = re.search(r"Used in (?:the (\w+ process)|(both processes))\b", HOOKSPECS.doc(HOOKSPECS.find(name)))
    if found is None:
        raise ValueError(f"the docstring of {name} lacks 'Used in the ... process.' or 'Used in both processes.'")
    return found[1] or found[2]


def hook_examples() -> dict[str, list[str]]:
    """Hook -> the kinds whose template answers it."""
    found: dict[str, list[str]] = {name: [] for name in hook_names()}
    for kind in KINDS:
        for name, _ in Source(template(kind)).definitions():
            if name in found:
                found[name].append(kind)
    return found


def template(kind: str) -> str:
    return f"{TEMPLATES}/{kind}/src/example_plugin/__init__.py"


def _hooks(links: Mapping[str, str]) -> str:
    examples = hook_examples()
    parts = [
        MARK + f"# Hooks\n\n{linked(_module_doc(HOOKSPECS), links)}",
        "| kind | how plugins are asked |\n| --- | --- |\n"
        + "\n".join(f"| {k} | {t} |" for k, t in KIND_TEXTS.items()),
        f"This is version {hookspecs.VERSION} of what plugins see (`lightllm.HOOKS_VERSION`); "
        "what that promises is said in [Compatibility](../plugins/compatibility.md).",
        "| hook | kind | used in | example |\n| --- | --- | --- | --- |\n"
        + "\n".join(
            f"| [`{name}`](#{name}) | {hook_kind(name)} | {hook_side(name)} | "
            f"{', '.join(f'[{kind}](../tutorials/{kind}.md)' for kind in examples[name])} |"
            for name in hook_names()
        ),
    ]
    for name in hook_names():
        node = HOOKSPECS.find(name)
        assert isinstance(node, ast.FunctionDef)
        doc = re.sub(r"\s*Used in (the \w+ process|both processes)\.", "", HOOKSPECS.doc(node)).strip()
        facts = [f"Kind: **{hook_kind(name)}**", f"used in: **{hook_side(name)}**"]
        if record := RECORDS.get(name.removeprefix("lightllm_")):
            facts.append(" with target ".join(f"[`{x.__name__}`]({links[x.__name__]})" for x in record))
        kind = examples[name][0]
        parts += [
            f"## `{name}`",
            linked(doc, links),
            ", ".join(facts) + ".",
            code(f"@hookimpl\n{HOOKSPECS.signature(node)}: ..."),
            f"As `lightllm-serve plugins new NAME --kind {kind}` writes it ([tutorial](../tutorials/{kind}.md)):",
            code(f'--8<-- "{template(kind)}:{name}"'),
        ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command line and HTTP


def _options() -> str:
    rows = []
    for option in config.core_options().values():
        spelled = f"`--{option.name}`" + (f"<br>`--no-{option.name}`" if option.is_flag else "")
        default = str(option.default).lower() if option.is_flag else option.default
        default = f"`{default}`" if default not in (None, ()) else ""
        rows.append(f"| {spelled} | {option.allowed()} | {default} | `{option.variable}` | {option.help} |")
    aliases = [f"| `--{old.replace('-', '_')}` | `--{new}` |" for old, new in options.ALIASES.items()]
    return f"""{MARK}# Command line

`lightllm-serve [options]` serves a model. Every option may be written with hyphens or underscores, be given as an
environment variable, or as a key of the TOML file that `--config FILE` (`LIGHTLLM_CONFIG`) names. The command line goes
before the environment, the environment before the file, the file before the default. Plugins add options of their own:
`lightllm-serve --help` lists those of the plugins that are installed.

| option | value | default | variable | meaning |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

`--help` and `--version` print and exit.

## LightLLM's names

These work wherever ours do:

| LightLLM | here |
| --- | --- |
{chr(10).join(aliases)}

`python -m lightllm.server.api_server` is the same command. As LightLLM's server does, it answers whatever model name a
request gives, unless `--model_name` was given.
"""


def _api(links: Mapping[str, str]) -> str:
    rows = []
    for node in ast.walk(APP.module):
        for decorator in node.decorator_list if isinstance(node, ast.AsyncFunctionDef) else ():
            match decorator:
                case ast.Call(ast.Name("get" | "post" as method), [ast.Constant(str(path))], keywords):
                    is_open = any(ast.unparse(keyword) == "opt=OPEN" for keyword in keywords)
                    rows.append(f"| `{method.upper()}` | `{path}` | {'no' if is_open else 'yes'} |")
    parts = [
        MARK + "# HTTP API",
        "Paths, fields, answers and errors are [OpenAI's](https://platform.openai.com/docs/api-reference), so its "
        "clients work unchanged. Further fields are spelt as vLLM spells them. Plugins may add routes.",
        "With `--api-key KEY` requests need the header `Authorization: Bearer KEY`, where the table says so.",
        "| method | path | needs the key |\n| --- | --- | --- |\n" + "\n".join(rows),
        "## Requests",
        "A field that is null was not sent. Some are known only to be refused with a reason, as nothing here honours "
        "them: `functions`, `audio` and `suffix` for three. A field that is not in these tables is given to the logits "
        "processor that claims it, and otherwise ignored.",
    ]
    for name, title in {
        "ChatRequest": "POST /v1/chat/completions",
        "CompletionRequest": "POST /v1/completions",
        "Generating": "Both of them",
        "TokenizeRequest": "POST /tokenize",
        "DetokenizeRequest": "POST /detokenize",
    }.items():
        node = PROTOCOL.find(name)
        assert isinstance(node, ast.ClassDef)
        fields = [member for _, member in PROTOCOL.definitions(node) if isinstance(member, ast.AnnAssign)]
        shown = [
            f"| `{ast.unparse(f.target)}` | {_type(f.annotation)}{'' if f.value else ', required'} |" for f in fields
        ]
        parts += [f"### {title}", "| field | type |\n| --- | --- |\n" + "\n".join(shown)]
    return "\n\n".join(parts) + "\n"


def _type(node: ast.expr) -> str:
    """A type of the protocol's in words."""
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return " or ".join(_type(side) for side in (left, right) if ast.unparse(side) != "None")
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([base, ast.Call(keywords=limits)])):
            words = {"ge": "from {}", "gt": "more than {}", "le": "to {}"}
            words |= {"min_length": "at least {} long", "max_length": "at most {} long"}
            return " ".join([_type(base), *(words[str(k.arg)].format(ast.unparse(k.value)) for k in limits)])
        case ast.Name(name) if isinstance(found := dict(PROTOCOL.definitions()).get(name), ast.Assign):
            return _type(found.value)
        case ast.Subscript(ast.Name("list"), item):
            return re.sub(r"^list of (\w+)", r"list of \1s", f"list of {_type(item)}").replace("of anys", "of anything")
        case ast.Subscript(ast.Name("dict")) | ast.Name("ResponseFormat" | "StructuredOutputs" | "StreamOptions"):
            return "object"
        case ast.Name(name):
            return {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Any": "any"}[name]
    raise ValueError(f"no words for the type {ast.unparse(node)}")


# ---------------------------------------------------------------------------------------------------------------------


def stale(found: Mapping[str, str]) -> str:
    """How the files differ from what they should be."""
    lines: list[str] = []
    names = {path.name for path in REFERENCE.glob("*.md")} | set(found)
    for name in sorted(names):
        path = REFERENCE / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = found.get(name, "")
        shown = f"docs/reference/{name}"
        lines += difflib.unified_diff(old.splitlines(True), new.splitlines(True), shown, f"{shown} (from the code)")
    return "".join(lines)


def main() -> int:
    found = pages()
    if "--check" in sys.argv[1:]:
        if difference := stale(found):
            sys.stdout.write(difference)
            sys.stderr.write("docs/reference is stale: run python docs/generate.py\n")
            return 1
        return 0
    REFERENCE.mkdir(exist_ok=True)
    for name, text in found.items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
