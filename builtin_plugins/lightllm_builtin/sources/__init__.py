"""Where models come from: a path, the embedded demo model, the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightllm import UserError, hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config


@hookimpl
def lightllm_resolve_model(name: str, revision: str | None, config: Config) -> Path | None:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name == "demo":
        from lightllm_builtin.sources.demo import demo_model

        return demo_model()
    if name.startswith(("/", "./", "../", "~")) or (name.endswith(".gguf") and name.count("/") != 2):
        raise UserError(f"--model {name}: there is no such file or folder")
    if "/" in name:
        from lightllm_builtin.sources.hub import hub_model

        return hub_model(name, revision)
    return None
