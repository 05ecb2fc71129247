"""Every question the core asks its plugins. Answer with `lightllm.hookimpl`; a hook you do not need, leave out.

The name tells the kind: a plural noun lists records, verb_noun stops at the first answer that is not None, and an
event is for everyone. Hooks run at start-up only: never per request, per step or per token.

Hooks that list records with targets are asked in every process, so that all know the same plugins; "used in" says
where the targets are imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from lightllm.interfaces import (
    AttentionBackendRecord,
    ExecutorRecord,
    GrammarBackendRecord,
    LinearMethodRecord,
    Listener,
    LogitsProcessorRecord,
    ModelInfo,
    ModelRecord,
    OperatorsRecord,
    ReasoningParserRecord,
    SamplerRecord,
    ToolParserRecord,
    WeightFormatRecord,
)

if TYPE_CHECKING:
    from lightllm.config import Config, OptionGroup

VERSION = "0.1.0"
"""Of what plugins see: the hooks, the records and contracts in `interfaces`, `lightllm.nn` and `lightllm.testing`.

While it begins with 0, a new second number may break plugins; from 1 on, only a new first number may. A plugin says
which it was written for by ``lightllm_requires = ">=0.1,<0.2"`` in its module. What is to go is first deprecated by
pluggy's ``warn_on_impl`` for one such step.
"""

hookspec = pluggy.HookspecMarker("lightllm")
hookimpl = pluggy.HookimplMarker("lightllm")


# --- plural nouns: records


@hookspec
def lightllm_models() -> Sequence[ModelRecord]:  # type: ignore[empty-body]
    """Model architectures. Used in the engine process."""


@hookspec
def lightllm_attention_backends() -> Sequence[AttentionBackendRecord]:  # type: ignore[empty-body]
    """Attention kernels over the paged KV pool. Used in the engine process."""


@hookspec
def lightllm_operators() -> Sequence[OperatorsRecord]:  # type: ignore[empty-body]
    """Norms, activations and rotations (``--operators``). Used in the engine process."""


@hookspec
def lightllm_samplers() -> Sequence[SamplerRecord]:  # type: ignore[empty-body]
    """Token samplers. Used in the engine process."""


@hookspec
def lightllm_logits_processors() -> Sequence[LogitsProcessorRecord]:  # type: ignore[empty-body]
    """Logits processors and the request fields they claim. Used in both processes."""


@hookspec
def lightllm_tool_parsers() -> Sequence[ToolParserRecord]:  # type: ignore[empty-body]
    """Tool-call formats (``--tool-call-parser``). Used in the server process."""


@hookspec
def lightllm_reasoning_parsers() -> Sequence[ReasoningParserRecord]:  # type: ignore[empty-body]
    """Reasoning formats (``--reasoning-parser``). Used in the server process."""


@hookspec
def lightllm_weight_formats() -> Sequence[WeightFormatRecord]:  # type: ignore[empty-body]
    """Checkpoint formats on disk. Used in both processes."""


@hookspec
def lightllm_linear_methods() -> Sequence[LinearMethodRecord]:  # type: ignore[empty-body]
    """Ways to hold and multiply linear weights (``--quantization``). Used in the engine process."""


@hookspec
def lightllm_grammar_backends() -> Sequence[GrammarBackendRecord]:  # type: ignore[empty-body]
    """Compilers of grammars for structured output (``--grammar-backend``). Used in both processes."""


@hookspec
def lightllm_executors() -> Sequence[ExecutorRecord]:  # type: ignore[empty-body]
    """Where models run (``--executor``). Used in the engine process."""


@hookspec
def lightllm_listeners(config: Config) -> Sequence[Listener]:  # type: ignore[empty-body]
    """Observers of requests. Used in the server process."""


@hookspec
def lightllm_routes(config: Config) -> Sequence[Any]:  # type: ignore[empty-body]
    """Litestar route handlers to mount beside the API. Used in the server process."""


# --- verb_noun: first answer wins


@hookspec(firstresult=True)
def lightllm_resolve_model(name: str, revision: str | None, config: Config) -> Path | None:
    """Turn ``--model NAME`` into a folder or file on disk, downloading it if need be; None: not mine.

    Raise `lightllm.UserError` when the name is yours but cannot be had. Used in the server process.
    """


@hookspec(firstresult=True)
def lightllm_choose_chat_template(info: ModelInfo, config: Config) -> str | None:
    """A jinja2 chat template to use in place of the checkpoint's own. Used in the server process."""


# --- events: everyone


@hookspec
def lightllm_add_options(group: OptionGroup) -> None:
    """Add command-line options: ``group.add("--my-option", type=int, default=3, help="...")``; read them from
    ``config.plugin_options["my_option"]`` in the hooks that are given the configuration. Used in the server process."""


@hookspec
def lightllm_lifespan(config: Config) -> AbstractAsyncContextManager[None]:  # type: ignore[empty-body]
    """A context entered before the server takes requests and left after the last. Used in the server process."""
