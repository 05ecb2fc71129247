"""The composition root: Config and Plugins become an engine (in its process) and a Litestar app (in the server's).

The only module that knows everyone. Heavy imports stay inside the functions of the process that needs them.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightllm.checks import blamed, describe
from lightllm.config import Config, parse_size
from lightllm.interfaces import (
    AttentionJob,
    Checkpoint,
    DeviceJob,
    Executor,
    ExecutorJob,
    GrammarBackend,
    LinearSummary,
    ModelInfo,
    UserError,
)
from lightllm.plugins import Plugins, Provided, Recipe
from lightllm.selection import adapters, choose, claimed_fields, model_record, serving_models, why_not

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as RawTokenizer

    from lightllm.chat import ChatTemplate
    from lightllm.engine.client import EngineClient
    from lightllm.engine.engine import Engine
    from lightllm.engine.grammars import Grammars
    from lightllm.engine.request import Loading
    from lightllm.engine.runner import Runner
    from lightllm.server.checker import GrammarChecker
    from lightllm.server.state import ServerState, Validator

log = logging.getLogger("lightllm")

DEFAULT_STEP_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens a step: enough to keep the matrix units busy, few enough that decodes are not held up long."""

CPU_CACHE_BYTES = 4 << 30
GPU_MEMORY_SHARE = 0.9
STEP_HEADROOM_BYTES = 1 << 30
"""Left free on a GPU for activations and logits."""


LARGEST_GRAPH = 256
"""Sequences. With more, the device should take longer to compute a step than Python takes to start its kernels."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process is handed: enough to build everything itself, on any machine."""

    config: Config
    recipe: Recipe
    path: str


# ---------------------------------------------------------------------------------------------------------------------
# Both processes


def open_checkpoint(plugins: Plugins, path: Path) -> tuple[Provided, Checkpoint, ModelInfo]:
    """The first weight format that recognises the files, and what it and the model's plugin say of them."""
    reasons = []
    for provided in plugins.records("weight_formats"):
        reason = why_not(plugins, provided, path)
        if reason is None:
            with blamed(f"the weight format {provided.label}"):
                target = plugins.load(provided, provided.record.checkpoint)
                checkpoint: Checkpoint = target(path, adapters(plugins, provided))
                return provided, checkpoint, _completed(plugins, checkpoint.info())
        reasons.append(f"{provided.record.name}: {reason}")
    raise UserError(f"{path} holds no model that any weight format can read ({'; '.join(reasons)})")


def _completed(plugins: Plugins, info: ModelInfo) -> ModelInfo:
    serving = serving_models(plugins, info)
    if len(serving) != 1 or serving[0].record.complete is None:
        return info  # where there is not one, `model_record` will say so
    with blamed(serving[0].label):
        completed: ModelInfo = serving[0].record.complete(info)
    return completed


def _grammar_backend(
    config: Config, plugins: Plugins, tokenizer: RawTokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> tuple[GrammarBackend, str]:
    """It, and whom to blame for what it raises."""
    provided = choose(plugins, "grammar_backends", config.grammar_backend)
    target, name = plugins.load(provided), f"the grammar backend {provided.label}"
    with blamed(name):
        return target(tokenizer, vocab_size, eos_token_ids), name


# ---------------------------------------------------------------------------------------------------------------------
# The engine process


def run_engine(argv: list[str]) -> int:
    """``argv``: the private directory shared with the server process."""
    from lightllm.engine import process

    directory = Path(argv[0])
    start = msgspec.msgpack.decode((directory / process.START).read_bytes(), type=Start)
    configure_logging(start.config)

    def build(report: Callable[[Loading], None]) -> Engine:
        return build_engine(start.config, Plugins.discover(start.recipe, quiet=True), Path(start.path), report)

    return process.run(directory, build)


def build_engine(
    config: Config, plugins: Plugins, path: Path, report: Callable[[Loading], None] = lambda _: None
) -> Engine:
    """Load the model and size everything around it. Raises UserError for what the user can mend, `Wrong` for what a
    plugin has to."""
    from lightllm.engine.engine import Engine
    from lightllm.engine.grammars import Grammars
    from lightllm.engine.kvcache import KVCache
    from lightllm.engine.scheduler import Scheduler

    weight_format, checkpoint, info = open_checkpoint(plugins, path)
    vocab_size: int = info.config["vocab_size"]
    eos_token_ids = tuple(id for id in info.eos_token_ids() if 0 <= id < vocab_size)  # others the model never writes
    # made when it is first needed: most servers never do
    grammars = Grammars(lambda: _grammar_backend(config, plugins, checkpoint.tokenizer(), vocab_size, eos_token_ids))
    device = _device(config)
    job = ExecutorJob(world_size=config.tp, device=device.type)
    provided = choose(plugins, "executors", config.executor, job)
    make_executor = plugins.load(provided)

    def build() -> Runner:
        with blamed("building the model"):
            return _build_worker(config, plugins, weight_format, info, path, device, grammars, report)

    name = f"the executor {provided.label}"
    with blamed(name):
        executor: Executor = make_executor(job, build)
    ready = executor.ready
    scheduler = Scheduler(
        KVCache(ready.total_slots, prefix_cache=config.prefix_cache),
        max_batch_tokens=config.max_batch_tokens or DEFAULT_STEP_TOKENS[device.type],
        max_running=config.max_running_requests,
        max_model_len=ready.max_model_len,
        eos_token_ids=eos_token_ids,
    )
    return Engine(scheduler, executor, grammars, name)


def _build_worker(
    config: Config,
    plugins: Plugins,
    weight_format: Provided,
    info: ModelInfo,
    path: Path,
    device: torch.device,
    grammars: Grammars,
    report: Callable[[Loading], None],
) -> Runner:
    """The model with all it needs to compute a step."""
    import torch

    from lightllm.engine.inputs import Rows
    from lightllm.engine.masks import Masks
    from lightllm.engine.request import Loading, Ready
    from lightllm.engine.runner import Runner
    from lightllm.nn.batch import KVPool
    from lightllm.nn.layers import Linear, Make
    from lightllm.nn.weights import count_parameters, load_weights

    names: dict[type, str] = {}

    def make(kind: str, provided: Provided, *arguments: Any) -> Any:
        """An object of a plugin's; from here on ``names`` knows whose it is."""
        target = plugins.load(provided)
        with blamed(f"the {kind} {provided.label}"):
            made = target(*arguments)
        names[type(made)] = f"the {kind} {provided.label}"
        return made

    record = model_record(plugins, info)
    dtype = _dtype(config, info, device)
    method = choose(plugins, "linear_methods", config.quantization, info)
    report(Loading(stage="importing the model"))

    dtype_name = str(dtype).removeprefix("torch.")
    here = DeviceJob(device=device.type, dtype=dtype_name)
    layers = Make(
        dtype=dtype,
        device=device,
        linear_method=lambda: make("linear method", method, info),
        operators=make("operators", choose(plugins, "operators", config.operators, here)),
    )
    with torch.inference_mode():
        model = make("model", record, info, layers)
        parameters = count_parameters(model)
        source = make("weight format", weight_format, path, info, adapters(plugins, weight_format))
        with blamed(f"loading the weights with {weight_format.label}"):
            load_weights(
                model, source, lambda done, total: report(Loading(stage="loading weights", done=done, total=total))
            )
    model.eval()

    specs = layers.attention_layers
    max_model_len, slots = _sizes(config, info, device, KVPool.bytes_per_token(specs, dtype))
    pool = KVPool(specs, slots, dtype, device)
    job = AttentionJob(layers=tuple(specs), device=device.type, dtype=dtype_name, max_model_len=max_model_len)
    backend = choose(plugins, "attention_backends", config.attention_backend, job)
    attention = make("attention backend", backend, job, pool)
    sampler = make("sampler", choose(plugins, "samplers", config.sampler, here))
    claims = claimed_fields(plugins)
    made = {id(provided.record): make("logits processor", provided, info) for provided in claims.values()}
    processors = {field: made[id(provided.record)] for field, provided in claims.items()}
    vocab_size: int = info.config["vocab_size"]
    pool_bytes = KVPool.bytes_per_token(specs, dtype) * slots
    summary = [
        f"model: {info.architecture} ({record.label}), {parameters:,} parameters, {dtype_name} on {device}",
        f"KV cache: {slots:,} tokens ({pool_bytes / 2**30:.2f} GiB), "
        f"{slots / max_model_len:.1f} requests of the full {max_model_len:,} tokens",
    ]
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    said = (one.method.summary(one) for one in linears if isinstance(one.method, LinearSummary))
    held = Counter(how for how in said if how)
    if held:
        summary.append(f"linear layers: {', '.join(f'{count} {how}' for how, count in held.most_common())}")
    ready = Ready(
        max_model_len=max_model_len,
        total_slots=slots,
        vocab_size=vocab_size,
        overlap=config.overlap and device.type == "cuda" and sampler.overlaps,
        summary=summary,
    )
    rows = Rows(config.max_running_requests, max_model_len, slots, device)
    masks = Masks(grammars, vocab_size, device)
    runner = Runner(ready, model, layers.operators, attention, sampler, processors, masks, rows, device, names)
    if device.type == "cuda":
        report(Loading(stage="compiling kernels"))
        runner.warm()
        if config.cuda_graphs and attention.capturable:
            summary.append(_capture(runner, config, lambda n, of: report(Loading(stage="capturing", done=n, total=of))))
    return runner


def _capture(runner: Runner, config: Config, progress: Callable[[int, int], None]) -> str:
    """A line about it. A model that cannot be captured runs all the same."""
    import time

    import torch

    from lightllm.engine.graphs import CudaCapture, batch_sizes

    sizes = batch_sizes(min(config.max_running_requests, LARGEST_GRAPH))
    begin, free = time.monotonic(), torch.cuda.mem_get_info()[0]
    try:
        runner.capture(sizes, CudaCapture(), progress)
    except Exception as error:
        log.debug("a step cannot be captured", exc_info=error)
        return f"CUDA graphs: none, a step cannot be captured ({describe(error)})"
    taken = (free - torch.cuda.mem_get_info()[0]) / 2**30
    return f"CUDA graphs: {len(sizes)} batch sizes up to {sizes[-1]}, {taken:.2f} GiB, {time.monotonic() - begin:.1f} s"


def _device(config: Config) -> torch.device:
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def _dtype(config: Config, info: ModelInfo, device: torch.device) -> torch.dtype:
    import torch

    name: str = config.dtype
    if name != "auto":
        pass
    elif device.type == "cpu":
        name = "float32"
    else:
        name = str(info.get("dtype", info.get("torch_dtype", "bfloat16")))
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = torch.bfloat16
    return dtype


def _sizes(config: Config, info: ModelInfo, device: torch.device, token_bytes: int) -> tuple[int, int]:
    """The longest request and the KV cache's slots."""
    from lightllm.nn.rope import context_length

    reach = context_length(info)
    asked = config.max_model_len
    if asked is not None and reach and asked > reach:
        raise UserError(f"--max-model-len {asked:,} is beyond the model's own {reach:,} tokens")
    max_model_len = asked or reach or 4096
    slots = _pool_slots(config, token_bytes, device, max_model_len)
    if slots >= max_model_len:
        return max_model_len, slots
    if asked is not None:
        raise UserError(
            f"the KV cache holds {slots:,} tokens, fewer than --max-model-len {asked:,}: "
            "lower that, or raise --kv-cache-memory or --max-total-tokens"
        )
    log.warning("the KV cache holds %s tokens: requests are limited to that many", f"{slots:,}")
    return slots, slots


def _pool_slots(config: Config, token_bytes: int, device: torch.device, max_model_len: int) -> int:
    """How many tokens the KV cache holds: as told, else from the memory that is free."""
    import psutil
    import torch

    if config.max_total_tokens is not None:
        slots = config.max_total_tokens
        size = slots * token_bytes
    elif config.kv_cache_memory is not None:
        size = parse_size(config.kv_cache_memory)
        slots = size // token_bytes
    else:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            size = int(free - (1 - GPU_MEMORY_SHARE) * total) - STEP_HEADROOM_BYTES
        else:
            size = min(psutil.virtual_memory().available // 2, CPU_CACHE_BYTES)
        slots = min(max(size, 0) // token_bytes, config.max_running_requests * max_model_len)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if size > free:
        raise UserError(
            f"the KV cache would take {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: "
            "lower --kv-cache-memory or --max-total-tokens"
        )
    if slots < 2:
        raise UserError(f"no memory for a KV cache: a token takes {token_bytes:,} bytes; lower the other memory users")
    return slots


# ---------------------------------------------------------------------------------------------------------------------
# The process that checks grammars


def check_grammars() -> int:
    from lightllm.server.checker import serve_checks

    def make(message: bytes) -> GrammarBackend:
        start = msgspec.msgpack.decode(message, type=Start)
        configure_logging(start.config)
        plugins = Plugins.discover(start.recipe, quiet=True)
        logging.getLogger("lightllm").setLevel("WARNING")  # what is chosen, the engine says
        return _grammar_backend(start.config, plugins, None, 0, ())[0]

    serve_checks(make)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The server process


def serve(config: Config, plugins: Plugins) -> int:
    """Resolve the model, start the engine, serve until told to stop; the exit code. Raises UserError.

    Whatever can be found out without the engine is found out before it is started.
    """
    from lightllm.engine.client import EngineClient
    from lightllm.server.checker import GrammarChecker
    from lightllm.server.run import LoadingBar, address, listen, run

    configure_logging(config)
    with listen(config.host, config.port) as sock, LoadingBar() as bar:
        path = plugins.resolve_model(config.model, config.revision, config)
        _, checkpoint, info = open_checkpoint(plugins, path)
        _check_choices(config, plugins, info)
        start = Start(config=config, recipe=plugins.recipe, path=str(path))
        engine = EngineClient(msgspec.msgpack.encode(start), bar.show)
        try:
            engine.launch()  # it loads while this process imports and builds the rest
            checker = GrammarChecker(
                [sys.executable, "-m", "lightllm", "check-grammars"], msgspec.msgpack.encode(start)
            )
            state = _server_state(config, plugins, checkpoint, info, engine, checker)

            def ready() -> None:
                assert engine.ready is not None
                for line in engine.ready.summary:
                    log.info("%s", line)
                log.info("%s is served on %s", state.model_names[0], address(sock))

            from lightllm.server.app import create_app

            return run(create_app(state), engine, checker, sock, ready)
        finally:
            engine.close()


def _check_choices(config: Config, plugins: Plugins, info: ModelInfo) -> None:
    """Everything that was asked for by name exists."""
    model_record(plugins, info)
    for kind, name in (
        ("attention_backends", config.attention_backend),
        ("operators", config.operators),
        ("samplers", config.sampler),
        ("linear_methods", config.quantization),
        ("grammar_backends", config.grammar_backend),
        ("executors", config.executor),
    ):
        if name != "auto":
            plugins.find(kind, name)


def _server_state(
    config: Config,
    plugins: Plugins,
    checkpoint: Checkpoint,
    info: ModelInfo,
    engine: EngineClient,
    checker: GrammarChecker,
) -> ServerState:
    from lightllm.server.plugin_parts import named_lifespan, plugin_router
    from lightllm.server.protocol import REQUEST_FIELDS
    from lightllm.server.state import ServerState
    from lightllm.tokenizer import Tokenizer

    claims = claimed_fields(plugins)
    for name in claims.keys() & REQUEST_FIELDS:
        raise UserError(f"{claims[name].label} claims the request field {name!r}, which is the server's own")

    tokenizer = checkpoint.tokenizer()
    tool_parser = choose_tool_parser(config, plugins, info, tokenizer)
    reasoning_parser = plugins.find("reasoning_parsers", config.reasoning_parser) if config.reasoning_parser else None
    return ServerState(
        config=config,
        engine=engine,
        tokenizer=Tokenizer(tokenizer, bos_token=info.bos_token, eos_token=info.eos_token),
        info=info,
        checker=checker,
        model_names=_model_names(config),
        chat_template=_chat_template(config, plugins, info),
        tool_parser=plugins.load(tool_parser) if tool_parser else None,
        reasoning_parser=plugins.load(reasoning_parser) if reasoning_parser else None,
        tool_parser_name=f"the tool parser {tool_parser.label}" if tool_parser else "",
        reasoning_parser_name=f"the reasoning parser {reasoning_parser.label}" if reasoning_parser else "",
        claims=_validators(claims),
        listeners=[
            msgspec.structs.replace(listener, name=f"the listener {listener.name} of plugin {plugin.label}")
            for plugin, listener in plugins.listeners(config)
        ],
        routes=[plugin_router(plugin.label, routes) for plugin, routes in plugins.routes(config)],
        lifespans=[named_lifespan(plugin.label, context) for plugin, context in plugins.lifespans(config)],
    )


def _validators(claims: Mapping[str, Provided]) -> dict[str, Validator | None]:
    """What each claimed field is checked by; one function for all the fields of a record."""

    def named(provided: Provided) -> Validator | None:
        validate = provided.record.validate
        if validate is None:
            return None

        def call(fields: Mapping[str, Any]) -> str | None:
            with blamed(f"the logits processor {provided.label}"):
                answer: str | None = validate(fields)
                return answer

        return call

    made = {provided.address: named(provided) for provided in claims.values()}
    return {field: made[provided.address] for field, provided in claims.items()}


def choose_tool_parser(config: Config, plugins: Plugins, info: ModelInfo, tokenizer: RawTokenizer) -> Provided | None:
    """None where it is switched off, or where none fits under ``auto``."""
    if config.tool_call_parser == "none":
        return None
    tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    try:
        return choose(plugins, "tool_parsers", config.tool_call_parser, info, tokens)
    except UserError as error:
        if config.tool_call_parser != "auto":
            raise
        log.warning("%s", error)
        return None


def _model_names(config: Config) -> tuple[str, ...]:
    """What clients may call the model: what was said, else the file's or folder's name, and ``--model`` as given."""
    if config.served_model_name:
        return config.served_model_name
    path = Path(config.model)
    name = path.resolve().name if path.exists() else config.model
    return tuple(dict.fromkeys((name, config.model)))


def _chat_template(config: Config, plugins: Plugins, info: ModelInfo) -> ChatTemplate | None:
    from lightllm.chat import ChatTemplate

    source: str | None
    if config.chat_template:
        try:
            source = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {config.chat_template}: it cannot be read: {error}") from None
    else:
        source = plugins.choose_chat_template(info, config) or info.chat_template
    return ChatTemplate(source, info.bos_token, info.eos_token) if source else None


def configure_logging(config: Config) -> None:
    """Our own log lines on stderr; other libraries' from warnings on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level="WARNING")
    logging.getLogger("lightllm").setLevel(config.log_level.upper())
    logging.getLogger("lightllm_builtin").setLevel(config.log_level.upper())
