"""Random JSON Schemas, the same for the same seed, and a strict reading of what is answered to them.

A schema is bounded: whatever is answered to it is short, unless a model nests a recursive definition on and on, or
writes digit after digit of a fraction, or a key that it may choose; such schemas are few. Left out is what a grammar
cannot say (uniqueItems, not, if), and what llguidance says more loosely than a checker reads it: format date has a 30th
of February, and above 98 but below 98.5 it allows 98.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

DEPTH = 5
NAMES = [
    "a",
    "b",
    "id",
    "name",
    "kind",
    "tags",
    "x y",
    "type",
    "items",
    "größe",
    "城市",
    'the "q"',
    "back\\slash",
    "n_1",
]
WORDS = ["red", "green", "", "no", "Ja", "a b", 'say "hi"', "北京", "null", "10", "naïve", "\\", "tab\t", "🙂"]
PATTERNS = [
    r"^[a-z]{2,5}$",
    r"^[A-Z]{2}-[0-9]{1,3}$",
    r"^(red|green|blue)$",
    r"^[0-9]{4}-(0[1-9]|1[0-2])$",
    r"^#[0-9a-f]{6}$",
    r"^\d{2}:\d{2}$",
    r'^"\w{1,3}" [^x]$',
]
FORMATS = [{"format": "ipv4"}, {"format": "uuid"}, {"format": "email", "maxLength": 12}]


def random_schema(seed: int, *, top: str | None = None) -> Schema:
    """``top``: "object" for what must be one, as a tool's parameters."""
    return _Maker(Random(seed)).whole(top)


def read_json(text: str) -> Any:
    """What ``text`` says, its fractions exact: to a float 0.99999999999999999999 would be 1.

    Raises ValueError for what is not JSON or has whitespace in it outside strings.
    """
    value = json.loads(text, parse_float=Decimal, parse_constant=_refuse)
    if re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)):
        raise ValueError("there is whitespace in it")
    return value


def faults(text: str, schema: Schema) -> str:
    """Why ``text`` is no compact JSON that ``schema`` allows; "" when it is."""
    checker = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    try:
        return "; ".join(error.message for error in checker.iter_errors(read_json(text)))
    except ValueError as error:
        return str(error)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class _Maker:
    """``size``: how many scalars the answer may hold, about; it is shared out among what is nested."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.definitions: dict[str, Schema] = {}

    def whole(self, top: str | None) -> Schema:
        size = self.random.randint(1, 6)
        kind = top or self.random.choices(["object", "array", "any", "scalar"], [7, 1, 1, 1])[0]
        if kind == "object":
            schema = self.random.choices([self.object, self.map], [9, 1])[0](DEPTH, size)
        elif kind == "array":
            schema = self.array(DEPTH, size)
        elif kind == "any":
            schema = self.any_of(DEPTH, size)
        else:
            schema = self.scalar()
        if self.definitions:
            schema = schema | {"$defs": self.definitions}
        if self.random.random() < 0.2:
            schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Answer"} | schema
        return schema

    def value(self, depth: int, size: int) -> Schema:
        if depth <= 1:
            return self.scalar()
        nested: dict[Callable[[int, int], Schema], int] = {
            self.object: 4,
            self.array: 3,
            self.any_of: 2,
            self.reference: 2,
            self.map: 1,
        }
        if self.random.random() < (0.75 if size <= 1 else 0.15):
            return self.scalar()
        return self.random.choices(list(nested), list(nested.values()))[0](depth, size)

    # --- what holds others

    def object(self, depth: int, size: int) -> Schema:
        count = min(self.random.randint(1, 4), size)
        names = self.random.sample(NAMES, count)
        schema: Schema = {
            "type": "object",
            "properties": {
                name: self.value(depth - 1, part) for name, part in zip(names, self.parts(size, count), strict=True)
            },
            "required": [name for name in names if self.random.random() < 0.7],
            "additionalProperties": False,
        }
        if not schema["required"] and self.random.random() < 0.5:
            del schema["required"]
        if self.random.random() < 0.03:
            schema |= {"required": names, "additionalProperties": {"type": "boolean"}, "maxProperties": count + 1}
        return schema

    def map(self, depth: int, size: int) -> Schema:
        value = self.value(depth - 1, max(1, size // 2))
        if self.random.random() < 0.1:
            return {"type": "object", "additionalProperties": value, "maxProperties": 2}
        return {
            "type": "object",
            "patternProperties": {"^[a-z]{1,4}$": value},
            "additionalProperties": False,
            "maxProperties": 2,
        }

    def array(self, depth: int, size: int) -> Schema:
        most = self.random.randint(1, 3)
        if self.random.random() < 0.15:
            items = [self.value(depth - 1, part) for part in self.parts(size, most)]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": self.random.randint(0, most)}
        schema: Schema = {
            "type": "array",
            "items": self.value(depth - 1, max(1, size // most)),
            "minItems": self.random.randint(0, most),
            "maxItems": most,
        }
        if schema["minItems"] == 0:
            del schema["minItems"]
        return schema

    def any_of(self, depth: int, size: int) -> Schema:
        options = [self.value(depth - 1, size) for _ in range(self.random.randint(1, 2))]
        options.insert(self.random.randint(0, 1), {"type": "null"} if self.random.random() < 0.5 else self.scalar())
        return {"anyOf": options}

    def reference(self, depth: int, size: int) -> Schema:
        """To a definition made before, to a new one, or to one that refers to itself: it can always end."""
        done = [name for name, definition in self.definitions.items() if definition]
        name = f"def{len(self.definitions)}"
        if done and self.random.random() < 0.4:
            name = self.random.choice(done)
        elif self.random.random() < 0.7:
            self.definitions[name] = {}  # its name is taken, and it cannot yet be referred to: it could never end
            self.definitions[name] = self.object(min(depth, 3), max(1, size // 2))
        else:
            own = {"$ref": f"#/$defs/{name}"}
            again: Schema = self.random.choice(
                [own, {"anyOf": [{"type": "null"}, own]}, {"type": "array", "items": own, "maxItems": 1}]
            )
            self.definitions[name] = {
                "type": "object",
                "properties": {"v": self.scalar(), "next": again},
                "required": ["v"],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}

    def parts(self, size: int, count: int) -> list[int]:
        """``size`` in ``count`` parts, each at least 1."""
        parts = [1] * count
        for _ in range(size - count):
            parts[self.random.randrange(count)] += 1
        return parts

    # --- scalars

    def scalar(self) -> Schema:
        kinds: dict[Callable[[], Schema], int] = {
            self.string: 5,
            self.integer: 4,
            self.number: 2,
            self.enum: 3,
            self.const: 1,
            lambda: {"type": "boolean"}: 2,
            lambda: {"type": "null"}: 1,
            lambda: {"type": ["string", "null"], "maxLength": 6}: 1,
            lambda: {"type": ["integer", "boolean"], "minimum": 0, "maximum": 99}: 1,
        }
        return self.random.choices(list(kinds), list(kinds.values()))[0]()

    def string(self) -> Schema:
        choice = self.random.random()
        if choice < 0.2:
            return {"type": "string", "pattern": self.random.choice(PATTERNS)}
        if choice < 0.3:
            return {"type": "string"} | self.random.choice(FORMATS)
        most = self.random.randint(1, 10)
        return {"type": "string", "maxLength": most} | ({"minLength": 1} if self.random.random() < 0.3 else {})

    def integer(self) -> Schema:
        least = self.random.randint(-200, 200)
        most = least + self.random.choice([8, 20, 1000])  # at least one multiple of 7 between them, also exclusively
        return (
            {"type": "integer"}
            | self.bounds(least, most)
            | ({"multipleOf": self.random.choice([2, 3, 5, 7])} if self.random.random() < 0.3 else {})
        )

    def number(self) -> Schema:
        least = self.random.randint(-400, 400) / 4
        return {"type": "number"} | self.bounds(least, least + self.random.choice([1, 10, 250]))

    def bounds(self, least: float, most: float) -> Schema:
        return {
            self.random.choice(["minimum", "exclusiveMinimum"]): least,
            self.random.choice(["maximum", "exclusiveMaximum"]): most,
        }

    def enum(self) -> Schema:
        values: list[Any] = [*WORDS, 1, -20, 2.5, True, None, [1], {"k": "v"}]
        if self.random.random() < 0.6:
            values = WORDS
        return {"enum": self.random.sample(values, self.random.randint(1, 4))}

    def const(self) -> Schema:
        return {"const": self.random.choice([*WORDS, 0, 7, -1.5, False, None, {"k": [1, None]}])}
