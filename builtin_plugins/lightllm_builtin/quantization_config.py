"""What config.json's ``quantization_config`` says, for the linear methods that read it: which layers are quantized, and
how. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lightllm import ModelInfo, UserError

if TYPE_CHECKING:
    from lightllm.nn.layers import Linear

Scheme = TypeVar("Scheme")

Schemes = Callable[[str, bool], Scheme | None]
"""(a layer's name, whether it gives logits) -> how it is held, as a method has it; None: it is not quantized."""

Readers = Mapping[str, Callable[[dict[str, Any]], Schemes[Scheme]]]
"""quant_method -> what reads its settings. It may raise `Unsupported`, and KeyError for a setting that is not there."""


class Unsupported(Exception):
    """Goes on from "its quantization"."""


def quantization(info: ModelInfo) -> dict[str, Any]:
    found = info.get("quantization_config")
    return found if isinstance(found, dict) else {}


def read(info: ModelInfo, readers: Readers[Scheme]) -> tuple[str, Schemes[Scheme]]:
    """The quant_method, and the schemes. Raises UserError for what is not supported."""
    config = quantization(info)
    method = str(config.get("quant_method"))
    if method not in readers:
        raise UserError(f"{info.path}: its quant_method is {method!r}; supported: {', '.join(readers)}")
    try:
        return method, readers[method](config)
    except Unsupported as error:
        raise UserError(f"{info.path}: its {method} quantization {error}") from None
    except KeyError as error:
        raise UserError(f"{info.path}: its {method} quantization does not say its {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{info.path}: its quantization_config cannot be read: {error}") from None


def why_not(info: ModelInfo, readers: Readers[Any]) -> str | None:
    """For a record's ``matches``."""
    if not quantization(info):
        return "the checkpoint is not quantized"
    try:
        read(info, readers)
    except UserError as error:
        return str(error)
    return None


def one_of(config: Mapping[str, Any], key: str, supported: tuple[Any, ...], *names: str, default: Any = None) -> Any:
    """``config[key]``, or what it has under another of its ``names``."""
    found = next((config[name] for name in (key, *names) if config.get(name) is not None), default)
    if found is None:
        raise KeyError(key)
    if found not in supported:
        raise Unsupported(f"has {key} {found!r}; supported: {', '.join(map(str, supported))}")
    return found


def in_modules(keys: Iterable[str] | None) -> Callable[[str], bool]:
    """Whether a layer's name has one of the ``keys``, regular expressions of whole pieces between dots, as
    ``modules_to_not_convert`` has them. "re:" before one is dropped."""
    patterns = [re.compile(rf"(?:.*\.)?(?:{key.removeprefix('re:')})(?:\.|$)") for key in keys or ()]
    return lambda name: any(pattern.match(name) for pattern in patterns)


def compressed_tensors(
    config: dict[str, Any], formats: tuple[str, ...], scheme: Callable[[Mapping[str, Any]], Scheme]
) -> Schemes[Scheme]:
    """Of the library of this name. ``scheme``: of one of its config_groups."""
    layout = one_of(config, "format", formats)
    sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        raise Unsupported(f"has sparsity_config format {sparsity!r}; supported: dense")
    groups: dict[str, Scheme] = {}
    for group in config["config_groups"].values():
        one_of(group, "format", formats, default=layout)
        groups |= dict.fromkeys(group.get("targets") or (), scheme(group))
    ignored = list(config.get("ignore") or ())
    for text in (*groups, *ignored):
        re.compile(text.removeprefix("re:"))

    def of(name: str, head: bool) -> Scheme | None:
        if "Linear" in ignored or any(_is(name, text) for text in ignored):
            return None
        # the most specific: by name, by pattern, by class
        for target in sorted(groups, key=lambda text: text.startswith("re:")):
            if _is(name, target):
                return groups[target]
        return groups.get("Linear")

    return of


def _is(name: str, text: str) -> bool:
    return re.match(text[3:], name) is not None if text.startswith("re:") else text == name


def scheme_of(layer: Linear, path: str, schemes: Schemes[Scheme]) -> Scheme | None:
    """Raises UserError if its parts have different ones. A tied layer is never quantized."""
    if layer.tied:
        return None
    found = {name: schemes(name, layer.head) for name in layer.names}
    first, scheme = next(iter(found.items()))
    for name, other in found.items():
        if other != scheme:
            raise UserError(
                f"{path}: {first} and {name} are one layer here, so they must be quantized alike; "
                f"found {scheme or 'plain weights'} and {other or 'plain weights'}"
            )
    return scheme
