"""Answers held to a grammar by a real engine: whatever else is in the batch, and whatever a backend does."""

from __future__ import annotations

import functools
import json
import re
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lightllm import GrammarBackendRecord, hookimpl
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.engine import Engine
from lightllm.engine.request import Abort, Generate, Output, SamplingParams, joined
from lightllm.grammar import Fixed, Grammar, GrammarError, Joined, OneOf, Regex, Rules
from lightllm.grammar import json as json_of
from lightllm.plugins import Plugins, Recipe
from lightllm.tokenizer import level_bytes
from lightllm_builtin.grammar.backend import Llguidance, Matcher

EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    write_checkpoint(folder, "llama-bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda char: level_bytes(char)[0])
    vocab = {"<unk>": 0, "<bos>": 1, "<eos>": EOS} | {char: 3 + i for i, char in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<bos>", "<eos>")])
    raw.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return build_engine(Config(max_total_tokens=2000, device="cpu"), Plugins.discover(), folder)


def request(id: str, grammar: Grammar | None, n: int = 1, **params: Any) -> Generate:
    given = {"max_tokens": 60, "temperature": 1.0, "seed": sum(id.encode()), **params}
    return Generate(id=id, prompt=[1, 70, 80], params=SamplingParams(grammar=grammar, **given), n=n)


def text(output: Output) -> str:
    assert output.error is None, output.error
    return bytes(token - 3 for token in output.tokens).decode(errors="replace")


def test_answers_fit_beside_others_that_are_free(engine: Engine) -> None:
    free = engine.generate(request("free", None))["free", 0].tokens
    done = engine.generate(
        *[request(f"s{i}", json_of(SCHEMA), n=3) for i in range(4)],
        request("free", None),
        *[request(f"r{i}", Regex("[a-c]{2,4}-[0-9]"), temperature=0.0) for i in range(2)],
        request("choice", OneOf((Fixed("yes"), Fixed("no")))),
    )
    for i in range(4):
        for index in range(3):
            output = done[f"s{i}", index]
            value = json.loads(text(output))
            assert value.keys() == {"n", "ok"} and 0 <= value["n"] <= 99
            assert output.finish == "stop" and output.stop_token is None
    assert re.fullmatch("[a-c]{2,4}-[0-9]", text(done["r0", 0]))
    assert text(done["choice", 0]) in ("yes", "no")
    assert done["free", 0].tokens == free


def test_choices_differ_and_seeds_repeat(engine: Engine) -> None:
    first = engine.generate(request("x", Regex("[a-z]{12}"), n=3))
    again = engine.generate(request("x", Regex("[a-z]{12}"), n=3))
    texts = [text(first["x", i]) for i in range(3)]
    assert len(set(texts)) == 3
    assert texts == [text(again["x", i]) for i in range(3)]


def test_preempted_answers_go_on_where_they_were(folder: Path) -> None:
    roomy = build_engine(Config(max_total_tokens=2000, device="cpu"), Plugins.discover(), folder)
    tight = build_engine(Config(max_total_tokens=64, max_model_len=60, device="cpu"), Plugins.discover(), folder)
    requests = [request(f"p{i}", Regex("[a-z]{30}")) for i in range(4)]
    want, got = roomy.generate(*requests), tight.generate(*requests)
    assert tight.scheduler.stats().preemptions > 0
    assert {k: text(o) for k, o in got.items()} == {k: text(o) for k, o in want.items()}
    assert all(len(text(o)) == 30 for o in got.values())


def test_max_tokens_inside_is_a_length_and_at_the_very_end_a_stop(engine: Engine) -> None:
    cut = engine.generate(request("a", Regex("[a-z]{9}"), max_tokens=5))["a", 0]
    assert (cut.finish, len(text(cut))) == ("length", 5)
    whole = engine.generate(request("a", Regex("[a-z]{9}"), max_tokens=9))["a", 0]
    assert (whole.finish, len(text(whole))) == ("stop", 9)


def test_an_answer_that_may_end_ends_by_the_end_of_sequence(engine: Engine) -> None:
    output = engine.generate(request("a", Regex("a*"), max_tokens=200, logit_bias={EOS: 5.0}))["a", 0]
    assert set(text(output)) <= {"a"}
    assert (output.finish, output.stop_token) == ("stop", EOS)


@pytest.mark.parametrize("early", [{"min_tokens": 20}, {"ignore_eos": True}, {"min_tokens": 20, "ignore_eos": True}])
def test_a_complete_answer_ends_whatever_was_asked(engine: Engine, early: dict[str, Any]) -> None:
    output = engine.generate(request("a", OneOf((Fixed("yes"), Fixed("no"))), **early))["a", 0]
    assert text(output) in ("yes", "no")
    assert output.finish == "stop"


def test_min_tokens_are_kept_where_the_grammar_can(engine: Engine) -> None:
    output = engine.generate(request("a", Regex("[a-z]*"), min_tokens=25, logit_bias={EOS: 20.0}))["a", 0]
    assert len(text(output)) == 25


def test_an_empty_answer_is_one(engine: Engine) -> None:
    for params in ({}, {"min_tokens": 3}):
        output = engine.generate(request("a", Fixed(""), **params))["a", 0]
        assert (output.tokens, output.finish) == ([], "stop")


def test_tokens_without_a_choice_come_without_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Joined((Regex("[a-z]{3}"), Fixed(" crosses the road at "), Regex("[0-9]")))
    steps = 0
    engine.add(request("a", grammar))
    outputs = []
    while engine.busy:
        outputs += engine.step().outputs
        steps += 1
    forced = functools.reduce(joined, outputs)
    assert steps < 8 and len(forced.tokens) == 25
    for size in range(1, 25):
        cut = engine.generate(request("a", grammar, max_tokens=size))["a", 0]
        assert (cut.tokens, cut.finish) == (forced.tokens[:size], "length")
    assert engine.generate(request("a", grammar, max_tokens=25))["a", 0].finish == "stop"
    monkeypatch.setattr(Matcher, "forced", lambda self: [])
    stepwise = engine.generate(request("a", grammar))["a", 0]
    assert (stepwise.tokens, stepwise.finish) == (forced.tokens, forced.finish)


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    output = engine.generate(request("a", Fixed("zebra"), logprobs=2))["a", 0]
    assert output.logprobs is not None and [entry.token for entry in output.logprobs] == output.tokens
    assert all(-100 < entry.logprob < 0 and len(entry.top) == 2 for entry in output.logprobs)
    free = engine.generate(request("b", None, logprobs=2, max_tokens=1))["b", 0]
    assert free.logprobs is not None and free.logprobs[0].top == output.logprobs[0].top


def test_a_grammar_that_cannot_be_compiled_fails_its_request_only(engine: Engine) -> None:
    done = engine.generate(request("bad", json_of({"not": {}}), n=2), request("good", json_of({"type": "null"})))
    assert text(done["good", 0]) == "null"
    for index in (0, 1):
        assert done["bad", index].finish == "error" and "not" in (done["bad", index].error or "")


def test_a_request_can_be_dropped_while_its_grammar_is_compiled(engine: Engine) -> None:
    engine.add(request("gone", Fixed("never")))
    engine.abort(Abort(id="gone"))
    assert not engine.busy
    assert text(engine.generate(request("next", Fixed("yes")))["next", 0]) == "yes"


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: Future[list[Any]] = Future()
    monkeypatch.setattr(engine._grammars, "compile", lambda *_: waiting)
    engine.add(request("gone", Fixed("never")))
    engine.abort(Abort(id="gone"))
    assert waiting.cancelled()


HOSTILE = [
    Regex("(?:a?){500}a{500}"),
    Regex("(a{1,1000}){1,1000}"),
    Regex("a{1000000}{1000000}"),
    Regex("(.*a.*){30}"),
    Regex(".*a.{200}b"),
    json_of(
        {
            "$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(3000)} | {"d3000": {}},
            "$ref": "#/$defs/d0",
        }
    ),
    Rules('start: s\ns: s s s | "a" | ""\n'),
    Rules('root ::= x{10000}\nx ::= "a"{10000}\n'),
    Rules('root ::= root root | "a"\n'),
    json_of({"type": "array", "minItems": 50000, "items": {"const": "a" * 4000}}),
    json_of({"properties": {"a": {"$ref": "#"}, "k": {"const": "x" * 60}}, "required": ["k", "a"]}),
]
"""Each of these made some step of some library take minutes, or gigabytes."""


@pytest.mark.parametrize("grammar", HOSTILE, ids=lambda g: str(g)[:30])
def test_hostile_grammars_do_no_harm(engine: Engine, grammar: Grammar) -> None:
    done = engine.generate(request("bad", grammar, max_tokens=30), request("free", None, max_tokens=5, ignore_eos=True))
    assert done["bad", 0].finish in ("length", "stop", "refused")
    assert len(done["free", 0].tokens) == 5


# --- what other backends may do


released = threading.Event()


class Moody(Llguidance):
    """Does wrong what its regex says."""

    def compile(self, grammar: Grammar) -> Any:
        if grammar == Regex("slow"):
            assert released.wait(60)
        if grammar == Regex("compile"):
            raise KeyError("no such thing")
        if grammar == Regex("refuse"):
            raise GrammarError("I will not")
        matcher = super().compile(grammar)
        if grammar == Regex("accept"):
            matcher.accept = lambda token: False
        if grammar == Regex("fill"):
            matcher.raw = None
        return matcher


class Provider:
    @hookimpl
    def lightllm_grammar_backends(self) -> list[GrammarBackendRecord]:
        return [GrammarBackendRecord(name="moody", target=f"{__name__}:Moody", priority=1)]


@pytest.fixture(scope="module")
def moody(folder: Path) -> Engine:
    return build_engine(
        Config(max_total_tokens=2000, device="cpu"), Plugins.discover(extra=[("moody", Provider())]), folder
    )


@pytest.mark.parametrize(
    ("way", "finish", "message"),
    [
        ("compile", "error", "the grammar backend moody/moody (extra) failed: KeyError: 'no such thing'"),
        ("refuse", "error", "I will not"),
        ("accept", "refused", "no token is left"),
        ("fill", "error", "the grammar backend moody/moody (extra) failed: "),
    ],
)
def test_a_failing_backend_fails_the_requests_that_need_it(moody: Engine, way: str, finish: str, message: str) -> None:
    done = moody.generate(request("bad", Regex(way)), request("free", None, max_tokens=5))
    assert done["bad", 0].finish == finish
    assert message in (done["bad", 0].error or "")
    assert len(done["free", 0].tokens) == 5 or done["free", 0].stop_token == EOS
    assert not moody.busy


def test_others_go_on_while_a_grammar_is_compiled(moody: Engine) -> None:
    moody.add(request("slow", Regex("slow")))
    moody.add(request("free", None, max_tokens=20, ignore_eos=True))
    ended: list[str] = []
    while moody.busy:
        ended += [output.id for output in moody.step().outputs if output.finish]
        if ended == ["free"]:
            released.set()
    assert ended == ["free", "slow"]


def test_without_a_backend_only_requests_with_a_grammar_fail(folder: Path) -> None:
    plugins = Plugins.discover(Recipe(blocked=("grammar",)))
    engine = build_engine(Config(max_total_tokens=500, device="cpu"), plugins, folder)
    done = engine.generate(request("a", Fixed("x")), request("b", None, max_tokens=3, ignore_eos=True))
    assert "no grammar backend can serve this model: none is installed" in (done["a", 0].error or "")
    assert len(done["b", 0].tokens) == 3
