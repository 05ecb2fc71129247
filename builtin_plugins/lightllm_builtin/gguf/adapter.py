"""What the GGUF plugin asks of model plugins, so that it need not know their models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lightllm_builtin.gguf.header import Header

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(Protocol):
    """How GGUF files of one ``general.architecture`` hold a model, in Hugging Face's terms.

    A model plugin names its own in ``ModelRecord.adapters`` under ``"gguf/<general.architecture>"``. It is made in both
    processes, so it imports no torch. What it may use of ``file``: ``field(name)``, a field of the architecture such as
    ``"attention.head_count"``; ``metadata``, everything as it is in the file; ``shapes``, tensor name -> shape.
    """

    def __init__(self, file: Header) -> None: ...

    def config(self) -> dict[str, Any]:
        """Fields of config.json, ``architectures`` and ``model_type`` among them. They go before what is read from any
        file alike: `checkpoint.FIELDS`, ``vocab_size``, ``tie_word_embeddings``, ``rope_scaling`` and special tokens.
        """

    def tensor(self, name: str, values: Tensor) -> Tensor:
        """The values as Hugging Face's checkpoints hold them. ``name`` is the file's; ``values`` are float32, of
        PyTorch's shape, and may be overwritten."""
