"""Every error is OpenAI's, names what is at fault, and leaves the server as it was."""

import json
import logging
import socket

import msgspec
import openai
import pytest

from lightllm import Reasoning, Text
from lightllm.engine.client import EngineUnavailable

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def error_of(response, status=400, *, type="invalid_request_error", param=None, code=None) -> str:
    """The message of an error that must be in OpenAI's form, with these fields."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    return message_of(response.json(), type=type, param=param, code=code)


def message_of(body, **fields) -> str:
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    message = body["error"].pop("message")
    assert isinstance(message, str) and message
    assert body["error"] == {"param": None, "code": None, **fields}
    return message


@pytest.fixture(autouse=True)
def alive(server):
    """After every test the same server still answers."""
    yield
    server.engine.__init__()
    assert server.chat().choices[0].message.content == "Hello!"


# --- what cannot be read


@pytest.mark.parametrize(
    "body", [b"", b"{", b"hello", b'{"messages": ', b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}'], ids=repr
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_json_is_refused(server, path, body):
    assert "not valid JSON" in error_of(server.http.post(path, content=body))


@pytest.mark.parametrize("body", ["[]", "null", "1", '"text"', "true"])
def test_json_that_is_no_object_is_refused(server, body):
    assert "object" in error_of(server.http.post(CHAT, content=body))


@pytest.mark.parametrize("field", ["messages", "never_heard_of", "response_format", "chat_template_kwargs"])
def test_deep_nesting_is_the_clients_mistake(server, field):
    message = '{"role": "user", "content": "hi"}'
    for depth in (*range(900, 1010, 5), 100_000):
        deep = '{"x":' * depth + "1" + "}" * depth
        body = f'{{"messages": [{message}], "{field}": {deep}}}'
        assert server.http.post(CHAT, content=body).status_code in (200, 400)
    error_of(server.http.post(CHAT, content=body))


def test_what_is_nested_too_deeply_for_the_template_is_the_clients_mistake(server):
    message = '{"role": "user", "content": "hi"}'
    for depth in range(900, 1010, 5):
        deep = '{"x":' * depth + "1" + "}" * depth
        tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]'
        response = server.http.post(CHAT, content=f'{{"messages": [{message}], "tools": {tools}}}')
        assert response.status_code == 400, depth


def test_deep_nesting_in_a_calls_arguments_is_no_fault_of_the_server(server):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    response = server.post(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert response.status_code in (200, 400), response.text


# --- what is wrong in itself

WRONG_IN_BOTH = [
    ({"model": 5}, "model"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"logit_bias": {"65": 101}}, "logit_bias"),
    ({"logit_bias": {"A": 1}}, "logit_bias"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"stop": 1}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [1, "2"]}, "stop_token_ids[1]"),
    ({"stop_token_ids": [257]}, "stop_token_ids"),
    ({"min_tokens": 12, "max_tokens": 11}, "min_tokens"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"response_format": "text"}, "response_format"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_IN_BOTH, ids=lambda value: json.dumps(value)[:50])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_wrong_value_is_refused_by_the_name_of_its_field(server, path, fields, param):
    fields = fields if path == CHAT else {"prompt": "a", **fields}
    message = error_of(server.post(path, **fields), param=param)
    assert param in message or "vocabulary" in message
    assert server.engine.generations == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_conversation_is_refused_by_the_place_of_the_fault(server, fields, param):
    error_of(server.post(**fields), param=param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], [1, "a"]]}, "prompt[1][1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [[1], [2**70]]}, "prompt[1][0]"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 0}, "best_of"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_a_wrong_prompt_is_refused_by_the_place_of_the_fault(server, fields, param):
    error_of(server.post(COMPLETIONS, **fields), param=param)


@pytest.mark.parametrize("field", ["top_k", "claimed"])
def test_numbers_that_cannot_cross_to_the_engine_never_do(kit, field):
    with kit.running(claims={"claimed": None}) as server:
        for value in (2**63, 2**64, 2**70):
            response = server.post(**{field: value})
            if response.status_code == 200:
                msgspec.msgpack.encode(server.engine.last.params)
            else:
                error_of(response, param=field)


def test_the_official_client_raises_its_own_errors(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat(temperature=3)
    error = caught.value
    assert (error.status_code, error.type, error.param, error.code) == (
        400,
        "invalid_request_error",
        "temperature",
        None,
    )
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.completions.create(model="gpt-4", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "gpt-4" in str(caught.value) and "tiny" in str(caught.value)


# --- what is too long, or not here


@pytest.mark.parametrize("fields", [{"prompt": "a" * 200}, {"prompt": "a" * 100, "max_tokens": 101}], ids=len)
def test_what_the_context_cannot_hold_is_refused(server, fields):
    message = error_of(server.post(COMPLETIONS, **fields), param="prompt", code="context_length_exceeded")
    assert "200 tokens" in message
    messages = [{"role": "user", "content": fields["prompt"]}]
    chat = server.post(messages=messages, max_tokens=fields.get("max_tokens"))
    error_of(chat, param="messages", code="context_length_exceeded")
    assert server.engine.generations == []


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nope", "/v1/chat"])
def test_an_unknown_path_is_404(server, path):
    error_of(server.http.get(path), 404)
    error_of(server.http.post(path, json={}), 404)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", CHAT), ("PUT", COMPLETIONS), ("POST", "/v1/models"), ("DELETE", "/health")]
)
def test_a_wrong_method_is_405_and_says_which_are_right(server, method, path):
    response = server.http.request(method, path)
    error_of(response, 405)
    assert ("GET" if method in ("POST", "DELETE") else "POST") in response.headers["allow"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413(kit, monkeypatch, chunked):
    monkeypatch.setattr("lightllm.server.app.MAX_BODY_BYTES", 10_000)
    with kit.running() as server:
        body = json.dumps({"prompt": "a" * 20_000}).encode()
        content = iter([body[:9_000], body[9_000:]]) if chunked else body
        assert "too large" in error_of(server.http.post(COMPLETIONS, content=content), 413)
        assert server.post(COMPLETIONS, prompt="a").status_code == 200


def test_messages_without_a_template_are_refused_with_a_way_out(kit):
    with kit.running(chat_template=None) as server:
        assert "--chat-template" in error_of(server.post(), param="messages", code="no_chat_template")
        assert server.post(COMPLETIONS, prompt="a").status_code == 200


def test_text_that_the_model_has_no_embedding_for_is_refused(server):
    """As of a token that was added to the tokenizer and not to the model."""
    server.engine.ready = msgspec.structs.replace(server.engine.ready, vocab_size=ord("z"))
    assert server.post(COMPLETIONS, prompt="y").status_code == 200
    for path, param in ((CHAT, "messages"), (COMPLETIONS, "prompt")):
        fields = {"messages": [{"role": "user", "content": "z"}]} if path == CHAT else {"prompt": "z"}
        assert "122 is not in the model's vocabulary" in error_of(server.post(path, **fields), param=param)


def test_numbers_no_machine_holds_are_refused_in_few_words(server):
    message = '{"role":"user","content":"a"}'
    for digits in (20, 4300, 4301):
        huge = "9" * digits
        for field in (
            f'"max_tokens":{huge}',
            f'"logit_bias":{{"{huge}":1}}',
            f'"stop_token_ids":[{huge}]',
            f'"top_k":{huge}',
        ):
            answer = server.http.post(CHAT, content=f'{{"messages":[{message}],{field}}}')
            assert answer.status_code == 400 and len(answer.text) < 300
        assert server.http.post(COMPLETIONS, content=f'{{"prompt":[{huge}]}}').status_code == 400


def test_a_body_that_breaks_off_is_the_clients_matter(server, caplog):
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{{".encode())
    assert server.post().status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- fields we do not honour


def test_an_unknown_field_is_ignored_and_noted(server, caplog):
    caplog.set_level(logging.DEBUG, "lightllm.server")
    assert server.post(never_heard_of=1, metadata={}).status_code == 200
    (record,) = [record for record in caplog.records if record.name == "lightllm.server"]
    assert record.levelno == logging.DEBUG and "never_heard_of" in record.getMessage()


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag"}},
        {"stream_options": {"include_usage": True}},
        {"prompt_logprobs": 0, "stream": True},
        {"functions": []},
        {"function_call": "auto"},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
        {"modalities": ["text", "audio"]},
        {"top_logprobs": 2},
        {"echo": True},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_a_field_that_cannot_be_honoured_is_refused(server, fields):
    name = next(iter(fields))
    assert name in error_of(server.post(**fields), param=name) or name == "modalities"
    assert server.engine.generations == []


def test_claimed_fields_reach_the_engine_once_their_plugin_agrees(kit):
    seen = []

    def agrees(fields):
        seen.append(dict(fields))
        return "it is not a number" if fields.get("depth") == "deep" else None

    def breaks(fields):
        raise RuntimeError("secret")

    claims = {"depth": agrees, "width": agrees, "broken": breaks, "free": None}
    with kit.running(claims=claims) as server:
        assert server.post(depth=1, width=[2], free={"x": 1}, other=3, n=2).status_code == 200
        assert server.engine.last.params.extra == {"depth": 1, "width": [2], "free": {"x": 1}}
        assert seen == [{"depth": 1, "width": [2]}]
        assert server.post(COMPLETIONS, prompt="a", depth=None, width=2).status_code == 200
        assert server.engine.last.params.extra == {"width": 2}
        message = error_of(server.post(depth="deep"), param="depth")
        assert "it is not a number" in message
        assert "secret" not in error_of(server.post(broken=1), 500, type="server_error")


# --- what is not the client's fault


def test_without_an_engine_it_is_503_and_worth_trying_again(server):
    server.engine.healthy = False
    for path in (CHAT, COMPLETIONS):
        for stream in (False, True):
            response = server.post(path, prompt="a", stream=stream)
            assert "died" in error_of(response, 503, type="server_error")
            assert int(response.headers["retry-after"]) > 0
    with pytest.raises(openai.InternalServerError):
        server.chat()
    server.engine.ready = None
    assert "loading" in error_of(server.post(), 503, type="server_error")


def fails_midway(error):
    def script(prompt, params, index):
        yield dict(tokens=[65])
        if isinstance(error, Exception):
            raise error
        yield dict(tokens=[], finish="error", error=error)

    return script


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]], ids=["one", "two"])
def test_an_engine_error_midway_is_500_or_an_error_event(server, caplog, prompt, n):
    server.engine.script = fails_midway("no more room")
    fields = {"prompt": prompt, "n": n, "max_tokens": 5}
    message = error_of(server.post(COMPLETIONS, **fields), 500, type="server_error")
    assert "no more room" in message
    id = message.partition("error id ")[2].rstrip(")")
    assert id and id in caplog.text
    *parts, last = server.events(COMPLETIONS, **fields)
    assert "no more room" in message_of(json.loads(last), type="server_error")
    assert json.loads(parts[0])["choices"][0]["text"] == "A"
    assert all(json.loads(part)["choices"][0]["finish_reason"] is None for part in parts)


@pytest.mark.parametrize("error", [EngineUnavailable("the engine has died"), RuntimeError("secret")], ids=repr)
def test_an_engine_that_dies_midway_fails_the_answer(server, error):
    server.engine.script = fails_midway(error)
    status = 503 if isinstance(error, EngineUnavailable) else 500
    assert "secret" not in error_of(server.post(), status, type="server_error")
    *parts, last = server.events()
    assert "secret" not in message_of(json.loads(last), type="server_error")
    assert '"A"' in "".join(parts)
    with pytest.raises(openai.APIError):
        list(server.chat(stream=True))


class Fragile:
    """Small letters are thought. It cannot take a #, nor end after a ~, nor begin at all where it is told to refuse."""

    def __init__(self, prompt):
        self.last = ""
        if "refuse" in prompt:
            raise RuntimeError("cannot begin")

    def push(self, text):
        for self.last in text:
            if self.last == "#":
                raise RuntimeError("cannot read")
            yield Reasoning(self.last) if self.last.islower() else Text(self.last)

    def close(self):
        if self.last == "~":
            raise RuntimeError("cannot end")
        return ()


@pytest.mark.parametrize(("text", "why"), [("aB#C", "cannot read"), ("aB~", "cannot end")])
def test_a_parser_that_raises_fails_only_its_request(kit, text, why):
    def script(prompt, params, index):
        return kit.says(text if b"bad" in bytes(prompt) else "aBCDEFGH")(prompt, params, index)

    def messages(content):
        return [{"role": "user", "content": content}]

    with kit.running(
        kit.FakeEngine(script), reasoning_parser=Fragile, reasoning_parser_name="the parser of Fragile"
    ) as server:
        server.engine.delay = 0.01
        with server.chat("good", stream=True) as good:
            assert why in error_of(server.post(messages=messages("bad")), 500, type="server_error")
            *parts, last = server.events(messages=messages("bad"))
            assert "the parser of Fragile" in message_of(json.loads(last), type="server_error")
            assert "B" in [json.loads(part)["choices"][0]["delta"].get("content") for part in parts]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in good) == "BCDEFGH"
        error_of(server.post(messages=messages("refuse")), 500, type="server_error")
        assert server.chat("good").choices[0].message.content == "BCDEFGH"
