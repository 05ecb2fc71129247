"""A chat template for models that have none: a dialogue, written down as a script."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightllm import ModelInfo, hookimpl

if TYPE_CHECKING:
    from lightllm.config import Config

lightllm_requires = ">=0.1,<0.2"

TEMPLATE = """\
{{ bos_token or "" }}\
{% for message in messages %}{{ message.role | capitalize }}: {{ message.content | trim }}

{% endfor %}\
{% if add_generation_prompt %}Assistant:{% endif %}\
"""
"""Jinja2, with the variables of Hugging Face's templates."""


@hookimpl
def lightllm_choose_chat_template(info: ModelInfo, config: Config) -> str | None:
    """None leaves it to others, and in the end to the model's own template.

    ``info.architecture`` and ``info.config`` tell models apart. ``--chat-template`` goes before all plugins.
    """
    return TEMPLATE if info.chat_template is None else None
