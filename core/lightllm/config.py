"""One frozen Config, and the only reader of the command line, the environment and the config file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


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

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="of weights and KV cache; auto: the checkpoint's on a GPU, float32 on a CPU"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: cuda where there is one")] = "auto"
    quantization: Annotated[str | None, Meta(description="linear method to hold the weights in")] = None
    tp: Annotated[int, Meta(ge=1, description="tensor-parallel ranks")] = 1
    attention_backend: Annotated[str, Meta(description="attention backend, or auto")] = "auto"
    sampler: Annotated[str, Meta(description="sampler, or auto")] = "auto"

    max_model_len: Annotated[
        int | None, Meta(ge=1, description="longest prompt plus answer, in tokens; default: the model's own")
    ] = None
    max_total_tokens: Annotated[int | None, Meta(ge=1, description="size of the KV cache, in tokens")] = None
    kv_cache_memory: Annotated[
        str | None, Meta(description="size of the KV cache, in bytes, e.g. 4GiB; default: from free memory")
    ] = None
    max_running_requests: Annotated[int, Meta(ge=1, description="sequences in one step at most")] = 256
    max_batch_tokens: Annotated[
        int | None, Meta(ge=1, description="tokens in one step at most; longer prompts are prefilled in chunks")
    ] = None
    prefix_cache: Annotated[bool, Meta(description="reuse the KV cache of shared prompt beginnings")] = True

    chat_template: Annotated[str | None, Meta(description="jinja2 file to use for the model's own template")] = None
    tool_call_parser: Annotated[str | None, Meta(description="how this model writes tool calls")] = None
    reasoning_parser: Annotated[str | None, Meta(description="how this model marks its reasoning")] = None

    no_plugin: Annotated[tuple[str, ...], Meta(description="block a plugin; may be given more than once")] = ()
    strict_plugins: Annotated[bool, Meta(description="refuse to start when a plugin is broken")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severe message to log")
    ] = "info"

    plugin_options: dict[str, Any] = {}
    """Options that plugins added, by their name with underscores."""
