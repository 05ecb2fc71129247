"""A real HTTP server over a scripted engine: tokens in, tokens out, no model."""

import asyncio
import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from lightllm import ModelInfo
from lightllm.chat import ChatTemplate
from lightllm.config import Config
from lightllm.engine.client import EngineUnavailable
from lightllm.engine.request import Logprobs, Output, Ready, Stats
from lightllm.server.app import ServerState, create_app
from lightllm.tokenizer import Tokenizer
from lightllm_builtin.grammar.backend import Llguidance

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> RawTokenizer:
    """A token per byte, ids 0 to 255, then <eos>."""
    by_byte = {bytes([b]): char for char in pre_tokenizers.ByteLevel.alphabet() for b in [level_byte(char)]}
    raw = RawTokenizer(models.BPE(vocab={by_byte[bytes([b])]: b for b in range(256)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return raw


def level_byte(char: str) -> int:
    from lightllm.tokenizer import level_bytes

    return level_bytes(char)[0]


EOS = 256


def says(text: str | bytes, *, size: int = 1, finish: str = "stop"):
    """A script: the text's bytes, ``size`` a step, then the finish."""
    data = text.encode() if isinstance(text, str) else text

    def script(prompt, params, index):
        tokens = list(data)[: params.max_tokens]
        ends = finish if len(data) < params.max_tokens else "length"
        steps = [tokens[i : i + size] for i in range(0, len(tokens), size)] or [[]]
        for i, step in enumerate(steps):
            last = i == len(steps) - 1
            logprobs = None
            if params.logprobs is not None:
                logprobs = [entry(t, params.logprobs) for t in step]
            stop = EOS if last and ends == "stop" else None
            yield dict(tokens=step, logprobs=logprobs, finish=ends if last else None, stop_token=stop)

    return script


def entry(token: int, top: int) -> Logprobs:
    return Logprobs(token, -0.5, [(token, -0.5), (ord("z"), -1.5), (EOS, float("-inf"))][:top])


class LocalChecker:
    """Checks grammars without a process of its own."""

    backend = Llguidance(None, 257, [EOS])

    async def check(self, grammar):
        self.backend.compile(grammar)


class FakeGeneration:
    def __init__(self, engine, prompt, params, n):
        self.prompt, self.params, self.n = prompt, params, n
        self.aborted: list[int | None] = []
        self._engine = engine
        self._open = set(range(n))
        self._queue: asyncio.Queue = asyncio.Queue()
        self._task = asyncio.create_task(self._feed())

    async def _feed(self):
        prompt_logprobs = None
        if self.params.prompt_logprobs is not None:
            prompt_logprobs = [entry(token, self.params.prompt_logprobs) for token in self.prompt[1:]]
        scripts = [iter(self._engine.script(self.prompt, self.params, i)) for i in range(self.n)]
        live = set(range(self.n))
        try:
            while live & self._open:
                for index in sorted(live & self._open, reverse=self._engine.backwards):
                    step = next(scripts[index], None)
                    if step is None:
                        live.discard(index)
                    if not step:
                        continue
                    fields = dict(id="x", index=index, cached_tokens=self._engine.cached, **step)
                    if index == 0:
                        fields["prompt_logprobs"], prompt_logprobs = prompt_logprobs, None
                    self._queue.put_nowait(Output(**fields))
                    if fields.get("finish"):
                        live.discard(index)
                if self._engine.delay is not None:
                    await asyncio.sleep(self._engine.delay)
        except Exception as error:
            self._queue.put_nowait(error)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.abort()
        self._task.cancel()

    async def __aiter__(self):
        while self._open:
            output = await self._queue.get()
            if isinstance(output, Exception):
                raise output
            if output.index in self._open:
                if output.finish:
                    self._open.discard(output.index)
                yield output

    def waiting(self):
        return not self._queue.empty()

    def abort(self, index=None):
        gone = self._open & ({index} if index is not None else self._open)
        if gone:
            self.aborted.append(index)
            self._open -= gone


class FakeEngine:
    """``script(prompt, params, index)`` yields the fields of a choice's outputs, one a step; {} for a step without."""

    def __init__(self, script=None):
        self.ready = Ready(max_model_len=200, total_slots=1000, vocab_size=257)
        self.stats = Stats()
        self.healthy = True
        self.script = script or says("Hello!")
        self.delay: float | None = 0.0
        self.cached = 3
        self.backwards = False
        self.generations: list[FakeGeneration] = []

    def generate(self, prompt, params, n=1):
        if not self.healthy:
            raise EngineUnavailable("the engine has died")
        self.generations.append(FakeGeneration(self, prompt, params, n))
        return self.generations[-1]

    @property
    def last(self) -> FakeGeneration:
        return self.generations[-1]


class Running:
    """The server under test. Its parts may be changed between requests."""

    def __init__(self, engine, port):
        self.engine = engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def chat(self, text="hi", **fields):
        return self.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **fields)

    def post(self, path="/v1/chat/completions", **fields):
        if path == "/v1/chat/completions":
            fields = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return self.http.post(path, json=fields)

    def events(self, path="/v1/chat/completions", **fields) -> list[str]:
        """The data of each server-sent event."""
        response = self.post(path, stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, rest = response.text.split("\n\n")
        assert rest == ""
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [event.removeprefix("data: ") for event in events]


def state_of(engine, **fields) -> ServerState:
    fields = {
        "config": Config(),
        "tokenizer": Tokenizer(byte_tokenizer(), eos_token="<eos>"),
        "checker": LocalChecker(),
        "info": ModelInfo(path="/tiny", architecture="Tiny", config={}),
        "model_names": ("tiny", "org/alias"),
        "chat_template": ChatTemplate(TEMPLATE),
        **fields,
    }
    return ServerState(engine=engine, **fields)


@contextlib.contextmanager
def running(engine=None, **fields):
    engine = engine or FakeEngine()
    app = create_app(state_of(engine, **fields))
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", ws="none", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    until(lambda: server.started)
    run = Running(engine, sock.getsockname()[1])
    try:
        yield run
    finally:
        run.http.close()
        run.openai.close()
        server.should_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive()


def until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def _module_server():
    with running() as server:
        yield server


@pytest.fixture
def server(_module_server):
    """A server with the plainest settings and a fresh engine behind it."""
    _module_server.engine.__init__()
    return _module_server


@pytest.fixture(scope="session")
def kit():
    """What tests with a server of their own need."""
    return SimpleNamespace(
        running=running, state_of=state_of, says=says, FakeEngine=FakeEngine, until=until, EOS=EOS, entry=entry
    )
