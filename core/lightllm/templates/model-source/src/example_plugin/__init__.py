"""``--model example-plugin://NAME`` is the folder NAME in the folder that ``--example-plugin-folder`` names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightllm import UserError, hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config, OptionGroup

lightllm_requires = ">=0.1,<0.2"

SCHEME = "example-plugin://"


@hookimpl
def lightllm_add_options(group: OptionGroup) -> None:
    group.add("--example-plugin-folder", default="models", help=f"where the models of {SCHEME}NAME are")


@hookimpl
def lightllm_resolve_model(name: str, revision: str | None, config: Config) -> Path | None:
    """A source that downloads would do so here, into a cache, and answer with the folder there."""
    if not name.startswith(SCHEME):
        return None  # somebody else's
    folder = Path(config.plugin_options["example_plugin_folder"])
    models = sorted(path.name for path in folder.glob("*") if path.is_dir())
    wanted = name.removeprefix(SCHEME)
    if wanted not in models:
        # shown as one line: this is the user's to mend
        raise UserError(f"--model {name}: {folder} has no model of that name; it has: {', '.join(models) or 'none'}")
    return folder / wanted
