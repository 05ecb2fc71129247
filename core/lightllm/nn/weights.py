"""Checkpoint tensors into a model, one at a time. The map of names comes from the model itself.

A parameter's checkpoint name is its path in the model, but where the last module of the path is a key of the model's
``weights``, each of that key's parts has a name of its own. A model may also have ``tied`` (a parameter that need not
be in the checkpoint -> the one it shares), ``ignored`` (patterns of the checkpoint's tensors it can do without) and
``prefixes`` (how the checkpoint begins a name -> how the model does). New models need nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from lightllm.interfaces import UserError, WeightFormat
from lightllm.nn.layers import DtypeError, Linear, ShapeError, copy_into

NEVER_LOADED = ("*rotary_emb.inv_freq", "*.rotary_emb.cos_cached", "*.rotary_emb.sin_cached", "*.k_scale", "*.v_scale")
"""Buffers that older checkpoints carry along and models compute, and scales for a KV cache in float8, which ours is
not."""


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


@torch.no_grad()
def load_weights(model: nn.Module, source: WeightFormat, progress: Callable[[int, int], None] | None = None) -> None:
    """Create what ``model``'s linear layers hold, and load every parameter from ``source``; ``progress(done, total)``
    counts bytes.

    A module's ``finish()`` is called as soon as its last part has arrived, so that packing or quantizing it frees
    memory while the rest is still loading; one that holds a tied parameter, or lacks an optional one, waits for the
    end. A bias of zeros that the model does not know is skipped. Raises UserError naming the tensors that are missing,
    unexpected, there twice or of the wrong shape or kind.
    """
    places = _places(model)
    tied: Mapping[str, str] = getattr(model, "tied", {})
    ignored = (*NEVER_LOADED, *getattr(model, "ignored", ()))
    prefixes: Mapping[str, str] = getattr(model, "prefixes", {})
    missing = {name for name in places if name not in tied}
    maybe = {name for name, place in places.items() if place.name in getattr(place.module, "optional", ())}
    came: set[tuple[int, str]] = set()
    waiting = Counter(id(places[name].module) for name in places)
    unexpected, twice, misfits = [], [], []
    done, total = 0, source.nbytes()
    if progress:
        progress(0, total)
    for found, tensor in source.tensors(list(places)):
        done += tensor.nbytes
        name = _renamed(found, prefixes)
        if name in missing:
            missing.discard(name)
            place = places[name]
            came.add((id(place.module), place.name))
            try:
                place.fill(tensor)
            except (ShapeError, DtypeError) as error:
                misfits.append(f"{name} {error}")
                continue  # nothing will run: the rest is read only to name every fault at once
            waiting[id(place.module)] -= 1
            if not waiting[id(place.module)]:
                _finish(place.module)
        elif name in places:
            if name not in tied:
                twice.append(name)
        elif name.endswith(".bias") and not tensor.any():
            pass  # quantizers have written them for layers without one
        elif name not in tied and not any(fnmatch(found, pattern) for pattern in ignored):
            unexpected.append(found)
        if progress:
            progress(min(done, total), total)
    absent = {name for name in missing & maybe if (id(places[name].module), places[name].name) not in came}
    _complain(type(model).__name__, missing - absent, unexpected, twice, misfits)
    waited = [places[name].module for name in (*tied, *sorted(absent)) if name in places]
    for module in {id(module): module for module in waited}.values():
        _finish(module)
    if progress:
        progress(total, total)


def _complain(
    model: str,
    missing: Collection[str],
    unexpected: Collection[str],
    twice: Collection[str],
    misfits: Collection[str],
) -> None:
    """Raise UserError if there is anything to complain of."""
    problems = [f"it lacks {_some(missing)}"] if missing else []
    problems += [f"it has {_some(unexpected)} that the model does not know"] if unexpected else []
    problems += [f"it has twice {_some(twice)}"] if twice else []
    problems += [f"it has what does not fit in {_some(misfits)}"] if misfits else []
    if problems:
        raise UserError(f"the checkpoint does not fit {model}: {'; '.join(problems)}")


def _places(model: nn.Module) -> dict[str, Place]:
    """Checkpoint name -> place, for every parameter of the model; those of linear layers are created first."""
    packed: dict[str, tuple[str, ...]] = dict(getattr(type(model), "weights", {}))
    places = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in packed.get(last, ())]
        if isinstance(module, Linear):
            module.create(tuple(parts) or (path,))
        for name, _ in module.named_parameters(recurse=False):
            for part, original in enumerate(parts):
                places[f"{original}.{name}"] = Place(module, name, part)
            if not parts:
                places[f"{path}.{name}" if path else name] = Place(module, name, None)
    return places


def count_parameters(model: nn.Module) -> int:
    """Weights and biases of the model itself, however its linear layers hold them."""
    own = {id(p): p for m in model.modules() if not isinstance(m, Linear) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in own.values()) + sum(m.count() for m in model.modules() if isinstance(m, Linear))


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _finish(module: Any) -> None:
    finish = getattr(module, "finish", None)
    if finish is not None:
        finish()


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({shown})"
