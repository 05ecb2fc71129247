"""A file that is there while the server is up, with its process id: ``--example-plugin-file``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightllm import UserError, hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config, OptionGroup

lightllm_requires = ">=0.1,<0.2"


@hookimpl
def lightllm_add_options(group: OptionGroup) -> None:
    group.add("--example-plugin-file", help="holds the server's process id while it is up")


@hookimpl
@asynccontextmanager
async def lightllm_lifespan(config: Config) -> AsyncIterator[None]:
    """Up to ``yield``: before the server takes requests. Then: after the last one."""
    # also set by LIGHTLLM_<the option's name>, or by the same name in the file that --config names
    name = config.plugin_options["example_plugin_file"]
    if name is None:
        yield
        return
    file = Path(name)
    try:
        file.write_text(f"{os.getpid()}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--example-plugin-file {name}: {error}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
