"""What structured output costs: compiling a schema and masking the vocabulary, by llguidance and, if there, xgrammar.

    python benchmarks/grammars.py
    python benchmarks/grammars.py --tokenizer DIR/tokenizer.json --eos '<|eot_id|>' --seed 1

An answer is walked at random: each token drawn from those that every library allows, so that all of them are timed on
the same tokens, each time from a fresh matcher. Every figure is the best of ``--rounds``; the worst mask is the
slowest place of the walk.

xgrammar is no dependency, and it imports torch and transformers: install it in an environment of its own, and give
``--tokenizer`` there, or else the demo model's is taken from this project.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

try:
    import llguidance
except ImportError:
    sys.exit("benchmarks/grammars.py needs llguidance: pip install llguidance")
try:
    import xgrammar
except ImportError:
    xgrammar = None

IMPORT = """
import time
began = time.perf_counter()
import {name}
took = time.perf_counter() - began
import psutil, sys
print(took, psutil.Process().memory_info().rss / 1e6, int("torch" in sys.modules))
"""
CLOSES = '"]}'
EARLY = 20  # tokens in which no object is closed while there is another way, so that {} is no answer


class Library(Protocol):
    name: str

    def prepare(self, tokenizer: str, eos: int) -> None:
        """Take in a tokenizer: the text of its tokenizer.json."""

    def compile(self, source: Any) -> Any:
        """A matcher for a JSON Schema, or for a regex where the source is a str; nothing kept from before.

        Raises ValueError where the library refuses it.
        """

    def again(self, compiled: Any) -> Any:
        """Another matcher for what has been compiled already, as a server that keeps it would make one."""

    def mask(self, matcher: Any) -> Any:
        """Compute the allowed tokens, packed: int32 [ceil(vocab / 32)]."""

    def take(self, matcher: Any, token: int) -> None: ...

    def complete(self, matcher: Any) -> bool: ...


class Llguidance:
    name = "llguidance"

    def prepare(self, tokenizer: str, eos: int) -> None:
        self.tokenizer = llguidance.LLTokenizer(tokenizer, eos_token=eos)
        self.out = np.zeros((self.tokenizer.vocab_size + 31) // 32, dtype=np.int32)
        self.address = self.out.ctypes.data_as(ctypes.c_void_p).value

    def compile(self, source: Any) -> Any:
        if isinstance(source, str):
            grammar = llguidance.LLMatcher.grammar_from_regex(source)
        else:
            compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(source), defaults=compact)
        matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().splitlines()[0])
        return matcher

    def again(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def mask(self, matcher: Any) -> Any:
        matcher.unsafe_compute_mask_ptr(self.address, self.out.nbytes)
        return self.out

    def take(self, matcher: Any, token: int) -> None:
        if not matcher.consume_token(token):
            raise ValueError(matcher.get_error().splitlines()[0])

    def complete(self, matcher: Any) -> bool:
        return bool(matcher.is_accepting())


class Xgrammar:
    name = "xgrammar"

    def prepare(self, tokenizer: str, eos: int) -> None:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer))
        self.info = xgrammar.TokenizerInfo.from_huggingface(fast, stop_token_ids=[eos])
        self.out = xgrammar.allocate_token_bitmask(1, self.info.vocab_size)

    def compile(self, source: Any) -> Any:
        self.compiler = xgrammar.GrammarCompiler(self.info, max_threads=os.cpu_count() or 1)
        try:
            return self.again(source)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from None

    def again(self, compiled: Any) -> Any:
        """The compiler's cache has it by its source; a matcher leads back to no source, so here that is handed in."""
        if isinstance(compiled, str):
            grammar = self.compiler.compile_regex(compiled)
        else:  # JSON Schema's meaning, where an object may have further properties, rather than strict_mode's
            grammar = self.compiler.compile_json_schema(
                json.dumps(compiled), any_whitespace=False, separators=(",", ":"), strict_mode=False
            )
        return xgrammar.GrammarMatcher(grammar)

    def mask(self, matcher: Any) -> Any:
        if not matcher.fill_next_token_bitmask(self.out):  # it answers False, and leaves what was there, for "all"
            self.out.fill_(-1)
        return self.out.numpy()[0]

    def take(self, matcher: Any, token: int) -> None:
        if not matcher.accept_token(token):
            raise ValueError(f"token {token} refused")

    def complete(self, matcher: Any) -> bool:
        return bool(matcher.is_completed())


def record(properties: dict[str, Any], optional: bool = False) -> dict[str, Any]:
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return closed if optional else {**closed, "required": list(properties)}


def nested(depth: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": {"type": "string"}, "size": {"type": "integer"}}
    return record({**fields, "child": nested(depth - 1)} if depth > 1 else fields)


def several(kilobytes: int) -> dict[str, Any]:
    """Records that refer to each other, of so many kB in all, as a code generator writes them."""
    kinds = [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"enum": ["low", "middle", "high"]}]
    kinds += [{"type": "array", "items": {"type": "number"}}, {"anyOf": [{"type": "string"}, {"type": "null"}]}]
    definitions: dict[str, Any] = {}
    schema = {"$ref": "#/$defs/record_0", "$defs": definitions}
    while len(json.dumps(schema)) < kilobytes * 1000:
        number = len(definitions)
        fields = {f"field_{number}_{i}": {**kind, "description": "What it holds."} for i, kind in enumerate(kinds)}
        if number:
            before: Any = {"$ref": f"#/$defs/record_{number - 1}"}
            definitions[f"record_{number - 1}"]["properties"]["next"] = {"$ref": f"#/$defs/record_{number}"}
            fields["back"] = {"anyOf": [before, {"type": "null"}]}
        definitions[f"record_{number}"] = record(fields)
    return schema


CASES: dict[str, Any] = {
    "small object": record({"name": {"type": "string"}, "age": {"type": "integer"}, "adult": {"type": "boolean"}}),
    "object, depth 5": nested(5),
    "array of objects": {"type": "array", "items": nested(1), "minItems": 5},
    "enum of 1,000": record({"code": {"enum": [f"item-{i * 7919 % 100003:05d}" for i in range(1000)]}}),
    "$defs with anyOf": {
        "$defs": {
            "Cat": record({"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 0, "maximum": 9}}),
            "Dog": record({"kind": {"const": "dog"}, "tricks": {"type": "array", "items": {"type": "string"}}}),
            "Pet": {"anyOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
        },
        **record({"owner": {"type": "string"}, "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}}}),
    },
    "regex": r"(\+\d{1,3} )?\(\d{3}\) \d{3}-\d{4}( ext\. [0-9]{1,5})?",
    "pattern and formats": record(
        {
            "plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,4}$"},
            "when": {"type": "string", "format": "date-time"},
            "id": {"type": "string", "format": "uuid"},
            "mail": {"type": "string", "format": "email"},
        }
    ),
    "string of 500 to 2,000": record({"essay": {"type": "string", "minLength": 500, "maxLength": 2000}}),
    "any object": {"type": "object"},
    "any JSON": {},
    "200 optional fields": record({f"field_{i}": {"type": "integer"} for i in range(200)}, optional=True),
    "schema of 100 kB": several(100),
}


def walk(matchers: list[tuple[Library, Any]], words: list[str], seed: int, limit: int) -> tuple[list[int], str]:
    """An answer that all libraries allow, and why it ended; closing quotes and brackets are preferred now and then."""
    chance = random.Random(seed)
    closes = np.array([any(c in CLOSES for c in word) for word in words])
    spoken = np.array([bool(word) for word in words])  # special tokens have no text here
    ends = np.array(["}" in word for word in words])
    tokens: list[int] = []
    while len(tokens) < limit:
        if tokens and all(library.complete(matcher) for library, matcher in matchers):
            return tokens, "complete"
        masks = [np.unpackbits(lib.mask(m).view(np.uint8), bitorder="little")[: len(words)] for lib, m in matchers]
        choice = np.flatnonzero(np.bitwise_and.reduce(masks) & spoken)
        going_on = choice[~ends[choice]]
        if len(tokens) < EARLY and len(going_on):
            choice = going_on
        closing = choice[closes[choice]]
        if len(closing) and chance.random() < 0.3:
            choice = closing
        if not len(choice):
            return tokens, "they agree on no token"
        token = int(choice[chance.randrange(len(choice))])
        for library, matcher in matchers:
            library.take(matcher, token)
        tokens.append(token)
    return tokens, "cut"


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = do()
    return time.perf_counter() - began, result


def replay(library: Library, matcher: Any, tokens: list[int]) -> list[float]:
    """Seconds of each mask along an answer."""
    took = []
    for token in tokens:
        took.append(timed(partial(library.mask, matcher))[0])
        library.take(matcher, token)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; the demo model's unless given")
    parser.add_argument("--eos", help="its end-of-sequence token, as text; needed with --tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=200, help="tokens of an answer at most")
    args = parser.parse_args()
    write = sys.stdout.write

    from tokenizers import Tokenizer

    if args.tokenizer is None:
        text, eos = demo()
        tokenizer = Tokenizer.from_str(text)
    else:
        text = args.tokenizer.read_text()
        tokenizer = Tokenizer.from_str(text)
        eos = tokenizer.token_to_id(args.eos or "")
        if eos is None:
            parser.error("--eos must name a token of --tokenizer")
    special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    words = [
        "" if i in special else tokenizer.decode([i], skip_special_tokens=False)
        for i in range(tokenizer.get_vocab_size())
    ]

    libraries: list[Library] = [Llguidance()]
    if xgrammar is None:
        write("xgrammar is not installed: llguidance alone.\n")
    else:
        libraries.append(Xgrammar())

    write(f"{tokenizer.get_vocab_size():,} tokens\n\n")
    write(f"{'':12}{'import s':>10}{'RSS MB':>10}{'torch':>8}{'tokenizer s':>13}\n")
    for library in libraries:
        name = library.name
        runs = [
            subprocess.run([sys.executable, "-c", IMPORT.format(name=name)], capture_output=True, check=True, text=True)
            for _ in range(args.rounds)
        ]
        figures = [[float(figure) for figure in run.stdout.split()] for run in runs]
        took, memory, torch = (min(column) for column in zip(*figures, strict=True))
        ready = min(timed(partial(library.prepare, text, eos))[0] for _ in range(args.rounds))
        write(f"{name:12}{took:10.2f}{memory:10.0f}{'yes' if torch else 'no':>8}{ready:13.2f}\n")

    columns = f"{'compile':>10}{'again':>9}{'mask':>9}{'worst':>9}"
    write(f"\n{'milliseconds':26}{''.join(f'{lib.name:>37}' for lib in libraries)}\n")
    write(f"{'':26}{columns * len(libraries)}{'tokens':>8}\n")
    for name, source in CASES.items():
        cells: dict[str, str] = {}
        matchers = []
        for library in libraries:
            try:
                compiles = [timed(partial(library.compile, source)) for _ in range(args.rounds)]
            except ValueError as error:
                cells[library.name] = f"{str(error)[:34]:>37}"
                continue
            matcher = compiles[-1][1]
            kept = matcher if library.name == "llguidance" else source
            again = min(timed(partial(library.again, kept))[0] for _ in range(args.rounds))
            cells[library.name] = f"{min(took for took, _ in compiles) * 1e3:10.2f}{again * 1e3:9.3f}"
            matchers.append((library, matcher))
        tokens, ended = walk(matchers, words, args.seed, args.limit)
        for library, _ in matchers:
            rounds = [replay(library, library.compile(source), tokens) for _ in range(args.rounds)]
            best = [min(column) for column in zip(*rounds, strict=True)]
            cells[library.name] += f"{statistics.mean(best) * 1e3:9.3f}{max(best) * 1e3:9.3f}"
        write(f"{name:26}{''.join(cells[lib.name] for lib in libraries)}{len(tokens):8}  {ended}\n")
        sys.stdout.flush()


def demo() -> tuple[str, int]:
    """The demo model's tokenizer, fetched where it is not here, and its end-of-sequence token."""
    from lightllm.assemble import open_checkpoint
    from lightllm.config import Config
    from lightllm.plugins import Plugins, Recipe

    plugins = Plugins.discover(Recipe())
    _, checkpoint, _ = open_checkpoint(plugins, Path(plugins.resolve_model("demo", None, Config())))
    tokenizer = checkpoint.tokenizer()
    return tokenizer.to_str(), tokenizer.token_to_id("<|im_end|>")


if __name__ == "__main__":
    main()
