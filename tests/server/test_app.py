"""Models, tokens, health, the API key, what plugins mount and observe, and clients that go away."""

import contextlib
import importlib.metadata
import itertools
import json
import socket

import httpx
import openai
import pytest
from litestar import get
from litestar.exceptions import HTTPException
from tokenizers.processors import TemplateProcessing

from lightllm import Listener, UserError
from lightllm.config import Config
from lightllm.server.plugin_parts import named_lifespan, plugin_router

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


# --- models


def test_models_are_listed_by_all_their_names(server):
    models = list(server.openai.models.list())
    assert [model.id for model in models] == ["tiny", "org/alias"]
    assert {model.object for model in models} == {"model"}
    assert all(model.created > 1_700_000_000 and model.owned_by for model in models)
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 200


@pytest.mark.parametrize("path", ["tiny", "org/alias", "org%2Falias"])
def test_a_model_is_found_by_its_name_slashes_and_all(server, path):
    found = server.http.get(f"/v1/models/{path}").json()
    assert (found["id"], found["object"]) == (path.replace("%2F", "/"), "model")
    assert server.openai.models.retrieve(found["id"]).id == found["id"]


def test_a_model_that_is_not_served_is_not_found(server):
    for name in ("other", "org/other", "org"):
        with pytest.raises(openai.NotFoundError) as caught:
            server.openai.models.retrieve(name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        server.openai.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        assert server.post(path, model="other", **fields).status_code == 404


def test_an_answer_comes_under_the_name_that_was_asked_for(server):
    for path in (CHAT, COMPLETIONS):
        assert server.post(path, prompt="a", model="org/alias").json()["model"] == "org/alias"
        assert server.post(path, prompt="a").json()["model"] == "tiny"
        assert json.loads(server.events(path, prompt="a", model="org/alias")[0])["model"] == "org/alias"


def test_any_model_name_is_answered_where_the_server_was_told_so(kit):
    with kit.running(config=Config(any_model_name=True)) as server:
        assert server.post(model="gpt-4").json()["model"] == "gpt-4"
        assert server.openai.models.retrieve("org/gpt-4").id == "org/gpt-4"
        assert [model.id for model in server.openai.models.list()] == ["tiny", "org/alias"]


# --- health, version


def test_health_follows_the_engine(server):
    assert server.http.get("/health").status_code == 200
    server.engine.healthy = False
    dead = server.http.get("/health")
    assert dead.status_code == 503
    assert "died" in dead.json()["error"]["message"]
    server.engine.__init__()
    server.engine.ready = None
    loading = server.http.get("/health")
    assert loading.status_code == 503
    assert "loading" in loading.json()["error"]["message"]
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] is None


def test_the_version_is_the_distributions(server):
    assert server.http.get("/version").json() == {"version": importlib.metadata.version("lightllm-serve")}


# --- tokens


@pytest.mark.parametrize(
    "text", ["hello", "né 日本 🙂", "a<eos>b", "x" * 50_000], ids=["ascii", "utf-8", "special", "long"]
)
def test_tokens_go_there_and_back(server, text):
    answer = server.post("/tokenize", prompt=text).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["tokens"] == server.post("/tokenize", prompt=text).json()["tokens"]
    assert answer["max_model_len"] == 200
    assert answer["token_strs"] is None
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_tokens_are_shown_one_by_one_when_asked(server):
    answer = server.post("/tokenize", prompt="aé<eos>", return_token_strs=True).json()
    assert answer["tokens"] == [97, 0xC3, 0xA9, 256]
    assert answer["token_strs"] == ["a", "\ufffd", "\ufffd", "<eos>"]


def test_messages_are_tokenized_as_a_chat_would_send_them(server):
    messages = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f"}}
    for fields in ({}, {"tools": [tool]}):
        tokens = server.post("/tokenize", messages=messages, **fields).json()["tokens"]
        server.post(messages=messages, **fields)
        assert tokens == server.engine.last.prompt
    bare = server.post("/tokenize", messages=messages, add_generation_prompt=False).json()["tokens"]
    assert bytes(bare) == b"<user>hi"
    messages.append({"role": "assistant", "content": "Once"})
    continued = server.post("/tokenize", messages=messages, continue_final_message=True).json()["tokens"]
    assert bytes(continued) == b"<user>hi<assistant>Once"


def test_special_tokens_are_added_to_texts_but_not_to_messages(kit):
    tokenizer = kit.state_of(None).tokenizer
    tokenizer.raw.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", kit.EOS)])
    messages = [{"role": "user", "content": "hi"}]
    with kit.running(tokenizer=tokenizer) as server:

        def begins_specially(**fields):
            return server.post("/tokenize", **fields).json()["tokens"][0] == kit.EOS

        assert begins_specially(prompt="a")
        assert not begins_specially(prompt="a", add_special_tokens=False)
        assert not begins_specially(messages=messages)
        assert begins_specially(messages=messages, add_special_tokens=True)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**32]}, "tokens[0]"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(server, path, fields, param):
    response = server.post(path, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_ids_beyond_the_vocabulary_decode_to_nothing(server):
    assert server.post("/detokenize", tokens=[97, 257, 2**32 - 1, 98]).json() == {"prompt": "ab"}


# --- browsers

PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


def test_no_page_may_call_a_server_that_was_not_told_so(server):
    for method in ("GET", "OPTIONS"):
        answer = server.http.request(method, "/v1/models", headers={"origin": "https://a.example", **PREFLIGHT})
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("allowed", "seen"), [(("https://a.example", "http://localhost:3000"), "https://a.example"), (("*",), "*")]
)
def test_pages_of_an_allowed_origin_may_call(kit, allowed, seen):
    origin = {"origin": "https://a.example"}
    with kit.running(config=Config(allowed_origins=allowed, api_key="s3cret")) as server:
        asked = server.http.options(CHAT, headers={**origin, **PREFLIGHT})  # browsers send no key with it
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, seen)
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert {"authorization", "content-type"} <= set(asked.headers["access-control-allow-headers"].split(", "))
        headers = {**origin, "authorization": "Bearer s3cret"}
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": "a"}], "stream": stream}
            assert server.http.post(CHAT, json=body, headers=headers).headers["access-control-allow-origin"] == seen
        wrong = server.http.get("/v1/models", headers=origin)
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (401, seen)  # the page sees why
        other = server.http.options(CHAT, headers={"origin": "https://b.example", **PREFLIGHT})
        assert ("access-control-allow-origin" in other.headers) == (seen == "*")


# --- the API key


@pytest.fixture(scope="module")
def locked(kit):
    """A server with an API key and two routes of a plugin."""

    @get("/plugin")
    async def plugin() -> str:
        return "mine"

    @get("/open", opt={"open": True})
    async def open_to_all() -> str:
        return "yours"

    with kit.running(config=Config(api_key="s3cret"), routes=[plugin, open_to_all]) as server:
        yield server


def test_the_right_key_opens(locked):
    assert locked.openai.with_options(api_key="s3cret").models.list().data
    assert locked.http.get("/v1/models", headers={"authorization": "bearer s3cret"}).status_code == 200


WRONG_KEYS = [None, "", "Bearer", "Bearer wrong", "Bearer s3cre", "Bearer s3cret2", "s3cret", "Basic s3cret"]


@pytest.mark.parametrize("header", [*WRONG_KEYS, b"Bearer \xe9\xff"], ids=repr)
def test_no_key_and_every_wrong_one_are_told_the_same_way(locked, header):
    headers = {} if header is None else {"authorization": header}
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", COMPLETIONS), ("POST", "/tokenize")):
        response = locked.http.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert "s3cret" not in error.pop("message")
        assert error == {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert locked.engine.generations == []


def test_the_official_client_knows_a_wrong_key(locked):
    with pytest.raises(openai.AuthenticationError) as caught:
        locked.chat()
    assert caught.value.code == "invalid_api_key"


def test_health_and_version_need_no_key(locked):
    assert locked.http.get("/health").status_code == 200
    assert locked.http.get("/version").status_code == 200


def test_a_plugins_route_is_behind_the_key_unless_it_says_otherwise(locked):
    assert locked.http.get("/plugin").status_code == 401
    assert locked.http.get("/plugin", headers={"authorization": "Bearer s3cret"}).text == "mine"
    assert locked.http.get("/open").text == "yours"


# --- plugins


def test_plugins_routes_are_served_inside_their_lifespans(kit):
    events = []

    @contextlib.asynccontextmanager
    async def lifespan(name):
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    @get("/events")
    async def route() -> list[str]:
        return events

    with kit.running(routes=[route], lifespans=[lifespan("a"), lifespan("b")]) as server:
        assert server.http.get("/events").json() == ["enter a", "enter b"]
    assert events == ["enter a", "enter b", "leave b", "leave a"]


def test_a_plugins_route_that_fails_is_answered_in_openais_form(kit):
    @get("/breaks")
    async def breaks() -> None:
        raise RuntimeError("secret")

    @get("/refuses")
    async def refuses() -> None:
        raise HTTPException(status_code=409, detail="not twice")

    with kit.running(routes=[breaks, refuses]) as server:
        broken, refused = server.http.get("/breaks"), server.http.get("/refuses")
        assert broken.status_code == 500
        assert broken.json()["error"]["type"] == "server_error" and "secret" not in broken.text
        assert refused.status_code == 409
        assert refused.json()["error"]["message"] == "not twice"
        assert server.http.get("/health").status_code == 200


class Panic(BaseException):
    """Like pyo3's of a panic in Rust."""


@pytest.mark.parametrize("error", [SystemExit(7), Panic("a secret")], ids=repr)
def test_whatever_a_plugins_route_raises_is_answered_in_its_name(kit, caplog, error):
    @get("/later")
    async def later() -> None:
        raise error

    @get("/now", sync_to_thread=False)
    def now() -> None:
        raise error

    @get("/beside", sync_to_thread=True)
    def beside() -> None:
        raise error

    with kit.running(routes=[plugin_router("mine (mine-dist 1.2)", [later, now, beside])]) as server:
        for path in ("/later", "/now", "/beside"):
            answer = server.http.get(path)
            assert answer.status_code == 500
            assert f"Plugin mine (mine-dist 1.2) failed in GET {path} (error id" in answer.json()["error"]["message"]
            assert "secret" not in answer.text
            assert server.http.get("/health").status_code == 200
        assert f"{type(error).__name__}: {error}" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(7), Panic("no start")], ids=repr)
def test_a_lifespan_that_leaves_at_its_start_is_named(caplog, error):
    @contextlib.asynccontextmanager
    async def lifespan():
        raise error
        yield

    async def start():
        with pytest.raises(type(error)):
            async with named_lifespan("mine", lifespan()):
                pass

    with pytest.raises(StopIteration):
        start().send(None)
    assert f"plugin mine: lightllm_lifespan failed to start: {type(error).__name__}: {error}" in caplog.text


@pytest.fixture
def heard(kit):
    """(server, what a listener heard), with others before it that raise, and one that hears nothing."""
    calls: list[tuple[str, dict]] = []

    def raises(facts):
        raise RuntimeError("not my day")

    def leaves(facts):
        raise SystemExit("good bye")

    def panics(facts):
        raise Panic("poisoned")

    listeners = [
        Listener(name="broken", on_request=raises, on_finish=raises),
        Listener(name="leaving", on_request=leaves, on_finish=leaves),
        Listener(name="panicking", on_request=panics, on_finish=panics),
        Listener(name="deaf"),
        Listener(
            name="good",
            on_request=lambda facts: calls.append(("request", dict(facts))),
            on_finish=lambda facts: calls.append(("finish", dict(facts))),
        ),
    ]
    with kit.running(listeners=listeners) as server:
        yield server, calls


def test_listeners_hear_the_facts_and_one_that_raises_harms_nobody(heard, kit, caplog):
    server, calls = heard
    answer = server.chat("hi", n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello!"] * 2
    kit.until(lambda: len(calls) == 2)
    (first, request), (second, finish) = calls
    assert (first, second) == ("request", "finish")
    assert request == {
        "id": answer.id,
        "endpoint": "chat.completions",
        "model": "tiny",
        "stream": False,
        "n": 2,
        "created": answer.created,
        "prompt_tokens": answer.usage.prompt_tokens,
        "request": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 2},
    }
    assert finish["answers"] == ["Hello!"] * 2
    assert finish.items() >= request.items()
    assert finish["status"] == "ok" and finish["error"] is None
    assert finish["finish_reasons"] == ["stop", "stop"]
    assert finish["completion_tokens"] == answer.usage.completion_tokens
    assert finish["cached_tokens"] == 3
    assert 0 <= finish["time_to_first_token"] <= finish["duration"] < 30
    assert "broken" in caplog.text and "not my day" in caplog.text
    for event in ("on_request", "on_finish"):
        assert f"leaving failed in {event}: SystemExit: good bye" in caplog.text
        assert f"panicking failed in {event}: Panic: poisoned" in caplog.text


def test_listeners_hear_of_streams_of_several_prompts(heard, kit):
    server, calls = heard
    server.events(COMPLETIONS, prompt=["ab", "cde"], max_tokens=2)
    kit.until(lambda: len(calls) == 2)
    facts = calls[1][1]
    assert (facts["endpoint"], facts["stream"], facts["prompt_tokens"]) == ("completions", True, 5)
    assert (facts["status"], facts["finish_reasons"], facts["completion_tokens"]) == ("ok", ["length"] * 2, 4)


@pytest.mark.parametrize("stream", [False, True])
def test_listeners_hear_why_a_request_failed(heard, kit, stream):
    server, calls = heard
    server.engine.script = lambda *_: iter([dict(tokens=[65]), dict(tokens=[], finish="error", error="no more room")])
    server.post(stream=stream)
    kit.until(lambda: len(calls) == 2)
    assert calls[1][1]["status"] == "error"
    assert "no more room" in calls[1][1]["error"]


def test_listeners_hear_nothing_of_a_request_that_was_refused(heard):
    server, calls = heard
    assert server.post(temperature=3).status_code == 400
    assert calls == []


# --- clients that go away

SCRIPTS = {"talking": {"tokens": [97]}, "silent": {}}


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]], ids=["one prompt", "three prompts"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_client_that_goes_away_ends_its_generations(heard, kit, script, stream, prompt):
    server, calls = heard
    server.engine.script = lambda *_: itertools.repeat(SCRIPTS[script])
    server.engine.delay = 0.005
    body = json.dumps({"prompt": prompt, "n": 2, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (COMPLETIONS.encode(), len(body)))
        client.sendall(body)
        kit.until(lambda: len(server.engine.generations) == len(prompt))
        assert all(generation.aborted == [] for generation in server.engine.generations)
    kit.until(lambda: all(generation.aborted == [None] for generation in server.engine.generations))
    kit.until(lambda: len(calls) == 2)
    assert (calls[1][1]["status"], calls[1][1]["error"]) == ("aborted", None)
    server.engine.__init__()
    assert server.chat().choices[0].message.content == "Hello!"


def test_a_stream_that_is_closed_midway_ends_the_generation(server, kit):
    server.engine.script = lambda *_: itertools.repeat({"tokens": [97]})
    server.engine.delay = 0.005
    with server.chat(stream=True) as stream:
        assert next(stream).choices[0].delta.role == "assistant"
        assert server.engine.last.aborted == []
    kit.until(lambda: server.engine.last.aborted == [None])


def test_an_answer_that_is_complete_aborts_nothing(server):
    server.chat()
    server.events()
    assert [generation.aborted for generation in server.engine.generations] == [[], []]


def test_one_connection_serves_one_request_after_another(server):
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=1), timeout=10) as client:
        for fields in ({}, {"stream": True}, {"temperature": 3}, {}):
            response = client.post(COMPLETIONS, json={"prompt": "a", **fields})
            assert response.status_code == (400 if "temperature" in fields else 200)


# --- whose routes they are


def routes_of(label, *paths, method=get):
    async def handler() -> None: ...

    return plugin_router(label, [method(path)(handler) for path in paths])


@pytest.mark.parametrize(
    ("one", "other"),
    [("/a", "/a"), ("/a/{x:int}", "/a/{y:int}"), ("/a/", "/a"), ("/v1/models", "/b")],
    ids=str,
)
def test_two_owners_of_a_route_are_both_named(kit, one, other):
    routes = [routes_of("mine (mine-dist 1.2)", one), routes_of("yours (your-dist 3.4)", other)]
    with pytest.raises(UserError) as caught, kit.running(routes=routes):
        pass
    other_owner = "lightllm-serve itself" if one == "/v1/models" else "yours (your-dist 3.4)"
    assert "mine (mine-dist 1.2)" in str(caught.value) and other_owner in str(caught.value)


def test_other_places_are_no_collision(kit):
    routes = [routes_of("mine", "/a", "/b/{x:int}"), routes_of("yours", "/b", "/b/{x:str}")]
    with kit.running(routes=routes) as server:
        assert server.http.get("/a").status_code == 200


def test_a_lifespan_that_fails_to_end_is_named_and_the_others_end(kit, caplog):
    ended = []

    @contextlib.asynccontextmanager
    async def lifespan(name):
        yield
        ended.append(name)
        if name == "bad":
            raise OSError("will not go")

    spans = [named_lifespan(f"{name} (dist 1.2)", lifespan(name)) for name in ("first", "bad", "last")]
    with kit.running(lifespans=spans):
        pass
    assert sorted(ended) == ["bad", "first", "last"]
    assert "plugin bad (dist 1.2): lightllm_lifespan failed to end: OSError: will not go" in caplog.text
