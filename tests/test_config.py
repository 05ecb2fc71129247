"""The command line, the environment and the config file become one Config, or one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm import UserError, hookimpl
from lightllm.config import Config, OptionGroup, UsageError, parse_size, read_config, read_plugin_choice
from lightllm.options import ALIASES
from lightllm.plugins import Plugins, Recipe

OPTIONS = {
    "model": ("my/model", "my/model"),
    "revision": ("main", "main"),
    "served_model_name": ("a,b", ("a", "b")),
    "any_model_name": (None, True),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("8001", 8001),
    "api_key": ("secret", "secret"),
    "allowed_origins": ("https://a.example", ("https://a.example",)),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cpu", "cpu"),
    "quantization": ("int8", "int8"),
    "tp": ("2", 2),
    "attention_backend": ("torch", "torch"),
    "operators": ("torch", "torch"),
    "sampler": ("standard", "standard"),
    "executor": ("local", "local"),
    "grammar_backend": ("llguidance", "llguidance"),
    "max_model_len": ("4096", 4096),
    "max_total_tokens": ("9999", 9999),
    "kv_cache_memory": ("4GiB", "4GiB"),
    "max_running_requests": ("7", 7),
    "max_batch_tokens": ("77", 77),
    "prefix_cache": (None, True),
    "overlap": (None, True),
    "cuda_graphs": (None, True),
    "chat_template": ("t.jinja", "t.jinja"),
    "tool_call_parser": ("qwen25", "qwen25"),
    "reasoning_parser": ("deepseek-r1", "deepseek-r1"),
    "plugin": ("x", ("x",)),
    "no_plugin": ("x", ("x",)),
    "strict_plugins": (None, True),
    "log_level": ("debug", "debug"),
}
"""Field -> what is typed (None: a flag), and the value it must become."""


def read(*argv: str, environ: dict[str, str] | None = None, **settings: Any) -> Config:
    return read_config(argv, environ or {}, **settings)


def test_without_anything_every_field_has_its_default() -> None:
    assert read() == Config()


def test_no_field_is_without_a_test_here() -> None:
    covered = OPTIONS.keys() | {"plugin_options"}
    assert {field.name for field in msgspec.structs.fields(Config)} <= covered, "add the new field to OPTIONS"


@pytest.mark.parametrize("spelling", ["hyphens", "underscores", "equals", "environment", "file"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_can_be_given_in_every_way(name: str, spelling: str, tmp_path: Path) -> None:
    text, value = OPTIONS[name]
    option = "--" + name.replace("_", "-") if spelling == "hyphens" else f"--{name}"
    if spelling == "environment":
        config = read(environ={f"LIGHTLLM_{name.upper()}": "true" if text is None else text})
    elif spelling == "file":
        file = tmp_path / "config.toml"
        toml = {str: repr, int: str, bool: lambda v: str(v).lower(), tuple: lambda v: str(list(v))}[type(value)]
        file.write_text(f"{name} = {toml(value)}\n")
        config = read("--config", str(file))
    elif text is None:
        config = read(option)
    else:
        config = read(f"{option}={text}") if spelling == "equals" else read(option, text)
    assert config == msgspec.structs.replace(Config(), **{name: value})


def test_a_config_crosses_to_another_process() -> None:
    config = read("--max-model-len", "10", "--no-plugin", "a,b")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


def test_the_command_line_goes_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('port = 1\nhost = "file"\ndevice = "cpu"\nserved-model-name = "file"\n')
    environ = {"LIGHTLLM_PORT": "2", "LIGHTLLM_HOST": "environment", "LIGHTLLM_CONFIG": str(file)}
    config = read("--port", "3", "--served-model-name", "typed", environ=environ)
    assert (config.port, config.host, config.device, config.dtype) == (3, "environment", "cpu", "auto")
    assert config.served_model_name == ("typed",)


def test_an_empty_environment_variable_is_as_if_unset() -> None:
    assert read(environ={"LIGHTLLM_PORT": "", "LIGHTLLM_API_KEY": ""}) == Config()


@pytest.mark.parametrize("alias", ALIASES)
def test_lightllms_names_work(alias: str) -> None:
    field = ALIASES[alias].replace("-", "_")
    text, value = OPTIONS[field]
    assert getattr(read("--" + alias.replace("-", "_"), str(text)), field) == value


def test_lightllms_own_line_works() -> None:
    line = ["--model_dir", "DIR", "--port", "8088", "--tp", "1", "--tool_call_parser", "qwen25"]
    assert read(*line) == Config(model="DIR", port=8088, tp=1, tool_call_parser="qwen25")


def test_lightllms_own_line_answers_to_every_model_name_unless_one_was_given() -> None:
    assert read(lightllm_names=True).any_model_name
    assert not read("--model_name", "x", lightllm_names=True).any_model_name
    assert not read(lightllm_names=True, environ={"LIGHTLLM_SERVED_MODEL_NAME": "x"}).any_model_name
    assert not read("--no-any-model-name", lightllm_names=True).any_model_name
    assert read("--model_name", "x", "--any-model-name", lightllm_names=True).any_model_name
    assert not read().any_model_name


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [("fp32", "float32"), ("float32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16")],
)
def test_every_spelling_of_a_dtype_is_understood(spelling: str, dtype: str) -> None:
    assert read("--data_type", spelling).dtype == dtype
    assert read(environ={"LIGHTLLM_DTYPE": spelling}).dtype == dtype


def test_flags_can_be_switched_off_and_the_last_one_counts() -> None:
    assert not read("--no-prefix-cache").prefix_cache
    assert not read("--no_prefix_cache").prefix_cache
    assert read("--no-prefix-cache", "--prefix-cache").prefix_cache
    assert not read(environ={"LIGHTLLM_PREFIX_CACHE": "off"}).prefix_cache
    assert read("--prefix-cache", environ={"LIGHTLLM_PREFIX_CACHE": "0"}).prefix_cache


def test_lists_are_repeated_or_separated_by_commas() -> None:
    assert read("--no-plugin", "a", "--no_plugin", "b, c").no_plugin == ("a", "b", "c")
    assert read("--served-model-name=a", "--served-model-name=b").served_model_name == ("a", "b")


def test_only_option_names_are_respelt_never_values() -> None:
    assert read("--chat-template=--my_file").chat_template == "--my_file"
    assert read("--model", "my_model").model == "my_model"


def test_a_text_is_taken_as_it_is_typed() -> None:
    assert read("--api-key", "null").api_key == "null"
    assert read("--revision", "7").revision == "7"
    assert read(environ={"LIGHTLLM_API_KEY": "None"}).api_key == "None"


WRONG = {
    "null for a number": (["--max-model-len", "null"], "--max-model-len: 'null' is not a whole number at least 1"),
    "unknown option": (["--prot", "1"], "unknown option --prot. Did you mean --port?"),
    "unknown option with underscores": (
        ["--max_modle_len=1"],
        "unknown option --max_modle_len. Did you mean --max-model",
    ),
    "no shortening": (["--max-model", "1"], "unknown option --max-model."),
    "stray word": (["serve"], "unexpected argument 'serve'"),
    "no number": (["--port", "80a"], "--port: '80a' is not a whole number from 0 to 65535"),
    "too large": (["--port", "65536"], "--port: '65536' is not a whole number from 0 to 65535"),
    "negative": (["--tp", "-1"], "--tp: '-1' is not a whole number at least 1"),
    "not among the choices": (["--device", "gpu"], "--device: 'gpu' is not one of auto, cpu, cuda"),
    "no size": (["--kv-cache-memory", "4 cows"], "--kv-cache-memory: '4 cows' is not a size in bytes, such as 4GiB"),
    "empty": (["--api-key", ""], "--api-key: the value is empty"),
    "beyond any number": (["--kv-cache-memory", "9" * 400], "is not a size in bytes"),
    "empty list": (["--no-plugin", ","], "--no-plugin: the value is empty"),
    "missing value": (["--port"], "--port: expected one argument"),
    "value for a flag": (["--prefix-cache=no"], "ignored explicit argument 'no'"),
    "no such file": (["--config", "/no/such.toml"], "config file /no/such.toml: No such file or directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_on_the_command_line_is_one_clear_line(case: str) -> None:
    argv, message = WRONG[case]
    with pytest.raises(UsageError) as caught:
        read(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    with pytest.raises(UsageError, match=r"^LIGHTLLM_PORT: 'x' is not a whole number"):
        read(environ={"LIGHTLLM_PORT": "x"})
    with pytest.raises(UsageError, match=r"^LIGHTLLM_STRICT_PLUGINS: 'maybe' is not true or false"):
        read(environ={"LIGHTLLM_STRICT_PLUGINS": "maybe"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1", "config.toml: unknown key 'prot'. Did you mean port?"),
        ('port = "8000"', "config.toml: port: '8000' is not a whole number"),
        ("port = ", "config.toml is not TOML"),
        ("[server]\nport = 1", "unknown key 'server'"),
        ("plugin_options = {}", "unknown key 'plugin_options'"),
        ('dtype = ["bf16"]', "config.toml: dtype: ['bf16'] is not one of auto, bfloat16"),
        ("model = 3", "config.toml: model: 3 is not a text"),
        ('api_key = ""', "config.toml: api_key: the value is empty"),
        ('served_model_name = ["a", ""]', "config.toml: served_model_name: the value is empty"),
        ("plugin = []", "config.toml: plugin: the value is empty"),
    ],
)
def test_a_mistake_in_the_config_file_names_file_and_key(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(content)
    with pytest.raises(UsageError) as caught:
        read("--config", str(tmp_path / "config.toml"))
    assert message in str(caught.value)


def test_the_config_file_knows_both_spellings_and_lightllms_names(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model_dir = "m"\nmax-model-len = 5\ndata_type = "bf16"\nno-plugin = ["a"]')
    config = read("--config", str(tmp_path / "config.toml"))
    assert config == Config(model="m", max_model_len=5, dtype="bfloat16", no_plugin=("a",))


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in OPTIONS:
        assert f"--{name.replace('_', '-')}" in text
    assert "TCP port; 0 picks a free one (default: 8000)" in text
    assert "--model_dir" in text


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit):
        read("--version")
    assert capsys.readouterr().out == f"lightllm-serve {version('lightllm-serve')}\n"


# --- what must be known before plugins are loaded


def test_blocked_plugins_and_strictness_are_read_before_other_options_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('no_plugin = ["from-file"]\ntheir-option = 3\nport = "wrong"')
    argv = ["--their-option", "3", "--port", "wrong", "--strict_plugins", "--config", str(tmp_path / "config.toml")]
    assert read_plugin_choice(argv, {}) == (("from-file",), True, ())
    assert read_plugin_choice([*argv, "--no-plugin", "a"], {}) == (("a",), True, ())
    assert read_plugin_choice(["--help"], {}) == ((), False, ())
    given = read_plugin_choice(["--plugin", "a.b,x.py"], {}).given
    assert given == ("a.b", str(Path("x.py").absolute()))


# --- options of plugins


class Adds:
    """A plugin that adds one option."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.name, self.settings = name, settings

    @hookimpl
    def lightllm_add_options(self, group: OptionGroup) -> None:
        group.add(self.name, **self.settings)


def plugins(*extra: tuple[str, object]) -> Plugins:
    blocked = tuple(report.name for report in Plugins.discover(quiet=True).report())
    return Plugins.discover(Recipe(blocked=blocked), extra=extra)


def options(*argv: str, plugin: Adds, environ: dict[str, str] | None = None) -> dict[str, Any]:
    return read(*argv, environ=environ, plugins=plugins(("mine", plugin))).plugin_options


def test_a_plugins_option_is_given_in_every_way(tmp_path: Path) -> None:
    adds = Adds("--my-option", type=int, default=3, help="100% mine")
    (tmp_path / "config.toml").write_text("my-option = 6")
    assert options(plugin=adds) == {"my_option": 3}
    assert options("--my_option", "4", plugin=adds) == {"my_option": 4}
    assert options(plugin=adds, environ={"LIGHTLLM_MY_OPTION": "5"}) == {"my_option": 5}
    assert options("--config", str(tmp_path / "config.toml"), plugin=adds) == {"my_option": 6}


def test_a_plugins_option_is_checked_like_the_cores() -> None:
    with pytest.raises(UsageError, match="--my-option: 'x' is not a whole number"):
        options("--my-option", "x", plugin=Adds("--my-option", type=int))
    with pytest.raises(UsageError, match="--my-option: '9' is not a number less than 1"):
        options("--my-option", "9", plugin=Adds("--my-option", type=Annotated[float, msgspec.Meta(lt=1)], default=0.5))
    with pytest.raises(UsageError, match="--my-option: 'c' is not one of a, b"):
        options("--my-option", "c", plugin=Adds("--my-option", type=Literal["a", "b"]))


def test_a_plugins_flag_can_be_switched_on_and_off() -> None:
    adds = Adds("--my-flag", type=bool, default=True)
    assert options("--no-my-flag", plugin=adds) == {"my_flag": False}
    assert options(plugin=adds) == {"my_flag": True}


def test_a_plugins_option_shows_in_the_help_under_its_owner(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--help", plugin=Adds("--my-option", default="x", help="100% mine"))
    assert "plugin mine (extra):" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["--port", "--tool_call_parser", "--cache", "--config", "--help", "--version", "--model-dir"]
)
def test_an_option_that_clashes_with_the_core_names_both(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is added by plugin mine \(extra\).*belongs to lightllm-serve itself"):
        options(plugin=Adds(name))


@pytest.mark.parametrize(
    ("type", "wanted"),
    [
        (tuple[int, ...], "a list in which each item is a whole number"),
        (list[float], "a list in which each item is a number"),
        (tuple[Annotated[int, msgspec.Meta(ge=1, description="x")], ...], "each item is a whole number at least 1"),
        (tuple[Literal["b", "c"], ...], "a list in which each item is one of b, c"),
    ],
)
def test_what_a_list_must_hold_is_said(type: Any, wanted: str) -> None:
    with pytest.raises(UsageError, match=rf"--my-option: \['a'\] is not .*{wanted}"):
        options("--my-option", "a", plugin=Adds("--my-option", type=type))


def test_an_option_that_clashes_with_another_plugins_names_both() -> None:
    both = plugins(("one", Adds("--my-option")), ("two", Adds("--my_option")))
    with pytest.raises(UserError, match=r"added by plugin two \(extra\).*belongs to plugin one \(extra\)"):
        read(plugins=both)


def test_a_flags_opposite_clashes_too() -> None:
    with pytest.raises(UserError, match="belongs to lightllm-serve itself"):
        options(plugin=Adds("--no-prefix-cache"))
    with pytest.raises(UserError, match="belongs to lightllm-serve itself"):
        options(plugin=Adds("--plugin", type=bool, default=False))


@pytest.mark.parametrize(
    "adds", [Adds("my-option"), Adds("--My"), Adds("--x", type=int, default="three"), Adds("--x", type=Path)]
)
def test_an_option_that_cannot_be_breaks_its_plugin(adds: Adds) -> None:
    loaded = plugins(("mine", adds))
    assert read(plugins=loaded).plugin_options == {}
    (status,) = [report.status for report in loaded.report() if report.name == "mine"]
    assert status == "broken"


def test_an_unknown_option_quotes_the_broken_plugin_that_may_have_added_it() -> None:
    with pytest.raises(UsageError, match=r"unknown option --my-option\..*mine \(extra\) is broken"):
        options("--my-option", "3", plugin=Adds("wrong"))


def test_a_plugin_that_breaks_half_way_adds_no_option() -> None:
    class Half:
        @hookimpl
        def lightllm_add_options(self, group: OptionGroup) -> None:
            group.add("--first")
            raise OSError

    assert read(plugins=plugins(("half", Half()))).plugin_options == {}


# --- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("10B", 10),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("1.5G", 3 << 29),
        ("512MB", 512_000_000),
        ("512m", 512 << 20),
        ("2TiB", 2 << 40),
        ("2Gi", 2 << 30),
        ("3kB", 3000),
    ],
)
def test_sizes_are_read_as_gnu_coreutils_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "0.1", "1e9", "1 XB", "nan", "4GiBs", "4 i"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bytes"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_a_plain_number_is_itself(size: int) -> None:
    assert parse_size(str(size)) == size
