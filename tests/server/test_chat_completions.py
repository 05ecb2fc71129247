"""Through the official client and real sockets, against a scripted engine."""

import json

import openai
import pytest


def joined(chunks, index=0):
    deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
    return "".join(d.delta.content or "" for d in deltas), deltas[-1].finish_reason


def test_a_whole_answer_is_what_openai_sends(server):
    answer = server.chat("hi")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls is None
    prompt = "<user>hi<assistant>"
    assert bytes(server.engine.last.prompt).decode() == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 7  # the end token too
    assert answer.usage.total_tokens == len(prompt) + 7
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    raw = server.post(model="tiny").json()
    assert raw["system_fingerprint"] is None
    assert raw["choices"][0]["logprobs"] is None


def test_a_streamed_answer_is_what_openai_sends(server):
    events = server.events(model="tiny", stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    *parts, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in parts)
    deltas = [chunk["choices"][0] for chunk in parts]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in delta["delta"] for delta in deltas[1:])
    assert [delta["finish_reason"] for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == "Hello!"


def test_no_usage_chunk_unless_asked(server):
    chunks = [json.loads(event) for event in server.events()[:-1]]
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert list(server.chat(stream=True))[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_streamed_and_whole_agree(server, kit, size):
    server.engine.script = kit.says("né 日本 🙂🙃 x", size=size)
    content, finish = joined(list(server.chat(stream=True)))
    whole = server.chat().choices[0]
    assert content == whole.message.content == "né 日本 🙂🙃 x"
    assert finish == whole.finish_reason == "stop"


def test_an_emoji_over_four_tokens_is_one_piece(server, kit):
    server.engine.script = kit.says("🙂")
    server.engine.delay = 0.01
    contents = [c.choices[0].delta.content for c in server.chat(stream=True)]
    assert [c for c in contents if c] == ["🙂"]
    server.engine.script = kit.says("a🙂".encode()[:-1])
    assert server.chat().choices[0].message.content == "a\ufffd"


def test_n_answers_come_apart(server, kit):
    texts = ["one", "twos", "three!"]
    server.engine.script = lambda prompt, params, index: kit.says(texts[index])(prompt, params, index)
    answer = server.chat(n=3)
    assert [c.message.content for c in answer.choices] == texts
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == sum(len(t) + 1 for t in texts)
    chunks = list(server.chat(n=3, stream=True))
    assert [joined(chunks, i) for i in range(3)] == [(t, "stop") for t in texts]
    roles = [c.choices[0].index for c in chunks if c.choices[0].delta.role]
    assert sorted(roles) == [0, 1, 2]
    assert len(server.engine.generations) == 2


def test_stop_strings_are_found_across_tokens_and_end_the_generation(server, kit):
    server.engine.script = kit.says("one two\n\nthree" + "." * 100)
    server.engine.delay = 0.002
    for stop in ("\n\n", ["xyz", "o\n\nt"]):
        whole = server.chat(stop=stop).choices[0]
        expected = "one two" if stop == "\n\n" else "one tw"
        assert (whole.message.content, whole.finish_reason) == (expected, "stop")
        assert server.engine.last.aborted == [0]
        chunks = list(server.chat(stop=stop, stream=True))
        assert joined(chunks) == (expected, "stop")
        assert server.engine.last.aborted == [0]
    kept = server.chat(stop="\n\n", extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.message.content == "one two\n\n"


def test_one_choices_stop_string_leaves_the_others_alone(server, kit):
    texts = ["a#b", "longer than that"]
    server.engine.script = lambda prompt, params, index: kit.says(texts[index])(prompt, params, index)
    answer = server.chat(n=2, stop="#")
    assert [c.message.content for c in answer.choices] == ["a", texts[1]]


def test_what_might_have_been_a_stop_string_is_not_lost(server, kit):
    server.engine.script = kit.says("a###")
    assert server.chat(stop="####").choices[0].message.content == "a###"
    assert joined(list(server.chat(stop="####", stream=True))) == ("a###", "stop")


def test_no_stop_string_counts_before_min_tokens(server, kit):
    server.engine.script = kit.says("#a#b")
    assert server.chat(stop="#", extra_body={"min_tokens": 3}).choices[0].message.content == "#a"


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_tokens_after_a_stop_string_are_not_counted(server, kit, at_once):
    """However many had come by then, and whether they were one message or several."""
    text = [ord(c) for c in "one#two" + "." * 100]

    def script(prompt, params, index):
        for i in range(0, len(text), at_once):
            step = text[i : i + at_once]
            logprobs = [kit.entry(token, 1) for token in step] if params.logprobs is not None else None
            yield dict(tokens=step, logprobs=logprobs, finish="length" if i + at_once >= len(text) else None)

    server.engine.script, server.engine.delay = script, None  # all of it is there at once
    for stop, count in (("#", 4), ("#t", 5), ("one#two.", 8), ("none", len(text))):
        answer = server.chat(stop=stop, logprobs=True)
        assert answer.usage.completion_tokens == count
        *_, last = server.chat(stop=stop, stream=True, stream_options={"include_usage": True})
        assert last.usage.completion_tokens == count
    assert server.chat(stop="#", extra_body={"min_tokens": 6}).usage.completion_tokens == len(text)


def test_logprobs_are_openais(server):
    answer = server.chat(logprobs=True, top_logprobs=3).choices[0]
    content = answer.logprobs.content
    assert "".join(t.token for t in content) == "Hello!"
    assert content[0].bytes == [ord("H")]
    assert content[0].logprob == -0.5
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("H", -0.5), ("z", -1.5), ("<eos>", -9999.0)]
    streamed = [
        t
        for c in server.chat(logprobs=True, top_logprobs=3, stream=True)
        if c.choices[0].logprobs
        for t in c.choices[0].logprobs.content
    ]
    assert streamed == content
    plain = server.chat(logprobs=True).choices[0].logprobs.content
    assert all(t.top_logprobs == [] for t in plain)
    assert server.engine.last.params.logprobs == 0


def test_logprobs_end_where_the_text_does(server, kit):
    server.engine.script = kit.says("ab##cd")
    for stream in (False, True):
        answer = server.chat(logprobs=True, stop="##", stream=stream)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        assert "".join(t.token for c in choices if c.logprobs for t in c.logprobs.content) == "ab"


def test_logprobs_of_half_characters_have_their_bytes(server, kit):
    server.engine.script = kit.says("é")
    tokens = server.chat(logprobs=True).choices[0].logprobs.content
    assert bytes(b for t in tokens for b in t.bytes).decode() == "é"


def test_the_length_ends_an_answer(server):
    answer = server.chat(max_tokens=2).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("He", "length")
    assert server.chat(max_completion_tokens=3, max_tokens=1).choices[0].message.content == "Hel"
    server.chat()
    assert server.engine.last.params.max_tokens == 200 - len("<user>hi<assistant>")


def test_prompt_logprobs_are_vllms(server):
    raw = server.post(prompt_logprobs=1).json()["prompt_logprobs"]
    assert raw[0] is None
    assert raw[1] == {str(ord("u")): {"logprob": -0.5, "rank": 1, "decoded_token": "u"}}
    assert len(raw) == len("<user>hi<assistant>")


def test_sampling_fields_reach_the_engine(server):
    server.chat(
        temperature=0.5,
        top_p=0.9,
        seed=7,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"65": 5, "66": -100},
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "stop_token_ids": [10],
            "ignore_eos": True,
        },
    )
    params = server.engine.last.params
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.9, 7)
    assert (params.presence_penalty, params.frequency_penalty) == (0.1, -0.2)
    assert params.logit_bias == {65: 5, 66: -100}
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.1)
    assert (params.min_tokens, params.stop_token_ids, params.ignore_eos) == (2, (10,), True)


def test_openais_other_fields_are_taken_in_silence(server):
    server.chat(
        user="me", metadata={"a": "b"}, store=False, service_tier="auto", response_format={"type": "text"},
        modalities=["text"], parallel_tool_calls=True, tool_choice="none", extra_body={"never_heard_of": 1},
    )  # fmt: skip
    assert server.engine.last.params.extra == {}


def test_the_template_gets_its_variables(kit):
    from lightllm.chat import ChatTemplate

    template = ChatTemplate("{{ messages[0].content }}|{{ mood }}|{{ reasoning_effort }}")
    with kit.running(chat_template=template) as server:
        server.chat(reasoning_effort="low", extra_body={"chat_template_kwargs": {"mood": "odd"}})
        assert bytes(server.engine.last.prompt) == b"hi|odd|low"


def test_a_final_message_is_continued(server):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once"}]
    server.post(messages=messages, continue_final_message=True)
    assert bytes(server.engine.last.prompt) == b"<user>hi<assistant>Once"


def test_special_tokens_are_shown_when_asked(server, kit):
    server.engine.script = lambda *_: iter([dict(tokens=[65, kit.EOS, 66], finish="stop")])
    assert server.chat().choices[0].message.content == "AB"
    assert server.chat(extra_body={"skip_special_tokens": False}).choices[0].message.content == "A<eos>B"


def test_what_is_there_already_comes_in_one_event(server, kit):
    server.engine.delay = None  # all of it at once
    server.engine.script = kit.says("x" * 100)
    contents = [c.choices[0].delta.content for c in server.chat(stream=True)]
    assert [c for c in contents if c] == ["x" * 100]


def test_many_streams_at_once_do_not_mix(server, kit):
    import asyncio

    server.engine.script = lambda prompt, params, index: kit.says(bytes(prompt[6:9]) * 20)(prompt, params, index)

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:

            async def one(number):
                stream = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"{number:03}"}], stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(32)))

    assert asyncio.run(all_of_them()) == [f"{i:03}" * 20 for i in range(32)]
