"""JSON Schemas as llguidance should see them: what it gets wrong refused, what it refuses without need taken out.

Reference: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import json
import re
from typing import Any

from lightllm.grammar import GrammarError

OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    # no \\uXXXX: a key could be spelt so that it is not recognised
    "json_allowed_escapes": 'nrbtf\\"',
}

LONGEST = 5000
"""Characters of one literal (an enum's entry, a name): a mask inside a longer one takes too long."""

EXACT = 2**53
"""Beyond this llguidance computes with rounded integers."""

FORMATS = frozenset(
    {
        "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6",
        "uri", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer", "relative-json-pointer",
        "regex", "uuid",
    }
)  # fmt: skip
"""JSON Schema's own; any other is only a remark."""

LONG = 64
"""Characters of a literal, and repetitions, from which on text that must come is no longer `modest`."""

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Their keys are names, not keywords."""

_SCHEMAS = frozenset(
    {
        "additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "else", "if", "items", "not", "oneOf",
        "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
    }
)  # fmt: skip
"""Where true is a schema."""

_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that llguidance drops from a literal, as `OPTIONS` allow no escape for them."""
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|[xu]\{([0-9a-fA-F]+)\}|([av])|.)", re.DOTALL)
_CLASS = re.compile(r"\\.|\[\^?\]?(?:[^]\\]|\\.)*\]", re.DOTALL)

REMARKS = frozenset({"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"})
_REFERENCES = frozenset({"$schema", "$id", "$ref"})
_COUNTS = frozenset({"minItems", "minLength", "minProperties"})


def prepared(schema: str) -> str:
    """Raises `GrammarError`."""
    value = _clean(json.loads(schema))
    if value is False:
        raise GrammarError("the schema false allows nothing")
    if not isinstance(value, dict):
        raise GrammarError("a JSON Schema is an object, true or false")
    if "json-schema.org/draft" not in str(value.get("$schema")):
        value.pop("$schema", None)  # llguidance insists on knowing it
    return json.dumps({**value, "x-guidance": OPTIONS})


def _clean(schema: Any) -> Any:
    """A copy for llguidance."""
    if schema is True:
        return {}
    if isinstance(schema, list):
        return [_clean(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):  # as draft 4 has them
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and bound in schema:
            schema[exclusive] = schema.pop(bound)
    _check_bounds(schema)
    out = {}
    for key, value in schema.items():
        if key in REMARKS or (key == "uniqueItems" and value is False):
            continue
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if key in ("const", "enum"):
            for literal in value if key == "enum" and isinstance(value, list) else [value]:
                _check_literal(literal)
                for text in filter(lambda leaf: isinstance(leaf, str), _leaves(literal)):
                    _check_characters(key, text)
        elif key == "pattern" and isinstance(value, str):
            _check_characters(key, _fixed_characters(value))
        elif key in MAPS and isinstance(value, dict):
            for name in value:
                _check_literal(name)
                if key == "patternProperties":
                    _check_characters(key, _fixed_characters(name))
            value = {name: _clean(inner) for name, inner in value.items()}
        elif isinstance(value, int) and abs(value) > EXACT:
            raise GrammarError(f"{key} is beyond 2**53: that cannot be enforced exactly")
        elif value is not True or key in _SCHEMAS:
            value = _clean(value)
        out[key] = value
    return out


def _check_literal(value: Any) -> None:
    if len(text := json.dumps(value)) > LONGEST:
        raise GrammarError(f"a literal of {len(text):,} characters is too long, {LONGEST:,} is the limit")
    if any(isinstance(leaf, int) and abs(leaf) > EXACT for leaf in _leaves(value)):
        raise GrammarError("integers beyond 2**53 cannot be enforced exactly")


def _check_characters(keyword: str, text: str) -> None:
    if found := _CONTROL.search(text):
        raise GrammarError(f"{keyword}: the control character U+{ord(found[0]):04X} cannot be enforced")


def _fixed_characters(pattern: str) -> str:
    """A pattern with its control characters spelt out and without its classes, but those of one character."""

    def spelt(escape: re.Match[str]) -> str:
        code = int(escape[1] or escape[2] or escape[3] or {"a": "7", "v": "b"}.get(escape[4], "20"), 16)
        return chr(code) if code < 128 and _CONTROL.match(chr(code)) else escape[0]

    return _CLASS.sub(lambda part: part[0][1] if len(part[0]) == 3 else "", _ESCAPE.sub(spelt, pattern))


def _check_bounds(schema: dict[str, Any]) -> None:
    """llguidance lets an exclusive bound itself through where the other one is less than 1 away."""
    low, high = (
        [schema[key] for key in keys if isinstance(schema.get(key), (int, float))]
        for keys in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    exclusive = "exclusiveMinimum" in schema or "exclusiveMaximum" in schema
    if low and high and exclusive and 0 < min(high) - max(low) < 1 and schema.get("type") != "integer":
        raise GrammarError("an exclusive bound less than 1 from the other bound cannot be enforced exactly")


def _leaves(value: Any) -> list[Any]:
    """What is in it and is no container; names are not."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for inner in value for leaf in _leaves(inner)] if isinstance(value, list) else [value]


def modest(schema: str) -> bool:
    """Whether no text that must come can be very long: literals and repetitions are short."""
    return _modest(json.loads(schema))


def _modest(schema: Any) -> bool:
    if isinstance(schema, list):
        return all(map(_modest, schema))
    if isinstance(schema, dict):
        return all(_modest_keyword(key, value) for key, value in schema.items())
    return _short(schema)


def _modest_keyword(key: str, value: Any) -> bool:
    if key in REMARKS or key in _REFERENCES:
        return True
    if key in _COUNTS:
        return isinstance(value, (int, float)) and value <= LONG
    if key == "pattern":
        return modest_pattern(str(value))
    if key == "const":
        return _short(value)
    if key == "enum" and isinstance(value, list):
        return all(map(_short, value))
    if key in MAPS and isinstance(value, dict):
        fits = modest_pattern if key == "patternProperties" else _short
        return all(fits(name) and _modest(inner) for name, inner in value.items())
    return _short(key) and _modest(value)


def _short(value: Any) -> bool:
    return len(json.dumps(value, ensure_ascii=False)) <= LONG


def modest_pattern(pattern: str) -> bool:
    return len(pattern) <= 4 * LONG and all(int(count) <= LONG for count in re.findall(r"\d+", pattern))
