"""What the core and its plugins say to each other: records, contracts and plain data.

A hook returns *records*: frozen, with a name and a lazy ``"module:attr"`` target that is imported only when chosen.
A target fulfils a *contract*: one of the Protocols below. Importing this module imports no torch and no web framework.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import msgspec

from lightllm.grammar import Grammar

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as RawTokenizer

    from lightllm.engine.request import Ready, SamplingParams
    from lightllm.engine.scheduler import Plan, Result
    from lightllm.nn.batch import Batch, History, KVPool
    from lightllm.nn.layers import Linear, Make


class UserError(Exception):
    """Something the person at the command line can mend. Shown as one line, never as a traceback."""


class WorkerLost(Exception):
    """A worker or its device cannot go on. The engine process ends, and the server starts another."""


# ---------------------------------------------------------------------------------------------------------------------
# Plain data


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint says of itself, in Hugging Face's terms whatever the file format.

    ``config`` is config.json (or its equivalent), ``generation`` generation_config.json (may be empty).
    """

    path: str
    architecture: str
    config: dict[str, Any]
    generation: dict[str, Any] = {}
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None

    def get(self, key: str, default: Any = None) -> Any:
        """A field of config.json; ``default`` where it is absent or null."""
        value = self.config.get(key)
        return default if value is None else value

    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: generation_config.json's, else config.json's; one id or several."""
        for source in (self.generation, self.config):
            ids = source.get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (int(ids),)
        return ()


class AttentionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One attention layer as this rank sees it. ``window``: a token sees itself and the ``window - 1`` before it.
    ``softcap``: scores s become ``softcap * tanh(s / softcap)`` before the softmax."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionJob(msgspec.Struct, frozen=True, kw_only=True):
    """What an attention backend is asked to do. ``device`` is a torch device type, ``dtype`` a torch dtype's name."""

    layers: tuple[AttentionSpec, ...]
    device: str
    dtype: str
    max_model_len: int


class DeviceJob(msgspec.Struct, frozen=True, kw_only=True):
    """Where operators and samplers are asked to work: a torch device type, and the dtype's name of the model."""

    device: str
    dtype: str


class ExecutorJob(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor is asked to do. ``world_size``: tensor-parallel ranks (``--tp``), ``device``: torch's name."""

    world_size: int
    device: str


# ---------------------------------------------------------------------------------------------------------------------
# Records: what hooks return


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """``name`` is what users type, ``target`` a ``"module:attr"``, ``summary`` a line for `lightllm-serve plugins`."""

    name: str
    target: str
    summary: str = ""


class ModelRecord(Record, frozen=True, kw_only=True):
    """A model architecture. Target: a `Model`. ``architectures``: the names it serves in config.json's list.

    ``adapters`` tells weight formats that do not keep to Hugging Face's terms how they hold this model:
    ``"format/name"`` (what that format calls the architecture) -> the ``"module:attr"`` of what the format asks for,
    such as ``{"gguf/qwen2": "my_qwen2.gguf:Adapter"}``. Imported in both processes, so without torch.

    ``complete`` gives the checkpoint's info back with what its config leaves to the model: defaults, older spellings,
    the text model's part of a config of several. The core itself reads ``vocab_size``, ``max_position_embeddings``, the
    RoPE fields, ``eos_token_id`` and ``dtype``. Raises `UserError` for what is not supported. Called in both processes.
    """

    architectures: tuple[str, ...]
    adapters: Mapping[str, str] = {}
    complete: Callable[[ModelInfo], ModelInfo] | None = None


class AttentionBackendRecord(Record, frozen=True, kw_only=True):
    """Target: an `AttentionBackend`. ``supports`` answers None, or why this job cannot be done.

    Under ``--attention-backend auto`` the highest ``priority`` that supports the job is chosen.
    """

    supports: Callable[[AttentionJob], str | None] | None = None
    priority: int = 0


class OperatorsRecord(Record, frozen=True, kw_only=True):
    """Target: `Operators`. ``supports`` answers None, or why this job cannot be done.

    Under ``--operators auto`` the highest ``priority`` that supports the job is chosen.
    """

    supports: Callable[[DeviceJob], str | None] | None = None
    priority: int = 0


class SamplerRecord(Record, frozen=True, kw_only=True):
    """Target: a `Sampler`. ``supports`` answers None, or why this job cannot be done.

    Under ``--sampler auto`` the highest ``priority`` that supports the job is chosen.
    """

    supports: Callable[[DeviceJob], str | None] | None = None
    priority: int = 0


class LogitsProcessorRecord(Record, frozen=True, kw_only=True):
    """Target: a `LogitsProcessor`. ``fields``: the extra request fields it claims; it sees requests that set one.

    ``validate`` is given those that a request sets and answers None, or why not, which becomes the client's 400. It is
    called in the server process, so it must not import torch.
    """

    fields: tuple[str, ...]
    validate: Callable[[Mapping[str, Any]], str | None] | None = None


class ToolParserRecord(Record, frozen=True, kw_only=True):
    """Target: a `ToolParser`, which may also be a `CallGrammar` and a `CallIds`.

    Under ``--tool-call-parser auto`` the highest ``priority`` that ``matches`` is chosen. ``matches`` is given the
    model and the texts of its tokenizer's added tokens; it answers None when this is how the model writes calls, else
    the reason why not. A record without it is never chosen by itself.
    """

    matches: Callable[[ModelInfo, Collection[str]], str | None] | None = None
    priority: int = 0


class ReasoningParserRecord(Record, frozen=True, kw_only=True):
    """Target: a `ReasoningParser`, which may also be a `ReasoningGrammar`."""


class GrammarBackendRecord(Record, frozen=True, kw_only=True):
    """Target: a `GrammarBackend`. Under ``--grammar-backend auto`` the highest ``priority`` is chosen."""

    priority: int = 0


class WeightFormatRecord(Record, frozen=True, kw_only=True):
    """A checkpoint format. Target: a `WeightFormat` (may use torch). ``checkpoint``: the ``"module:attr"`` of its
    `Checkpoint`, which the server process reads, so it must not import torch. ``matches`` answers None when this is
    its format, else the reason why not.
    """

    checkpoint: str
    matches: Callable[[Path], str | None]


class LinearMethodRecord(Record, frozen=True, kw_only=True):
    """Target: a `LinearMethod`: how linear layers hold and multiply their weights (``--quantization NAME``).

    Under ``--quantization auto`` the highest ``priority`` that ``matches`` is chosen: it answers None when this
    checkpoint is held this way, else the reason why not. A record without it is never chosen by itself.
    """

    matches: Callable[[ModelInfo], str | None] | None = None
    priority: int = 0


class ExecutorRecord(Record, frozen=True, kw_only=True):
    """Target: an `Executor`. ``supports`` answers None, or why this job cannot be done.

    Under ``--executor auto`` the highest ``priority`` that supports the job is chosen.
    """

    supports: Callable[[ExecutorJob], str | None] | None = None
    priority: int = 0


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """Told of every request that the engine gets, in the server process, between two events of its loop: be quick.

    ``on_request`` gets a dict of ``id``, ``endpoint``, ``model``, ``stream``, ``n``, ``created`` (Unix time),
    ``prompt_tokens`` and ``request``, the body as it was sent. ``on_finish`` gets these, and ``status`` (ok, error or
    aborted), ``error``, ``finish_reasons`` and ``answers`` (a text a choice, calls and thoughts as the model wrote
    them), ``completion_tokens``, ``cached_tokens``, ``time_to_first_token`` and ``duration`` in seconds. Neither
    may be changed. What a listener raises is logged.
    """

    name: str
    on_request: Callable[[Mapping[str, Any]], None] | None = None
    on_finish: Callable[[Mapping[str, Any]], None] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Contracts: what targets fulfil


class Model(Protocol):
    """A decoder; in practice a `torch.nn.Module`. Built of ``make``'s layers, which bind dtype, device and shard."""

    weights: ClassVar[Mapping[str, tuple[str, ...]]]
    """Packed layer -> the checkpoint's names of its parts, e.g. ``{"qkv_proj": ("q_proj", "k_proj", "v_proj")}``."""

    def __init__(self, info: ModelInfo, make: Make) -> None: ...

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """``tokens``, ``positions``: [tokens] -> hidden states [tokens, hidden]."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocabulary]."""


class AttentionBackend(Protocol):
    """Writes each step's keys and values into the pool and attends over it. Knows no model."""

    capturable: ClassVar[bool]
    """Whether steps of one new token a sequence may be captured in a CUDA graph: `plan` and `attend` then go by the
    batch's tensors, which hold other numbers at every replay, and of its lists by the number of sequences only."""

    def __init__(self, job: AttentionJob, pool: KVPool) -> None: ...

    def plan(self, batch: Batch) -> Any:
        """Once a step, before the first layer: whatever all layers share. Kept in ``batch.plan``."""

    def attend(
        self, layer: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim]."""


class PackedAttention(AttentionBackend, Protocol):
    """An attention backend that rotates queries and keys while it writes keys and values into the pool."""

    def attend_packed(
        self, layer: AttentionSpec, qkv: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """As `attend`, of qkv [tokens, heads + 2 kv_heads, head_dim] whose queries and keys are yet to be rotated, as
        `Operators.rotate` does. Used by models whose projection is packed, in place of these two."""


class Operators(Protocol):
    """The small operations between the matrix products of a model (``make.operators``). They leave their arguments as
    they are."""

    def __init__(self) -> None: ...

    def rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``x + residual`` [..., size] the root-mean-square norm times ``weight`` [size], and that sum; both in x's
        dtype. Multiplied in the weight's dtype, which may be wider than x's."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[tokens, 2 size] -> silu(first half) * second half [tokens, size]."""

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The same with gelu by its tanh approximation."""

    def rotate(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The pairs (i, i + rotated / 2) of x [tokens, heads, head_dim] turned by cosines and signed sines
        [tokens, 1, rotated]: x * cos + roll(x, rotated / 2) * sin; dimensions past ``rotated`` are kept."""

    def gather(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows of x [tokens, size] by their numbers [rows] int64 -> [rows, size]: the hidden states that get logits."""


class SamplingRow(Protocol):
    """One sequence about to get a token, as samplers and logits processors see it. Not to be modified."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    """The tokens generated so far; under a sampler that `overlaps <Sampler>`, all but the last few where the request
    sets no field of a logits processor and has no grammar."""
    index: int
    """Which of the request's ``n`` choices this is."""
    seed: int
    """The request's seed, or one drawn for it. The same (seed, index, generated) must give the same draw."""
    stop_ids: tuple[int, ...]
    """Ids that end this sequence: the model's eos (unless ignore_eos) and the request's stop_token_ids."""

    @property
    def generated(self) -> int:
        """How many tokens were generated, those that ``output`` lacks among them."""


class Sampler(Protocol):
    """Picks the next token of every row. Log-probabilities are the core's: taken before the sampler sees the logits."""

    overlaps: ClassVar[bool]
    """Whether a step may begin before the tokens of the one before it are known: `sample` then does not look at
    ``row.output``, counts by ``row.generated``, and finds the tokens in ``history``."""

    def __init__(self) -> None: ...

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow], history: History) -> torch.Tensor:
        """logits [rows, vocabulary] float32, may be overwritten -> tokens [rows] int64 on the same device."""


class LogitsProcessor(Protocol):
    """Changes the logits of the requests that set one of its fields, before the sampler."""

    def __init__(self, info: ModelInfo) -> None: ...

    def apply(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        """In place; logits [rows, vocabulary] holds only the rows that claimed it (``row.params.extra``)."""


class LinearMethod(Protocol):
    """How one linear layer holds its weight and multiplies by it. Each layer has an object of its own."""

    def __init__(self, info: ModelInfo) -> None: ...

    def create(self, layer: Linear) -> None:
        """Say with ``layer.hold`` which parameters are to be loaded, but for the bias. The usual one is ``weight``
        along outputs and inputs; a layer that is ``tied`` must have that one and leave it as it is. ``layer.names``
        and ``layer.head`` tell which layer it is, for checkpoints that quantize some and not others."""

    def finish(self, layer: Linear) -> None:
        """Called once, when every part of this layer has been loaded: pack or quantize."""

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], bias included."""


@runtime_checkable
class LinearSummary(Protocol):
    """What a `LinearMethod` has besides when users should know how it holds their layers."""

    def summary(self, layer: Linear) -> str:
        """How it holds this one, in a few words, or none. At the start the log counts the layers of the same words."""


Adapters = Callable[[str], Any]
"""An architecture's name in a weight format -> the adapter that a model plugin has for it (`ModelRecord.adapters`);
None where there is none."""


class Worker(Protocol):
    """A model with its weights, its KV pool, attention backend and sampler: what computes a step."""

    ready: Ready
    """What it can hold."""

    def start(self, plan: Plan) -> Callable[[], list[Result]]:
        """Begin a step. What is given back waits for its results, one for every item of the plan, in its order.

        Where ``ready.overlap``, the next step may be begun before these are asked for; steps are done, and asked for,
        in the order they were begun. May be asked again for a part of a plan that failed; after `WorkerLost` it is not.
        """


class Executor(Protocol):
    """Where the workers are: in the engine's process, in one process a rank, on other machines. Lives as long as the
    engine."""

    ready: Ready
    """What all of its workers can hold."""

    def __init__(self, job: ExecutorJob, build: Callable[[], Worker]) -> None:
        """``build`` makes a worker in the process that calls it, which takes as long as loading the model."""

    def start(self, plan: Plan) -> Callable[[], list[Result]]:
        """As `Worker.start`."""

    def close(self) -> None:
        """End what was started."""


class Checkpoint(Protocol):
    """What a weight format can say of a model on disk without torch. Used in every process."""

    def __init__(self, path: Path, adapters: Adapters) -> None: ...

    def info(self) -> ModelInfo: ...

    def tokenizer(self) -> RawTokenizer:
        """A `tokenizers.Tokenizer`."""


class WeightFormat(Protocol):
    """Reads tensors, one at a time, so that peak memory stays at the weights plus one shard."""

    def __init__(self, path: Path, info: ModelInfo, adapters: Adapters) -> None: ...

    def nbytes(self) -> int:
        """Bytes on disk, for the progress bar."""

    def tensors(self, expected: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Hugging Face name, tensor). ``expected`` are the names the model asks for, to help translation;
        tensors nobody asked for are yielded too, so that the loader can name them."""


class Text(msgspec.Struct, frozen=True):
    """Content for the user."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Thought, shown apart from the content."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A tool call begins. ``index`` counts calls from 0."""

    index: int
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """The next piece of call ``index``'s arguments, as the model wrote them."""

    index: int
    fragment: str


Event = Text | Reasoning | CallStart | CallArguments


class ToolParser(Protocol):
    """An incremental machine. Law: every way of cutting the text into pushes gives the same events when joined."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None: ...

    def push(self, text: str) -> Iterable[Text | CallStart | CallArguments]: ...

    def close(self) -> Iterable[Text | CallStart | CallArguments]: ...


@runtime_checkable
class CallGrammar(Protocol):
    """What a `ToolParser` has besides when its calls can be forced (``tool_choice``, ``strict``)."""

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        """How answers look that call the parser's tools. ``parallel``: several calls may be made.

        ``required``: calls and nothing else, their arguments as the tools' ``parameters`` say. Otherwise any text, and
        once a call has begun, a call to one of the tools: its arguments as the schema says where the tool is
        ``strict``, else any JSON object.
        """


@runtime_checkable
class CallIds(Protocol):
    """What a `ToolParser` has besides when its model's template wants ids of a certain form."""

    def call_id(self) -> str:
        """A new one. Everybody else's are ``call_`` and 24 hexadecimal digits."""


class ReasoningParser(Protocol):
    """Splits thought from content; obeys the same law as tool parsers. ``prompt``: the rendered prompt."""

    def __init__(self, prompt: str) -> None: ...

    def push(self, text: str) -> Iterable[Text | Reasoning]: ...

    def close(self) -> Iterable[Text | Reasoning]: ...


@runtime_checkable
class ReasoningGrammar(Protocol):
    """What a `ReasoningParser` has besides when the answer after the thought can be held to a grammar."""

    def grammar(self, answer: Grammar) -> Grammar:
        """The thought, free, if this answer has one, and then ``answer``."""


class GrammarBackend(Protocol):
    """Compiles grammars. Its methods are called from several threads.

    What clients send is first compiled in a process that does nothing else: there ``tokenizer`` is None and `fill` is
    never called. What takes that process too long, or ends it, never gets to the engine.
    """

    def __init__(self, tokenizer: RawTokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None: ...

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A new matcher, at the beginning. Raises `lightllm.grammar.GrammarError`."""

    def fill(self, matchers: Sequence[GrammarMatcher], masks: torch.Tensor) -> None:
        """The tokens each may take next: masks [matchers, ceil(vocabulary / 32)] int32 on the CPU, a bit for each token
        from the lowest on; the end-of-sequence ids where the answer may end. Runs beside the model."""


class GrammarMatcher(Protocol):
    """How far one answer has come in its grammar."""

    def accept(self, token: int) -> bool:
        """Go on by a token. False where the grammar does not allow it, or has become too costly; `error` says."""

    def forced(self) -> list[int]:
        """Tokens that must come next, in the tokenizer's own way of cutting text; may leave some out, or all. They have
        not been accepted yet."""

    def error(self) -> str:
        """Why it cannot go on; "" while it can."""

    def finished(self) -> bool:
        """Whether the answer is complete and cannot go on."""
