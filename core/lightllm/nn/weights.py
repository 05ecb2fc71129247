"""Checkpoint tensors into a model, one at a time. The map of names comes from the model itself.

A parameter's checkpoint name is its path in the model, but where the last module of the path is a key of the model's
``weights``, each of that key's parts has a name of its own. New models need nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from lightllm.interfaces import UserError, WeightFormat
from lightllm.nn.layers import ShapeError, copy_into

NEVER_LOADED = ("*rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached")
"""Buffers that older checkpoints carry along; models compute them."""


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor goes: part ``part`` of ``module``'s parameter ``name``."""

    module: nn.Module
    name: str
    part: int | None

    def fill(self, tensor: Tensor) -> None:
        load = getattr(self.module, "load", None)
        if load is not None:
            load(self.name, tensor, self.part)
        else:
            copy_into(self.module.get_parameter(self.name), tensor)


def load_weights(
    model: nn.Module, source: WeightFormat, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Load every parameter of ``model`` from ``source``; ``progress(done, total)`` counts bytes.

    A module's ``finish()`` is called as soon as its last part has arrived, so that packing or quantizing it frees
    memory while the rest is still loading. Raises UserError naming tensors that are missing, unexpected or of the
    wrong shape.
    """
    places = _places(model)
    tied: dict[str, str] = getattr(model, "tied", {})
    ignored = (*NEVER_LOADED, *getattr(model, "ignored", ()))
    missing = {name for name in places if name not in tied}
    waiting = {id(place.module): 0 for place in places.values()}
    for name in missing:
        waiting[id(places[name].module)] += 1
    unexpected = []
    done, total = 0, source.nbytes()
    progress(0, total)
    for name, tensor in source.tensors(list(places)):
        done += tensor.nbytes
        if name in missing:
            place = places[name]
            try:
                place.fill(tensor)
            except ShapeError as error:
                raise UserError(f"{type(model).__name__}: tensor {name} {error}") from None
            missing.discard(name)
            waiting[id(place.module)] -= 1
            if not waiting[id(place.module)]:
                _finish(place.module)
        elif name not in tied and not any(fnmatch(name, pattern) for pattern in ignored):
            unexpected.append(name)
        progress(min(done, total), total)
    if missing or unexpected:
        problems = [f"it lacks {_some(missing)}"] if missing else []
        problems += [f"it has {_some(unexpected)} that the model does not know"] if unexpected else []
        raise UserError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(problems)}")
    # Modules all of whose parameters are tied to others': complete only now.
    for module in {id(places[name].module): places[name].module for name in tied if name in places}.values():
        _finish(module)
    progress(total, total)


def _places(model: nn.Module) -> dict[str, Place]:
    """Checkpoint name -> place, for every parameter of the model."""
    packed: dict[str, tuple[str, ...]] = dict(getattr(type(model), "weights", {}))
    places = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        prefix = f"{parent}." if parent else ""
        for name, _ in module.named_parameters(recurse=False):
            if last in packed:
                for part, original in enumerate(packed[last]):
                    places[f"{prefix}{original}.{name}"] = Place(module, name, part)
            else:
                places[f"{path}.{name}" if path else name] = Place(module, name, None)
    return places


def _finish(module: Any) -> None:
    finish = getattr(module, "finish", None)
    if finish is not None:
        finish()


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({shown})"
