"""The kit for plugin authors: contracts as functions that raise AssertionError naming the rule that is broken, and real
servers to try a plugin in.

``pytest_plugins = ["lightllm.testing"]`` in the root conftest, or ``-p lightllm.testing``, gives pytest its fixtures
and readable assertions. Nothing here needs pytest, and what needs torch imports it when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightllm.testing.attention import check_attention_backend
    from lightllm.testing.call_grammars import check_call_grammar
    from lightllm.testing.checkpoints import byte_tokenizer, write_tiny_llama
    from lightllm.testing.grammar_backends import check_grammar_backend
    from lightllm.testing.grammars import TextMatcher
    from lightllm.testing.linear import check_linear_method
    from lightllm.testing.logits import check_logits_processor
    from lightllm.testing.models import check_model
    from lightllm.testing.operators import check_operators
    from lightllm.testing.parsers import check_reasoning_parser, check_tool_parser
    from lightllm.testing.plugins import check_plugin
    from lightllm.testing.samplers import check_sampler
    from lightllm.testing.scripted.checkpoint import write_scripted
    from lightllm.testing.serving import Server, serve
    from lightllm.testing.weights import check_weight_format

__all__ = [
    "Server",
    "TextMatcher",
    "byte_tokenizer",
    "check_attention_backend",
    "check_call_grammar",
    "check_grammar_backend",
    "check_linear_method",
    "check_logits_processor",
    "check_model",
    "check_operators",
    "check_plugin",
    "check_reasoning_parser",
    "check_sampler",
    "check_tool_parser",
    "check_weight_format",
    "serve",
    "write_scripted",
    "write_tiny_llama",
]

_HOMES = {
    "attention": ("check_attention_backend",),
    "call_grammars": ("check_call_grammar",),
    "checkpoints": ("byte_tokenizer", "write_tiny_llama"),
    "grammar_backends": ("check_grammar_backend",),
    "grammars": ("TextMatcher",),
    "linear": ("check_linear_method",),
    "logits": ("check_logits_processor",),
    "models": ("check_model",),
    "operators": ("check_operators",),
    "parsers": ("check_reasoning_parser", "check_tool_parser"),
    "plugins": ("check_plugin",),
    "samplers": ("check_sampler",),
    "scripted.checkpoint": ("write_scripted",),
    "serving": ("Server", "serve"),
    "weights": ("check_weight_format",),
}

pytest_plugins = ("lightllm.testing.fixtures",)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
