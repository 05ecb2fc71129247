"""``--model modelscope://org/name``: models from ModelScope. Its library is imported only when such a name is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightllm import hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config

lightllm_requires = ">=0.1,<0.2"

SCHEME = "modelscope://"


@hookimpl
def lightllm_resolve_model(name: str, revision: str | None, config: Config) -> Path | None:
    if not name.startswith(SCHEME):
        return None
    from lightllm_modelscope.source import modelscope_model

    return modelscope_model(name.removeprefix(SCHEME), revision)
