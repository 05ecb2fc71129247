"""Counts requests and tokens, and logs after each request how many there have been."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightllm import Listener, hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config

lightllm_requires = ">=0.1,<0.2"

# below "lightllm", so that --log-level is for these lines, too
log = logging.getLogger("lightllm.example_plugin")


class ExamplePluginCounts:
    """What came so far. Both methods run between the requests of a server that is busy, so they must be quick."""

    def __init__(self) -> None:
        self.requests = self.running = self.tokens = 0

    def on_request(self, facts: Mapping[str, Any]) -> None:
        """``facts``: what is known of the request; see `lightllm.Listener`."""
        self.requests += 1
        self.running += 1

    def on_finish(self, facts: Mapping[str, Any]) -> None:
        """``facts``: these, and what has become of it."""
        self.running -= 1
        self.tokens += facts["completion_tokens"]
        log.info("%s: requests %d, running %d, tokens %d", facts["status"], self.requests, self.running, self.tokens)


@hookimpl
def lightllm_listeners(config: Config) -> Sequence[Listener]:
    counts = ExamplePluginCounts()
    return [Listener(name="example-plugin", on_request=counts.on_request, on_finish=counts.on_finish)]
