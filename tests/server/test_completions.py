"""POST /v1/completions through the official client and real sockets, against a scripted engine."""

import itertools
import json

import openai
import pytest
from tokenizers.processors import TemplateProcessing

from lightllm.engine.request import Logprobs

PATH = "/v1/completions"
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def complete(server, prompt="ab", **fields):
    """Whole or streamed."""
    return server.openai.completions.create(model="tiny", prompt=prompt, **fields)


def whole(server, prompt="ab", **fields) -> dict:
    """Choice -> (text, finish reason, the lists of its logprobs)."""
    answer = complete(server, prompt, **fields)
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return {
        choice.index: (choice.text, choice.finish_reason, choice.logprobs and choice.logprobs.model_dump())
        for choice in answer.choices
    }


def streamed(server, prompt="ab", **fields) -> dict:
    """The same, added up from a stream's chunks."""
    found: dict = {}
    for chunk in complete(server, prompt, stream=True, **fields):
        (choice,) = chunk.choices
        text, finish, logprobs = found.get(choice.index, ("", None, None))
        assert finish is None, "nothing may follow the finish reason"
        if choice.logprobs is not None:
            new = choice.logprobs.model_dump()
            logprobs = {name: (logprobs[name] if logprobs else []) + new[name] for name in LISTS}
        found[choice.index] = text + choice.text, choice.finish_reason, logprobs
    return found


def repeats(kit):
    """A script that says its prompt and the choice's number, so that choices can be told apart."""
    return lambda prompt, params, index: kit.says(bytes(prompt) + f"/{index}".encode())(prompt, params, index)


# --- answers


def test_a_whole_answer_is_what_openai_sends(server):
    answer = complete(server)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "tiny"
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, "Hello!", "stop")]
    assert server.engine.last.prompt == list(b"ab")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 7, 9)
    assert usage.prompt_tokens_details.cached_tokens == 3
    raw = server.post(PATH, prompt="ab").json()
    assert raw["model"] == "tiny"
    assert raw["system_fingerprint"] is None
    assert raw["choices"][0]["logprobs"] is None
    assert "prompt_logprobs" not in raw["choices"][0]


def test_a_streamed_answer_is_what_openai_sends(server):
    events = server.events(PATH, prompt="ab", stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    *parts, usage = [json.loads(event) for event in events[:-1]]
    assert len({part["id"] for part in parts} | {usage["id"]}) == 1
    assert {part["object"] for part in parts} == {"text_completion"}
    assert all(part["usage"] is None for part in parts)
    choices = [part["choices"][0] for part in parts]
    assert "".join(choice["text"] for choice in choices) == "Hello!"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"] == server.post(PATH, prompt="ab").json()["usage"]
    assert all("usage" not in json.loads(event) for event in server.events(PATH, prompt="ab")[:-1])


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]], ids=str)
def test_every_form_of_a_prompt_reaches_the_engine_as_tokens(server, prompt):
    assert whole(server, prompt) == streamed(server, prompt) == {0: ("Hello!", "stop", None)}
    assert [generation.prompt for generation in server.engine.generations] == [[97, 98], [97, 98]]


@pytest.mark.parametrize("prompts", [["ab", "cde"], [[97, 98], [99, 100, 101]], ["ab", [99, 100, 101]]], ids=str)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_choices_of_several_prompts_come_prompt_by_prompt(server, kit, prompts, backwards):
    server.engine.script = repeats(kit)
    server.engine.backwards = backwards
    answer = complete(server, prompts, n=2)
    texts = ["ab/0", "ab/1", "cde/0", "cde/1"]
    assert [(c.index, c.text) for c in answer.choices] == list(enumerate(texts))
    assert [generation.n for generation in server.engine.generations] == [2, 2]
    # a prompt counts once whatever n, every choice has an end token
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, sum(len(text) + 1 for text in texts))
    assert answer.usage.prompt_tokens_details.cached_tokens == 6
    assert streamed(server, prompts, n=2) == {i: (text, "stop", None) for i, text in enumerate(texts)}
    usage = list(complete(server, prompts, n=2, stream=True, stream_options={"include_usage": True}))[-1].usage
    assert usage == answer.usage


def test_one_choices_stop_string_leaves_the_others_alone(server, kit):
    texts = {(97, 0): "a#and more", (97, 1): "to its end", (98, 0): "#and more", (98, 1): "bb#and more"}
    server.engine.script = lambda prompt, params, index: kit.says(texts[prompt[0], index])(prompt, params, index)
    server.engine.delay = 0.002
    expected = {0: ("a", "stop", None), 1: ("to its end", "stop", None), 2: ("", "stop", None), 3: ("bb", "stop", None)}
    for way in (whole, streamed):
        assert way(server, ["a", "b"], n=2, stop="#") == expected
        first, second = server.engine.generations[-2:]
        assert (first.aborted, second.aborted) == ([0], [0, 1])


def test_one_prompts_last_words_do_not_wait_for_the_other_prompts(server, kit):
    server.engine.script = lambda prompt, *_: iter([dict(tokens=[65], finish="length")] if prompt == [0] else forever)
    forever = itertools.repeat({})  # never a word
    server.engine.delay = 0.01
    with complete(server, [[0], [1]], stream=True, timeout=5) as stream:
        assert next(stream).choices[0].finish_reason == "length"
    kit.until(lambda: server.engine.last.aborted)


VARIANTS = [
    {},
    {"echo": True},
    {"logprobs": 2},
    {"echo": True, "logprobs": 1},
    {"echo": True, "logprobs": 0, "max_tokens": 0},
    {"echo": True, "max_tokens": 0},
    {"max_tokens": 3, "logprobs": 0},
    {"stop": "日", "logprobs": 1},
    {"stop": ["never", "/"], "echo": True, "extra_body": {"include_stop_str_in_output": True}},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("delay", [None, 0.001])
def test_streamed_and_whole_agree(server, kit, fields, delay):
    server.engine.script = lambda prompt, params, index: kit.says(f"é 日本 🙂/{index}")(prompt, params, index)
    server.engine.delay = delay
    server.engine.backwards = True
    prompts = ["é", [0xF0, 0x9F, 0x99, 0x82], "x"]
    found = whole(server, prompts, n=2, **fields)
    assert len(found) == 6
    assert streamed(server, prompts, n=2, **fields) == found


# --- length


def test_sixteen_tokens_are_made_unless_the_request_says_otherwise(server, kit):
    server.engine.script = kit.says("x" * 50)
    assert whole(server) == {0: ("x" * 16, "length", None)}
    assert server.engine.last.params.max_tokens == 16
    assert whole(server, max_tokens=20)[0][0] == "x" * 20
    assert whole(server, extra_body={"max_tokens": None})[0][0] == "x" * 16


def test_the_default_is_cut_to_what_the_context_leaves_but_a_wish_is_refused(server, kit):
    server.engine.script = kit.says("x" * 50)
    assert whole(server, ["a", "a" * 190])[1] == ("x" * 10, "length", None)
    assert whole(server, "a" * 190, max_tokens=10)[0][0] == "x" * 10
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, ["a", "a" * 190], max_tokens=11)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("n", [1, 2])
def test_no_token_is_made_where_none_was_asked_for(server, n):
    expected = {i: ("", "length", None) for i in range(n)}
    assert whole(server, max_tokens=0, n=n) == streamed(server, max_tokens=0, n=n) == expected
    assert complete(server, max_tokens=0, n=n).usage.completion_tokens == 0


# --- echo


@pytest.mark.parametrize("prompt", ["a🙂", list("a🙂".encode())], ids=["text", "tokens"])
def test_an_echo_puts_the_prompt_before_every_choice(server, kit, prompt):
    server.engine.script = lambda prompt, params, index: kit.says(f"?{index}")(prompt, params, index)
    expected = {0: ("a🙂?0", "stop", None), 1: ("a🙂?1", "stop", None)}
    assert whole(server, prompt, n=2, echo=True) == expected
    assert streamed(server, prompt, n=2, echo=True) == expected
    assert server.engine.last.params.prompt_logprobs is None


def test_an_echo_with_logprobs_scores_the_prompt(server, kit):
    server.engine.script = kit.says("!")
    ((text, finish, logprobs),) = whole(server, "abc", echo=True, logprobs=2).values()
    assert (text, finish) == ("abc!", "stop")
    assert logprobs["tokens"] == ["a", "b", "c", "!"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, *({token: -0.5, "z": -1.5} for token in "bc!")]
    assert logprobs["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]], ids=["text", "tokens"])
def test_a_prompt_is_scored_without_making_a_token(server, prompt):
    answer = complete(server, [prompt, prompt] if prompt == "abc" else prompt, echo=True, logprobs=0, max_tokens=0)
    for choice in answer.choices:
        assert (choice.text, choice.finish_reason) == ("abc", "length")
        assert choice.logprobs.tokens == ["a", "b", "c"]
        assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
        assert choice.logprobs.text_offset == [0, 1, 2]
    assert answer.usage.completion_tokens == 0


def test_every_choice_waits_for_its_own_prompts_score(server, kit):
    def script(prompt, params, index):
        if index == 0:  # brings the score, the second prompt's long after the first's
            yield from [{}] * (1 if prompt[0] == ord("a") else 5)
        yield from kit.says("!" if index else "!?!")(prompt, params, index)

    server.engine.script = script
    server.engine.delay = 0.005
    for way in (whole, streamed):
        found = way(server, ["ab", "cd"], n=2, echo=True, logprobs=0)
        scored = ["".join(logprobs["tokens"]) for _, (_, _, logprobs) in sorted(found.items())]
        assert scored == ["ab!?!", "ab!", "cd!?!", "cd!"]


@pytest.mark.parametrize("prompt", ["a<eos>b", [97, 256, 98]], ids=["text", "tokens"])
def test_offsets_of_an_echo_with_a_special_token_point_into_the_text(server, prompt):
    ((text, _, logprobs),) = whole(server, prompt, echo=True, logprobs=0).values()
    at = {token: text[offset:] for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True)}
    assert all(rest.startswith(token) for token, rest in at.items() if token in text)


# --- logprobs


def test_logprobs_have_openais_legacy_form(server):
    for way in (whole, streamed):
        ((_, _, logprobs),) = way(server, logprobs=3).values()
        assert logprobs["tokens"] == list("Hello!")
        assert logprobs["token_logprobs"] == [-0.5] * 6
        assert logprobs["top_logprobs"] == [{c: -0.5, "z": -1.5, "<eos>": -9999.0} for c in "Hello!"]
        assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert server.engine.last.params.prompt_logprobs is None
    assert whole(server, logprobs=0)[0][2]["top_logprobs"] == [{c: -0.5} for c in "Hello!"]


def test_the_chosen_token_is_listed_beside_the_likeliest(server):
    entry = Logprobs(65, -3.0, [(66, -0.5), (67, -1.0)])
    server.engine.script = lambda *_: iter([dict(tokens=[65], logprobs=[entry], finish="length")])
    assert whole(server, logprobs=2)[0][2]["top_logprobs"] == [{"A": -3.0, "B": -0.5, "C": -1.0}]


def test_offsets_count_characters(server, kit):
    server.engine.script = kit.says("é日x")
    assert whole(server, logprobs=0)[0][2]["text_offset"] == [0, 0, 1, 1, 1, 2]
    assert whole(server, "日", echo=True, logprobs=0)[0][2]["text_offset"] == [0, 0, 0, 1, 1, 2, 2, 2, 3]


def test_logprobs_without_a_token_are_empty_not_null(server, kit):
    server.engine.script = kit.says("")
    assert whole(server, logprobs=0) == {0: ("", "stop", {name: [] for name in LISTS})}


def test_prompt_logprobs_are_vllms_and_of_each_prompt(server):
    choices = server.post(PATH, prompt=["ab", "cde"], n=2, prompt_logprobs=1).json()["choices"]
    scores = [choice["prompt_logprobs"] for choice in choices]
    assert scores[0] == scores[1] == [None, {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]
    assert scores[2] == scores[3]
    assert [list(score) for score in scores[2][1:]] == [["100"], ["101"]]


# --- stop strings


def test_stop_strings_end_the_text_and_the_generation(server, kit):
    server.engine.script = kit.says("one##two" + "." * 50)
    server.engine.delay = 0.002
    for way in (whole, streamed):
        assert way(server, max_tokens=50, stop="##") == {0: ("one", "stop", None)}
        assert server.engine.last.aborted == [0]
        assert way(server, max_tokens=50, stop=["never", "e#"]) == {0: ("on", "stop", None)}
        kept = way(server, max_tokens=50, stop="##", extra_body={"include_stop_str_in_output": True})
        assert kept == {0: ("one##", "stop", None)}


def test_a_stop_string_in_the_echoed_prompt_does_not_count(server):
    assert whole(server, "a#b", echo=True, stop="#") == {0: ("a#bHello!", "stop", None)}


def test_logprobs_end_where_the_text_does(server, kit):
    server.engine.script = kit.says("ab##cd")
    for way in (whole, streamed):
        assert way(server, logprobs=0, stop="##")[0][2]["tokens"] == ["a", "b"]
        kept = way(server, logprobs=0, stop="##", extra_body={"include_stop_str_in_output": True})
        assert kept[0][2]["tokens"] == ["a", "b", "#", "#"]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("delay", [None, 0.002], ids=["at once", "one by one"])
def test_min_tokens_hold_for_stop_strings_however_the_tokens_arrive(server, kit, size, delay):
    server.engine.script = kit.says("#a#b", size=size)
    server.engine.delay = delay
    assert whole(server, stop="#", extra_body={"min_tokens": 3}) == {0: ("#a", "stop", None)}


# --- other fields


def test_best_of_is_taken_where_it_means_nothing(server):
    assert len(whole(server, n=2, best_of=2)) == 2
    assert len(whole(server, best_of=1)) == 1
    with pytest.raises(openai.BadRequestError, match="best_of") as caught:
        complete(server, n=1, best_of=2)
    assert caught.value.param == "best_of"


def test_a_suffix_is_refused(server):
    with pytest.raises(openai.BadRequestError, match="suffix") as caught:
        complete(server, suffix="end")
    assert caught.value.param == "suffix"
    assert whole(server, suffix="")[0][0] == "Hello!"


def test_there_is_an_end_to_how_many_choices_are_made_at_once(server):
    with pytest.raises(openai.BadRequestError, match="2048") as caught:
        complete(server, ["a"] * 17, n=128)
    assert caught.value.param == "prompt"
    assert len(whole(server, ["a"] * 16, n=4)) == 64


def test_special_tokens_are_added_and_shown_as_the_request_says(kit):
    engine = kit.FakeEngine(lambda *_: iter([dict(tokens=[65, kit.EOS, 66], finish="stop")]))
    tokenizer = kit.state_of(engine).tokenizer
    tokenizer.raw.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", kit.EOS)])
    with kit.running(engine, tokenizer=tokenizer) as server:
        assert whole(server, "a", echo=True)[0][0] == "aAB"
        assert engine.last.prompt == [kit.EOS, 97]
        shown = whole(server, "a", extra_body={"add_special_tokens": False, "skip_special_tokens": False})
        assert shown[0][0] == "A<eos>B"
        assert engine.last.prompt == [97]
        logprobs = whole(server, "a", echo=True, logprobs=0, max_tokens=0)[0][2]
        assert (logprobs["tokens"], logprobs["text_offset"]) == (["<eos>", "a"], [0, 0])
