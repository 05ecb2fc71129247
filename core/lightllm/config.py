"""One frozen Config, and the only reader of the command line, the environment and the config file."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

import msgspec
import msgspec.inspect
from msgspec import Meta

from lightllm.checks import suggestion
from lightllm.options import ALIASES, CORE, Option, OptionGroup, UsageError, parse_size, spelling

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from lightllm.plugins import Plugins


__all__ = ["Config", "OptionGroup", "UsageError", "parse_size", "read_config", "read_plugin_choice"]

Positive = Annotated[int, Meta(ge=1)]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a process needs to know. Crosses to the engine as msgpack, so it is plain data.

    The fields are the options: their names, types, defaults and help texts are read from here.
    """

    model: Annotated[str, Meta(description="a folder, a .gguf file, a Hugging Face Hub id, or `demo`")] = "demo"
    revision: Annotated[str | None, Meta(description="branch, tag or commit of a hub model")] = None
    served_model_name: Annotated[
        tuple[str, ...], Meta(description="the name clients use, may be given more than once; default: the model's")
    ] = ()
    any_model_name: Annotated[bool, Meta(description="answer whatever model name a request gives")] = False
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 picks a free one")] = 8000
    api_key: Annotated[str | None, Meta(description="require this bearer token on /v1 and the other API routes")] = None
    allowed_origins: Annotated[
        tuple[str, ...],
        Meta(description="let web pages of this origin call the server, * for all; may be given more than once"),
    ] = ()

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="of weights and KV cache; auto: the checkpoint's on a GPU, float32 on a CPU"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: cuda where there is one")] = "auto"
    quantization: Annotated[str, Meta(description="linear method to hold the weights in, or auto")] = "auto"
    tp: Annotated[Positive, Meta(description="tensor-parallel ranks")] = 1
    attention_backend: Annotated[str, Meta(description="attention backend, or auto")] = "auto"
    operators: Annotated[str, Meta(description="norms, activations and rotations, or auto")] = "auto"
    sampler: Annotated[str, Meta(description="sampler, or auto")] = "auto"
    executor: Annotated[str, Meta(description="where the model runs, or auto")] = "auto"
    grammar_backend: Annotated[str, Meta(description="compiler of grammars for structured output, or auto")] = "auto"

    max_model_len: Annotated[
        Positive | None, Meta(description="longest prompt plus answer, in tokens; default: the model's own")
    ] = None
    max_total_tokens: Annotated[Positive | None, Meta(description="size of the KV cache, in tokens")] = None
    kv_cache_memory: Annotated[
        str | None, Meta(description="size of the KV cache, in bytes, e.g. 4GiB; default: from free memory")
    ] = None
    max_running_requests: Annotated[Positive, Meta(description="sequences in one step at most")] = 256
    max_batch_tokens: Annotated[
        Positive | None, Meta(description="tokens in one step at most; longer prompts are prefilled in chunks")
    ] = None
    prefix_cache: Annotated[bool, Meta(description="reuse the KV cache of shared prompt beginnings")] = True
    overlap: Annotated[bool, Meta(description="plan the next step while a CUDA device computes this one")] = True
    cuda_graphs: Annotated[bool, Meta(description="replay captured CUDA graphs where a step is decodes alone")] = True

    chat_template: Annotated[str | None, Meta(description="jinja2 file to use for the model's own template")] = None
    tool_call_parser: Annotated[
        str, Meta(description="how this model writes tool calls; auto: by its chat template and tokens; or none")
    ] = "auto"
    reasoning_parser: Annotated[str | None, Meta(description="how this model marks its reasoning")] = None

    plugin: Annotated[
        tuple[str, ...],
        Meta(description="load a plugin that is not installed: a .py file or a module; may be given more than once"),
    ] = ()
    no_plugin: Annotated[tuple[str, ...], Meta(description="block a plugin; may be given more than once")] = ()
    strict_plugins: Annotated[bool, Meta(description="refuse to start when a plugin is broken")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severe message to log")
    ] = "info"

    plugin_options: dict[str, Any] = {}
    """Options that plugins added, by their name with underscores."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading it


_PLUGIN_CHOICE = ("plugin", "no_plugin", "strict_plugins")


class _UnknownOption(UsageError):
    pass


class PluginChoice(NamedTuple):
    """What must be known before plugins can be loaded and add their options. ``given``: ``--plugin``'s values, files by
    their absolute path."""

    blocked: tuple[str, ...]
    strict: bool
    given: tuple[str, ...]


def read_plugin_choice(argv: Sequence[str], environ: Mapping[str, str]) -> PluginChoice:
    values = _Given(core_options(), argv, environ, sure=False).values
    given = tuple(str(Path(p).absolute()) if "/" in p or p.endswith(".py") else p for p in values.get("plugin", ()))
    return PluginChoice(values.get("no_plugin", ()), values.get("strict_plugins", False), given)


def read_config(
    argv: Sequence[str],
    environ: Mapping[str, str],
    plugins: Plugins | None = None,
    *,
    lightllm_names: bool = False,
) -> Config:
    """The Config of a command line (without the program's name). argv goes before environment, file and default.

    ``lightllm_names``: as LightLLM's server does, answer to every model name unless one was given. Raises UsageError
    in one line; SystemExit after printing for ``--help`` and ``--version``.
    """
    options = core_options()
    if plugins is not None:
        plugins.add_options(OptionGroup("", options))
    try:
        given = _Given(options, argv, environ)
    except _UnknownOption as error:
        # Perhaps a plugin would have added it, had it worked.
        raise UsageError(f"{error}{plugins.broken_note() if plugins is not None else ''}") from None
    values = given.values
    if lightllm_names:
        values.setdefault("any_model_name", "served_model_name" not in values)
    added = {option.key: option.default for option in options.values() if option.owner != CORE}
    plugin_options = {key: values.pop(key, default) for key, default in added.items()}
    return Config(**values, plugin_options=plugin_options)


class _Given:
    """The values that were given somewhere, by option key; defaults are not among them.

    ``sure=False`` reads only what is valid so far and leaves the complaints to the reading that knows all options.
    """

    def __init__(
        self, options: Mapping[str, Option], argv: Sequence[str], environ: Mapping[str, str], *, sure: bool = True
    ) -> None:
        self.options = options
        self.sure = sure
        self.values: dict[str, Any] = {}
        typed = self._typed(argv)
        file = typed.pop("config", [None])[-1] or environ.get("LIGHTLLM_CONFIG")
        if file:
            self._read_file(Path(file))
        for option in options.values():
            if text := environ.get(option.variable, ""):
                self._set(option, text, option.variable)
        for name, value in typed.items():
            self._set(options[name], str(value) if isinstance(value, bool) else value, f"--{name}")

    def _set(self, option: Option, text: str | Sequence[str], source: str) -> None:
        if self.sure or option.key in _PLUGIN_CHOICE:
            self.values[option.key] = option.parse(text, source)

    def _typed(self, argv: Sequence[str]) -> dict[str, Any]:
        parser = _parser(self.options, full=self.sure)
        namespace, rest = parser.parse_known_args([_canonical(token) for token in argv])
        if rest and self.sure:
            unknown = next((token for token in rest if token.startswith("-")), rest[0])
            if not unknown.startswith("-"):
                raise UsageError(f"unexpected argument {unknown!r}")
            known = [text for action in parser._actions for text in action.option_strings]
            name = unknown.partition("=")[0]
            asked = next((token for token in argv if _canonical(token) == unknown), unknown).partition("=")[0]
            raise _UnknownOption(f"unknown option {asked}.{suggestion(name, [*known, *(f'--{a}' for a in ALIASES)])}")
        return {key.replace("_", "-"): value for key, value in vars(namespace).items()}

    def _read_file(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                content = tomllib.load(file)
        except OSError as error:
            raise UsageError(f"config file {path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"config file {path} is not TOML: {error}") from None
        for key, value in content.items():
            name = spelling(key)
            option = self.options.get(ALIASES.get(name, name))
            if option is None:
                if self.sure:
                    raise _UnknownOption(f"config file {path}: unknown key {key!r}.{suggestion(name, self.options)}")
                continue
            if option.is_list and isinstance(value, str):
                value = [value]
            if self.sure or option.key in _PLUGIN_CHOICE:
                self.values[option.key] = option.convert(value, f"config file {path}: {key}", strict=True)


def core_options() -> dict[str, Option]:
    options: dict[str, Option] = {}
    for field in msgspec.structs.fields(Config):
        if field.name == "plugin_options":
            continue
        info = msgspec.inspect.type_info(field.type)
        help = (
            (info.extra_json_schema or {}).get("description", "") if isinstance(info, msgspec.inspect.Metadata) else ""
        )
        name = field.name.replace("_", "-")
        options[name] = Option(name=name, type=field.type, default=field.default, help=help)
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _parser(options: Mapping[str, Option], *, full: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightllm-serve",
        usage="lightllm-serve [options]\n       lightllm-serve plugins [--json] [--check]\n       "
        "lightllm-serve plugins new NAME --kind KIND",
        description="Serve a language model over OpenAI's API.",
        epilog="Every option may be given with underscores, as an environment variable (LIGHTLLM_PORT), or as a key of "
        f"the config file. LightLLM's names work too: {', '.join('--' + name.replace('-', '_') for name in ALIASES)}.",
        allow_abbrev=False,
        add_help=full,
        argument_default=argparse.SUPPRESS,
    )
    if full:
        version = importlib.metadata.version("lightllm-serve")
        parser.add_argument("--version", action="version", version=f"lightllm-serve {version}", help="show the version")
    parser.add_argument("--config", action="append", metavar="FILE", help="TOML file of options")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options.values():
        group = groups.get(option.owner) or parser.add_argument_group(
            "serving" if option.owner == CORE else option.owner.replace("%", "%%")
        )
        groups[option.owner] = group
        shown = str(option.default).lower() if option.is_flag else option.default
        default = f" (default: {shown})" if option.default not in (None, ()) else ""
        help = (option.help + default).replace("%", "%%")
        if option.is_flag:
            group.add_argument(f"--{option.name}", action=argparse.BooleanOptionalAction, dest=option.key, help=help)
        else:
            group.add_argument(
                f"--{option.name}", action="append", dest=option.key, metavar=option.metavar(), help=help
            )
    return parser


def _canonical(token: str) -> str:
    """A token of the command line with its option name spelt our way; values are left alone."""
    if not token.startswith("--") or token == "--":
        return token
    name, equals, value = token.partition("=")
    name = spelling(name)
    return f"--{ALIASES.get(name, name)}{equals}{value}"
