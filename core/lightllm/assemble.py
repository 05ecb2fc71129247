"""The composition root: Config and Plugins become an engine (in its process) and a Litestar app (in the server's).

The only module that knows everyone. Heavy imports stay inside the functions of the process that needs them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightllm.config import Config, parse_size
from lightllm.interfaces import Adapters, AttentionJob, Checkpoint, GrammarBackend, LogitsProcessor, ModelInfo, UserError
from lightllm.plugins import Plugins, Provided, Recipe

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as RawTokenizer

    from lightllm.chat import ChatTemplate
    from lightllm.engine.client import EngineClient
    from lightllm.engine.engine import Engine
    from lightllm.engine.request import Loading
    from lightllm.server.checker import GrammarChecker
    from lightllm.server.state import ServerState

log = logging.getLogger("lightllm")

DEFAULT_STEP_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens a step: enough to keep the matrix units busy, few enough that decodes are not held up long."""

CPU_CACHE_BYTES = 4 << 30
GPU_MEMORY_SHARE = 0.9
STEP_HEADROOM_BYTES = 1 << 30
"""Left free on a GPU for activations and logits."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process is handed: enough to build everything itself, on any machine."""

    config: Config
    recipe: Recipe
    path: str


# ---------------------------------------------------------------------------------------------------------------------
# Both processes


def open_checkpoint(plugins: Plugins, path: Path) -> tuple[Provided, Checkpoint, ModelInfo]:
    """The first weight format that recognises the files, and what it says of them."""
    reasons = []
    for provided in plugins.records("weight_formats"):
        reason = provided.record.matches(path)
        if reason is None:
            checkpoint: Checkpoint = plugins.load(provided, provided.record.checkpoint)(
                path, adapters(plugins, provided)
            )
            return provided, checkpoint, checkpoint.info()
        reasons.append(f"{provided.record.name}: {reason}")
    raise UserError(f"{path} holds no model that any weight format can read ({'; '.join(reasons)})")


def adapters(plugins: Plugins, weight_format: Provided) -> Adapters:
    """What model plugins bring along for this weight format."""

    def adapter(name: str) -> Any:
        wanted = f"{weight_format.record.name}/{name}"
        bringing = [p for p in plugins.records("models") if wanted in p.record.adapters]
        if len(bringing) > 1:
            raise UserError(f"several plugins read {wanted}: {', '.join(p.label for p in bringing)}; use --no-plugin")
        return plugins.load(bringing[0], bringing[0].record.adapters[wanted]) if bringing else None

    return adapter


def claimed_fields(plugins: Plugins) -> dict[str, Provided]:
    """Request field -> the logits processor that claims it. Two claims on one field are an error naming both."""
    claims: dict[str, Provided] = {}
    for provided in plugins.records("logits_processors"):
        for name in provided.record.fields:
            if name in claims:
                raise UserError(f"{claims[name].label} and {provided.label} both claim the request field {name!r}")
            claims[name] = provided
    return claims


def model_record(plugins: Plugins, info: ModelInfo) -> Provided:
    """The model plugin for this architecture. Raises UserError when there is none, or several."""
    serving = [p for p in plugins.records("models") if info.architecture in p.record.architectures]
    if len(serving) == 1:
        return serving[0]
    if serving:
        raise UserError(
            f"several plugins serve {info.architecture}: {', '.join(p.label for p in serving)}; use --no-plugin"
        )
    known = sorted({a for p in plugins.records("models") for a in p.record.architectures})
    raise UserError(
        f"{info.path}: no model plugin serves the architecture {info.architecture!r}. Served: {', '.join(known)}."
        + plugins.broken_note()
    )


def linear_method(plugins: Plugins, config: Config) -> Provided:
    return plugins.find("linear_methods", config.quantization or "dense")


def _grammar_backend(
    config: Config, plugins: Plugins, tokenizer: RawTokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> GrammarBackend:
    target = plugins.load(_best(plugins, "grammar_backends", config.grammar_backend))
    backend: GrammarBackend = target(tokenizer, vocab_size, eos_token_ids)
    return backend


def _best(plugins: Plugins, kind: str, name: str) -> Provided:
    if name != "auto":
        return plugins.find(kind, name)
    candidates = plugins.records(kind)
    if not candidates:
        raise UserError(f"no plugin provides {kind.replace('_', ' ')}")
    return max(candidates, key=lambda p: p.record.priority)


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
    """Load the model and size everything around it. Raises UserError for what the user can mend."""
    import torch

    from lightllm.engine.engine import Engine
    from lightllm.engine.grammars import Grammars
    from lightllm.engine.kvcache import KVCache
    from lightllm.engine.masks import Masks
    from lightllm.engine.request import Loading, Ready
    from lightllm.engine.runner import Runner
    from lightllm.engine.scheduler import Scheduler
    from lightllm.nn.batch import KVPool
    from lightllm.nn.layers import Make
    from lightllm.nn.weights import load_weights

    format_record, checkpoint, info = open_checkpoint(plugins, path)
    record = model_record(plugins, info)
    device = _device(config)
    dtype = _dtype(config, info, device)
    method = plugins.load(linear_method(plugins, config))
    report(Loading(stage="importing the model"))

    make = Make(dtype=dtype, device=device, linear_method=method)
    with torch.inference_mode():
        model = plugins.load(record)(info, make)
        parameters = sum(p.numel() for p in model.parameters())
        source = plugins.load(format_record)(path, info, adapters(plugins, format_record))
        load_weights(
            model, source, lambda done, total: report(Loading(stage="loading weights", done=done, total=total))
        )
    model.eval()

    max_model_len = _max_model_len(config, info)
    slots = _pool_slots(config, KVPool.bytes_per_token(make.attention_layers, dtype), device, max_model_len)
    if slots < max_model_len:
        if config.max_model_len is not None:
            raise UserError(
                f"the KV cache holds {slots:,} tokens, fewer than --max-model-len {max_model_len:,}: "
                "lower that, or raise --kv-cache-memory or --max-total-tokens"
            )
        log.warning("the KV cache holds %s tokens: requests are limited to that many", f"{slots:,}")
        max_model_len = slots
    pool = KVPool(make.attention_layers, slots, dtype, device)

    job = AttentionJob(
        layers=tuple(make.attention_layers),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
    )
    backend = _attention_backend(config, plugins, job)
    sampler = _best(plugins, "samplers", config.sampler)
    claimed_fields(plugins)  # no two plugins on one field
    processors: dict[str, LogitsProcessor] = {}
    for provided in plugins.records("logits_processors"):
        processors |= dict.fromkeys(provided.record.fields, plugins.load(provided)(info))
    vocab_size: int = info.config["vocab_size"]
    eos_token_ids = info.eos_token_ids()
    # made when it is first needed: most servers never do
    grammars = Grammars(lambda: _grammar_backend(config, plugins, checkpoint.tokenizer(), vocab_size, eos_token_ids))
    masks = Masks(grammars, vocab_size, device)
    runner = Runner(model, plugins.load(backend)(job, pool), plugins.load(sampler)(), processors, masks, device)
    scheduler = Scheduler(
        KVCache(slots, prefix_cache=config.prefix_cache),
        max_batch_tokens=config.max_batch_tokens or DEFAULT_STEP_TOKENS[device.type],
        max_running=config.max_running_requests,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
    )
    pool_bytes = KVPool.bytes_per_token(make.attention_layers, dtype) * slots
    summary = [
        f"model: {info.architecture} ({record.label}), {parameters:,} parameters, "
        f"{str(dtype).removeprefix('torch.')} on {device}",
        f"attention: {backend.label}; sampler: {sampler.label}",
        f"KV cache: {slots:,} tokens ({pool_bytes / 2**30:.2f} GiB), "
        f"{slots / max_model_len:.1f} requests of the full {max_model_len:,} tokens",
    ]
    ready = Ready(max_model_len=max_model_len, total_slots=slots, vocab_size=vocab_size, summary=summary)
    return Engine(scheduler, runner, grammars, ready)


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


def _max_model_len(config: Config, info: ModelInfo) -> int:
    from lightllm.nn.rope import context_length

    reach = context_length(info)
    if config.max_model_len is None:
        return reach or 4096
    if reach and config.max_model_len > reach:
        raise UserError(f"--max-model-len {config.max_model_len:,} is beyond the model's own {reach:,} tokens")
    return config.max_model_len


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


def _attention_backend(config: Config, plugins: Plugins, job: AttentionJob) -> Provided:
    if config.attention_backend != "auto":
        chosen = plugins.find("attention_backends", config.attention_backend)
        reason = chosen.record.supports(job) if chosen.record.supports else None
        if reason is not None:
            raise UserError(f"--attention-backend {config.attention_backend}: {reason}")
        return chosen
    records = plugins.records("attention_backends")
    return _first_fit("attention backend", records, lambda r: r.supports(job) if r.supports else None)


def _first_fit(what: str, candidates: Sequence[Provided], why_not: Callable[[Any], str | None]) -> Provided:
    """The first by priority that has no reason why not; logged with the reasons of those before it."""
    passed: list[str] = []
    for candidate in sorted(candidates, key=lambda p: -p.record.priority):
        reason = why_not(candidate.record)
        if reason is None:
            log.info("%s %s chosen%s", what, candidate.label, f" ({'; '.join(passed)})" if passed else "")
            return candidate
        passed.append(f"not {candidate.label}: {reason}")
    raise UserError(f"no {what} can serve this model: {'; '.join(passed) or 'none is installed'}")


# ---------------------------------------------------------------------------------------------------------------------
# The process that checks grammars


def check_grammars() -> int:
    from lightllm.server.checker import serve_checks

    def make(message: bytes) -> GrammarBackend:
        start = msgspec.msgpack.decode(message, type=Start)
        configure_logging(start.config)
        return _grammar_backend(start.config, Plugins.discover(start.recipe, quiet=True), None, 0, ())

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
    if config.tp != 1:
        raise UserError(f"--tp {config.tp}: tensor parallelism is not there yet, only --tp 1")
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
    linear_method(plugins, config)
    for kind, name in (
        ("attention_backends", config.attention_backend),
        ("samplers", config.sampler),
        ("grammar_backends", config.grammar_backend),
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
        claims={name: provided.record.validate for name, provided in claims.items()},
        listeners=[listener for _, listener in plugins.listeners(config)],
        routes=plugins.routes(config),
        lifespans=plugins.lifespans(config),
    )


def choose_tool_parser(config: Config, plugins: Plugins, info: ModelInfo, tokenizer: RawTokenizer) -> Provided | None:
    """None where it is switched off, or where none fits under ``auto``."""
    if config.tool_call_parser == "none":
        return None
    if config.tool_call_parser != "auto":
        return plugins.find("tool_parsers", config.tool_call_parser)
    tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    candidates = [p for p in plugins.records("tool_parsers") if p.record.matches]
    try:
        return _first_fit("tool parser", candidates, lambda record: record.matches(info, tokens))
    except UserError as error:
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
