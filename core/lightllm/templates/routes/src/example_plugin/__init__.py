"""``GET /example-plugin/hello``.

This module only says what there is. It is imported by every process of lightllm-serve; `routes`, and the web framework
with it, by the server's only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightllm import hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_routes(config: Config) -> Sequence[Any]:
    from example_plugin.routes import hello

    return [hello]
