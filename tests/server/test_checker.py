"""The process that compiles grammars first: whatever becomes of it, the server gets an answer in time."""

import asyncio
import sys
import time

import msgspec
import psutil
import pytest

from lightllm import grammar as g
from lightllm.assemble import Start
from lightllm.config import Config
from lightllm.grammar import GrammarError
from lightllm.plugins import Recipe
from lightllm.server.checker import SECONDS, GrammarChecker
from lightllm.server.protocol import ApiError

COMMAND = [sys.executable, "-m", "lightllm", "check-grammars"]


def start(**recipe):
    return msgspec.msgpack.encode(Start(config=Config(), recipe=Recipe(**recipe), path=""))


def chain(length):
    """``$ref`` after ``$ref``: a compiler that follows them by recursion needs a deep stack."""
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return g.json({"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "null"}}})


def allof(count):
    return g.json({"allOf": [{"pattern": f".*{c}.{{{c}}}b.*"} for c in range(1, count)], "type": "string"})


def with_checker(work, **recipe):
    async def run():
        checker = GrammarChecker(COMMAND, start(**recipe))
        try:
            return await work(checker)
        finally:
            await checker.close()

    return asyncio.run(run())


async def verdict(checker, grammar):
    try:
        await checker.check(grammar)
    except GrammarError as error:
        return str(error)
    return ""


def test_what_compiles_passes_and_what_does_not_is_refused():
    async def work(checker):
        await checker.warm()
        assert await verdict(checker, g.Regex("a+")) == ""
        assert "uniqueItems" in await verdict(checker, g.json({"uniqueItems": True}))
        assert "uniqueItems" in await verdict(checker, g.json({"uniqueItems": True})), "the verdict is remembered"
        # several at once: each gets its own answer
        grammars = [g.Regex("x" * i if i % 2 else "(") for i in range(10)]
        verdicts = await asyncio.gather(*(verdict(checker, grammar) for grammar in grammars))
        assert [bool(v) for v in verdicts] == [i % 2 == 0 for i in range(10)]

    with_checker(work)


@pytest.mark.parametrize(
    "grammar",
    [
        g.json({"type": "integer", "multipleOf": 99999999}),
        g.json({"properties": {"a": {"allOf": [{"multipleOf": n} for n in (97, 101, 103)]}}}),
        allof(100),
        chain(5000),
        g.Rules("start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "b"\n' for i in range(4000)) + 'r4000: "c"\n'),
    ],
    ids=["multipleOf", "multipleOfs", "patterns", "refs", "rules"],
)
def test_hostile_ones_are_answered_in_time_and_the_next_too(grammar):
    async def work(checker):
        await checker.warm()
        began = time.monotonic()
        answer = await verdict(checker, grammar)
        assert time.monotonic() - began < 5 * SECONDS  # however busy this machine is
        assert answer == "" or "compil" in answer or "too" in answer
        assert await verdict(checker, g.Regex("a+")) == ""

    with_checker(work)


def test_one_that_takes_too_long_ends_the_process_and_not_the_server():
    async def work(checker):
        await checker.warm()
        before = checker._process.pid
        assert await verdict(checker, g.json({"type": "integer", "multipleOf": 99999999})) == (
            f"it takes longer than {SECONDS} s to compile"
        )
        assert not psutil.pid_exists(before)
        assert await verdict(checker, g.Regex("a+")) == ""

    with_checker(work)


def test_a_busy_machine_is_not_held_against_the_grammar(monkeypatch):
    async def work(checker):
        await checker.warm()
        process = psutil.Process(checker._process.pid)
        process.suspend()  # it gets no processor
        checking = asyncio.create_task(verdict(checker, g.Regex("a+")))
        await asyncio.sleep(2 * SECONDS)
        assert not checking.done()
        process.resume()
        assert await checking == ""

        process.suspend()
        monkeypatch.setattr("lightllm.server.checker.PATIENCE_SECONDS", 0.2)
        with pytest.raises(ApiError, match="in time") as caught:
            await checker.check(g.Regex("b+"))
        assert (caught.value.status, caught.value.headers) == (503, {"retry-after": "1"})
        monkeypatch.undo()
        assert await verdict(checker, g.Regex("b+")) == ""

    with_checker(work)


def test_a_process_that_dies_is_replaced():
    async def work(checker):
        await checker.warm()
        checker._process.kill()
        first, second = [await verdict(checker, g.Regex("a+")) for _ in range(2)]
        assert first == "" or "memory" in first
        assert second == "", "that it died is not held against the grammar"

    with_checker(work)


def test_a_client_that_goes_away_leaves_no_answer_for_the_next():
    async def work(checker):
        await checker.warm()
        slow = asyncio.create_task(checker.check(g.json({"type": "integer", "multipleOf": 99999999})))
        await asyncio.sleep(0.1)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert await verdict(checker, g.Regex("a+")) == ""
        assert "regex" in await verdict(checker, g.Regex("("))

    with_checker(work)


def test_without_a_backend_it_says_so():
    async def work(checker):
        for _ in range(2):
            assert "no grammar backend can serve this model: none is installed" in await verdict(checker, g.Regex("a+"))

    with_checker(work, blocked=("grammar",))


def test_it_ends_with_the_server():
    async def work(checker):
        await checker.warm()
        process = psutil.Process(checker._process.pid)
        checker._process.stdin.close()  # as when the server is gone, however it went
        await asyncio.to_thread(process.wait, 10)

    with_checker(work)


def test_it_is_light():
    async def work(checker):
        await checker.check(g.json({"type": "object"}))
        process = psutil.Process(checker._process.pid)
        assert process.memory_info().rss < 100e6
        assert not any("torch" in mapped.path for mapped in process.memory_maps())

    with_checker(work)
