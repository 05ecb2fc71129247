"""The Litestar application: routes, the API key, and every error in OpenAI's form."""

from __future__ import annotations

import hmac
import importlib.metadata
from typing import Any

from litestar import Litestar, Request, Response, get, post
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.types import ASGIApp

from lightllm.server import completions, openai
from lightllm.server.answer import JsonAnswer, api_error
from lightllm.server.plugin_parts import error_response, refuse_collisions
from lightllm.server.protocol import (
    ApiError,
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    encode_json,
    read_request,
)
from lightllm.server.state import ServerState
from lightllm.server.tools import check_tools

__all__ = ["ServerState", "create_app"]

MAX_BODY_BYTES = 32 << 20

OPEN = {"open": True}
"""``opt`` of a route that needs no API key; a plugin's routes may say so too."""


def create_app(state: ServerState) -> Litestar:
    """Serves the API and the plugins' routes, inside the plugins' lifespans. Raises UserError where routes collide."""
    api = _api(state)
    refuse_collisions(api, state.routes)
    return Litestar(
        route_handlers=[*api, *state.routes],
        cors_config=CORSConfig(allow_origins=list(origins)) if (origins := state.config.allowed_origins) else None,
        guards=[_key_guard(state.config.api_key)] if state.config.api_key else [],
        lifespan=list(state.lifespans),
        exception_handlers={Exception: _on_error},
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
        debug=False,
    )


def _api(state: ServerState) -> list[Any]:
    @post("/v1/chat/completions")
    async def chat_completions(request: Request[Any, Any, Any]) -> ASGIApp:
        return await openai.chat_completion(state, await request.body())

    @post("/v1/completions")
    async def text_completions(request: Request[Any, Any, Any]) -> ASGIApp:
        return await completions.completion(state, await request.body())

    @get("/v1/models")
    async def models() -> ASGIApp:
        return _json(ModelList(data=[_card(state, name) for name in state.model_names]))

    @get("/v1/models/{name:path}")
    async def model(request: Request[Any, Any, Any]) -> ASGIApp:
        return _json(_card(state, state.model_name(str(request.path_params["name"]).removeprefix("/"))))

    @get("/health", opt=OPEN)
    async def health() -> ASGIApp:
        state.ready()
        return _json({"status": "ok"})

    @get("/version", opt=OPEN)
    async def version() -> ASGIApp:
        return _json({"version": importlib.metadata.version("lightllm-serve")})

    @post("/tokenize")
    async def tokenize(request: Request[Any, Any, Any]) -> ASGIApp:
        return _json(await _tokenize(state, await request.body()))

    @post("/detokenize")
    async def detokenize(request: Request[Any, Any, Any]) -> ASGIApp:
        asked, _ = read_request(await request.body(), DetokenizeRequest)
        state.model_name(asked.model)
        return _json(DetokenizeResponse(state.tokenizer.decode(asked.tokens, skip_special_tokens=False)))

    return [chat_completions, text_completions, models, model, health, version, tokenize, detokenize]


async def _tokenize(state: ServerState, body: bytes) -> TokenizeResponse:
    asked, _ = read_request(body, TokenizeRequest)
    state.model_name(asked.model)
    special = asked.add_special_tokens
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError("Either a prompt or messages must be given.", param="prompt")
    if asked.messages is not None:
        text = openai.render(
            state,
            asked.messages,
            check_tools(asked.tools),
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=bool(asked.continue_final_message),
            variables=asked.chat_template_kwargs or {},
        )
        special = bool(special)
    else:
        text = asked.prompt or ""
    tokens = await state.encode(text, add_special_tokens=special is not False)
    strings = [state.tokenizer.token_text(id) for id in tokens] if asked.return_token_strs else None
    return TokenizeResponse(
        count=len(tokens), max_model_len=state.ready().max_model_len, tokens=tokens, token_strs=strings
    )


def _card(state: ServerState, name: str) -> ModelCard:
    ready = state.engine.ready
    return ModelCard(id=name, created=state.started, max_model_len=ready.max_model_len if ready else None)


def _json(value: Any) -> ASGIApp:
    return JsonAnswer(encode_json(value))


def _on_error(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    return error_response(api_error(error))


def _key_guard(key: str) -> Any:
    expected = key.encode()

    def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if handler.opt.get("open"):
            return
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), expected):
            raise ApiError(
                "You need to send the server's API key: Authorization: Bearer KEY."
                if not given
                else "Incorrect API key provided.",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    return guard
