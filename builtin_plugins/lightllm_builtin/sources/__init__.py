"""Where models come from: the embedded demo model, a path, the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightllm import UserError, hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config


@hookimpl
def lightllm_resolve_model(name: str, revision: str | None, config: Config) -> Path | None:
    """`demo`; else a path that exists; else ``org/name``, ``org/name:variant`` or ``org/name/file.gguf`` on the hub.

    What a folder holds is the weight formats' to say. A name that can only be a path must exist.
    """
    if name == "demo":
        from lightllm_builtin.sources.demo import demo_model

        return demo_model()
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a null: no path of ours
        pass
    parts = name.count("/")
    is_gguf = name.endswith(".gguf")
    if name.startswith(("/", "./", "../", "~")) or (is_gguf and parts < 2) or (not is_gguf and parts > 1):
        raise UserError(f"--model {name}: there is no such file or folder")
    if parts:
        from lightllm_builtin.sources.hub import hub_model

        return hub_model(name, revision)
    return None
