"""A request log as JSON lines (``--observe-log FILE``), and totals at ``GET /observe``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from lightllm import Listener, UserError, hookimpl, parse_size

if TYPE_CHECKING:
    from lightllm.config import Config, OptionGroup
    from lightllm_observe.observer import Observer


class Observe:
    """The hooks, and the observer that those of one server share."""

    lightllm_requires = ">=0.1,<0.2"

    def __init__(self) -> None:
        self._config: Config | None = None
        self._observer: Observer | None = None

    @hookimpl
    def lightllm_add_options(self, group: OptionGroup) -> None:
        group.add("--observe-log", help="append a JSON line for every finished request to this file")
        group.add("--observe-max-bytes", default="100MB", help="size at which the log is rotated, e.g. 1GiB")
        group.add("--observe-keep", type=Annotated[int, Meta(ge=0)], default=5, help="rotated logs to keep")
        group.add(
            "--observe-content",
            type=Literal["none", "redacted", "full"],
            default="none",
            help="whether the log has prompts and answers; redacted: without secrets and personal data",
        )

    @hookimpl
    def lightllm_listeners(self, config: Config) -> Sequence[Listener]:
        return [Listener(name="observe", on_finish=self._of(config).on_finish)]

    @hookimpl
    def lightllm_routes(self, config: Config) -> Sequence[Any]:
        from litestar import get

        observer = self._of(config)

        @get("/observe")
        async def totals() -> dict[str, Any]:
            return observer.totals()

        return [totals]

    @hookimpl
    def lightllm_lifespan(self, config: Config) -> AbstractAsyncContextManager[None]:
        return self._of(config).lifespan()

    def _of(self, config: Config) -> Observer:
        if self._observer is None or self._config is not config:
            from lightllm_observe.observer import Observer

            given = config.plugin_options
            try:
                max_bytes = parse_size(given["observe_max_bytes"])
            except ValueError as error:
                raise UserError(f"--observe-max-bytes: {error}") from None
            self._config = config
            self._observer = Observer(
                given["observe_log"],
                max_bytes=max_bytes,
                keep=given["observe_keep"],
                content=given["observe_content"],
            )
        return self._observer


plugin = Observe()
