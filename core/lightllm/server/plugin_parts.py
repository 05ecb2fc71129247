"""What plugins bring to the application: routes and lifespans, each under the name of its plugin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from litestar import Request, Response, Router
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, Receive, Scope, Send

from lightllm.checks import INTERRUPTS, Wrong, blamed, describe
from lightllm.interfaces import UserError
from lightllm.options import CORE
from lightllm.server.answer import api_error, internal_error
from lightllm.server.protocol import ApiError

log = logging.getLogger("lightllm.server")

_PLUGIN = "plugin"

_INTERRUPTS = (*INTERRUPTS, asyncio.CancelledError)


def error_response(answer: ApiError) -> Response[bytes]:
    return Response(answer.body(), status_code=answer.status, media_type="application/json", headers=answer.headers)


def plugin_router(label: str, handlers: Sequence[Any]) -> Router:
    """One plugin's routes. What they raise is answered and logged in the plugin's name. Raises `Wrong`."""

    def on_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        if isinstance(error, (ApiError, HTTPException)):
            answer = api_error(error)
        else:
            answer = internal_error(error, f"plugin {label} failed in {request.method} {request.url.path}")
        return error_response(answer)

    with blamed(f"plugin {label}: lightllm_routes"):
        return Router(
            "/",
            route_handlers=handlers,
            exception_handlers={Exception: on_error},
            middleware=[_only_exceptions],
            opt={_PLUGIN: label},
        )


def _only_exceptions(app: ASGIApp) -> ASGIApp:
    """What is no Exception, Litestar shows to no handler: it would end the server, or be answered in plain text."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except (Exception, *_INTERRUPTS):
            raise
        except BaseException as error:
            raise Wrong(describe(error)) from error

    return call


def refuse_collisions(own: Sequence[Any], added: Iterable[Any]) -> None:
    """Two owners of one path, whatever the method, are a UserError naming both. ``own``: the server's handlers."""
    owners: dict[str, str] = {}
    for router in [Router("/", route_handlers=own), *(r for r in added if isinstance(r, Router))]:
        label = (router.opt or {}).get(_PLUGIN, CORE)
        for route in router.routes:
            # {x:int} and {y:int} are the same place
            parts = [part if isinstance(part, str) else f"{{{part.type.__name__}}}" for part in route.path_components]
            owner = owners.setdefault("/".join(parts), label)
            if owner != label:
                raise UserError(f"{route.path} is a route of both {owner} and {label}: block a plugin with --no-plugin")


@asynccontextmanager
async def named_lifespan(label: str, context: AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
    """The plugin's own, but what it raises says whose it is. One that cannot leave does not keep the others from it."""
    try:
        await context.__aenter__()
    except _INTERRUPTS:
        raise
    except BaseException as error:
        log.error("plugin %s: lightllm_lifespan failed to start: %s", label, describe(error))
        raise
    try:
        yield
    finally:
        try:
            await context.__aexit__(None, None, None)
        except _INTERRUPTS:
            raise
        except BaseException as error:
            log.exception("plugin %s: lightllm_lifespan failed to end: %s", label, describe(error))
