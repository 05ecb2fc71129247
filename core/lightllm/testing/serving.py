"""Real servers: the real command in a process of its own, on a free port of 127.0.0.1."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from lightllm.testing.scripted.checkpoint import is_scripted, write_scripted

READY_SECONDS = 300
ANSWER_SECONDS = 300
LOG_LINES = 30
"""Shown with a failure."""

Messages = str | Sequence[Mapping[str, Any]]


class Server:
    """``with Server("--model", ...) as server``: up and healthy inside, gone with all its children after.

    ``command``: what to run, for another environment than this one. ``scripted``: whether its model is the scripted
    one.
    """

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = (sys.executable, "-m", "lightllm"),
        env: Mapping[str, str] | None = None,
        scripted: bool = False,
    ) -> None:
        self.command = [*command, *arguments]
        if not any(a.startswith("--port") for a in arguments):
            self.command += ["--port", "0"]
        self.env = os.environ | (env or {})
        self.url = ""
        self.scripted = scripted
        self.process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="lightllm-test-", suffix=".log")  # noqa: SIM115 - stop() closes it
        self._last_log = ""

    @property
    def log(self) -> str:
        """What it has written so far, to stdout and stderr."""
        return self._last_log if self._log.closed else Path(self._log.name).read_text(errors="replace")

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS)

    @cached_property
    def model(self) -> str:
        """The name clients use."""
        name: str = self._answer(self.http.get("/v1/models"))["data"][0]["id"]
        return name

    # --- asking

    def chat(self, messages: Messages, *, says: str | None = None, **fields: Any) -> dict[str, Any]:
        """The whole answer to a chat; a str is the user's one message. ``says``: what the scripted model answers, word
        for word; without it, it repeats the last message. Raises AssertionError when the status is not 200."""
        return self._answer(self.http.post("/v1/chat/completions", json=self._chat(messages, says, fields)))

    def stream(self, messages: Messages, *, says: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer to a chat."""
        fields = self._chat(messages, says, fields) | {"stream": True}
        answer = self.http.post("/v1/chat/completions", json=fields)
        if answer.status_code != 200:
            self._answer(answer)
        events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
        chunks: list[dict[str, Any]] = [json.loads(event) for event in events if event != "[DONE]"]
        failed = next((chunk for chunk in chunks if "error" in chunk), None)
        assert failed is None, self._complaint("in the stream", json.dumps(failed))
        assert events[-1] == "[DONE]", self._complaint("it did not end the stream", answer.text[-300:])
        return chunks

    def complete(self, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        """The whole completion of a prompt. The scripted model goes on with what stands between its marks in it."""
        return self._answer(self.http.post("/v1/completions", json={"model": self.model, "prompt": prompt} | fields))

    def _chat(self, messages: Messages, says: str | None, fields: dict[str, Any]) -> dict[str, Any]:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": self.model, "messages": messages} | fields
        if says is not None:
            self._check_scripted()
            body["chat_template_kwargs"] = fields.get("chat_template_kwargs", {}) | {"says": says}
        return body

    def _check_scripted(self) -> None:
        if not self.scripted:
            raise ValueError(
                "says=... is for the scripted model: serve(...) without model=, or a folder of write_scripted"
            )

    def _answer(self, answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code == 200, self._complaint(str(answer.status_code), answer.text)
        body: dict[str, Any] = answer.json()
        return body

    def _complaint(self, what: str, text: str) -> str:
        """What the server said, and the end of its log, which has the traceback if there was one."""
        end = "\n".join(self.log.splitlines()[-LOG_LINES:])
        return f"the server answered {what}: {text}\nits log ends with:\n{end}"

    # --- life

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.command, stdout=self._log, stderr=subprocess.STDOUT, env=self.env)
        try:
            deadline = time.monotonic() + READY_SECONDS
            while time.monotonic() < deadline:
                assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
                found = re.search(r"http://127\.0\.0\.1:\d+", self.log)
                if found:
                    self.url = found[0]
                    try:
                        if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                            return self
                    except httpx.TransportError:
                        pass
                time.sleep(0.05)
            raise AssertionError(f"the server was not healthy within {READY_SECONDS} s:\n{self.log}")
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        """End it, and whatever it started. Raises AssertionError if it left anything behind."""
        if "http" in self.__dict__:
            self.http.close()
        alive: list[psutil.Process] = []
        if self.process is not None and self.process.poll() is None:
            children = self.children()
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            _, alive = psutil.wait_procs(children, timeout=10)
            for child in alive:
                child.kill()
        self._last_log = self.log
        self._log.close()
        assert not alive, f"the server left processes behind: {alive}"


@contextmanager
def serve(
    plugins: str | Path | Sequence[str | Path] = (),
    *,
    model: str | Path | None = None,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A real server with these plugins, on a free port, gone with its children when the context is left.

    ``plugins``: names of modules, which are found wherever this process finds them, or paths of .py files; naming an
    installed one does no harm. ``model``: a folder, or any name ``--model`` takes; without it the scripted model, which
    says what it is told. ``options``: of the command line. Raises AssertionError, with the log, if it does not start.
    """
    given = [plugins] if isinstance(plugins, (str, Path)) else list(plugins)
    with tempfile.TemporaryDirectory(prefix="lightllm-test-") as folder:
        if model is None:
            model = Path(folder) / "scripted"
            write_scripted(model)
        scripted = is_scripted(Path(model))
        if scripted:
            given.append("lightllm.testing.scripted")
        arguments = ["--model", str(model), *(word for plugin in given for word in ("--plugin", _absolute(plugin)))]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with Server(*arguments, *options, env=path | dict(env or {}), scripted=scripted) as server:
            yield server


def _absolute(plugin: str | Path) -> str:
    """As ``--plugin`` has it: a plain name is a module's, whatever folder is called so, too."""
    is_path = isinstance(plugin, Path) or "/" in plugin or plugin.endswith(".py")
    return str(Path(plugin).resolve()) if is_path else str(plugin)
