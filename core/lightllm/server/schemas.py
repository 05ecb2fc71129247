"""What a JSON Schema that a client sends must be, before any grammar backend sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jsonschema_rs

from lightllm.server.protocol import ApiError, encode_json

MAX_BYTES = 256 << 10
MAX_DEPTH = 100

_DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/2019-09|draft/2020-12)/schema#?")


def check_schema(schema: Any, param: str) -> None:
    """Raises `ApiError` for what is too large, too deep or no JSON Schema (2020-12, or the draft that it names)."""
    if not isinstance(schema, (dict, bool)):
        raise ApiError(f"Invalid value for {param!r}: a JSON Schema is an object.", param=param)
    if depth(schema, MAX_DEPTH) > MAX_DEPTH:
        raise ApiError(f"Invalid value for {param!r}: it is nested more than {MAX_DEPTH} deep.", param=param)
    check_size(len(encode_json(schema)), param)
    if isinstance(schema, dict) and not _DRAFTS.fullmatch(str(schema.get("$schema"))):
        schema = {key: value for key, value in schema.items() if key != "$schema"}  # or it would be fetched
    try:
        jsonschema_rs.meta.validate(schema)
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        path = "".join(f"/{step}" for step in getattr(error, "instance_path", ()))
        reason = getattr(error, "message", str(error))
        at = f" at {path}" if path else ""
        raise ApiError(f"Invalid value for {param!r}: it is no JSON Schema: {reason}{at}.", param=param) from None


def check_size(size: int, param: str) -> None:
    if size > MAX_BYTES:
        raise ApiError(f"Invalid value for {param!r}: it has {size:,} bytes, over {MAX_BYTES:,}.", param=param)


def depth(value: Any, most: int) -> int:
    """How deep objects and lists are nested, counted up to one more than ``most``."""
    level, found = [value], 0
    while found <= most and (level := [item for item in level if isinstance(item, (Mapping, list))]):
        level = [inner for item in level for inner in (item.values() if isinstance(item, Mapping) else item)]
        found += 1
    return found
