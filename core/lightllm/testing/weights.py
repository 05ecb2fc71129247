"""Weight formats: a checkpoint on disk against the tensors that are known to be in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from lightllm.checks import import_target
from lightllm.interfaces import Adapters, ModelInfo, WeightFormatRecord
from lightllm.testing.rules import broken, shown


def check_weight_format(
    record: WeightFormatRecord,
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    tolerance: float = 0.0,
    adapters: Adapters = lambda name: None,
) -> None:
    """The record recognises ``path``, says of it what a server must know, and reads ``tensors`` (by Hugging Face's
    names) and no others. ``tolerance``: absolute, for formats that round."""
    reason = record.matches(path)
    if reason is not None:
        raise broken("matches answers None for its own format", f"path: {path}", f"it answered: {reason}")
    for other in (path / "nothing-of-this-name", Path(__file__)):
        if record.matches(other) is None:
            raise broken("matches says why something is not its format", f"path: {other}", "it answered None")
    module = record.checkpoint.partition(":")[0]
    code = f"import sys; sys.path[:] = {sys.path!r}; import {module}; sys.exit(3 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if done.returncode == 3:
        raise broken("the checkpoint's module imports no torch: the server process reads it", f"module: {module}")
    if done.returncode:
        raise broken("the checkpoint's module can be imported in every process", f"module: {module}", done.stderr)
    checkpoint: Any = import_target(record.checkpoint)(path, adapters)
    info, tokenizer = checkpoint.info(), checkpoint.tokenizer()
    if not isinstance(info, ModelInfo) or not info.architecture or not isinstance(info.config.get("vocab_size"), int):
        rule = "info gives a ModelInfo with an architecture and a config that has the vocab_size"
        raise broken(rule, f"found: {shown(info)}")
    if not isinstance(tokenizer, Tokenizer):
        raise broken("tokenizer gives a tokenizers.Tokenizer", f"found: {shown(tokenizer)}")
    reader: Any = import_target(record.target)(path, info, adapters)
    if not isinstance(reader.nbytes(), int) or reader.nbytes() <= 0:
        raise broken("nbytes gives the bytes on disk", f"found: {reader.nbytes()!r}")
    found: dict[str, Tensor] = {}
    for name, tensor in reader.tensors(list(tensors)):
        if name in found:
            raise broken("each tensor comes once", f"twice: {name}")
        found[name] = tensor
    for what, names in (("missing", tensors.keys() - found.keys()), ("not expected", found.keys() - tensors.keys())):
        if names:
            raise broken(
                "tensors yields each tensor of the checkpoint by its Hugging Face name", f"{what}: {sorted(names)}"
            )
    for name, expected in tensors.items():
        if found[name].shape != expected.shape:
            shapes = f"expected {list(expected.shape)}, found {list(found[name].shape)}"
            raise broken("a tensor has Hugging Face's shape", f"{name}: {shapes}")
        off = (found[name].double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        if not off <= tolerance:
            raise broken(
                "a tensor's values are the checkpoint's", f"{name}: off by {off:.3g}, tolerance {tolerance:.3g}"
            )
