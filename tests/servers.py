"""Real servers for tests: the real command in a process of its own, on a free port of 127.0.0.1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx
import psutil

READY_SECONDS = 120


class RealServer:
    """``with RealServer("--model", ...) as server``: up and healthy inside, gone with all its children after."""

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = (sys.executable, "-m", "lightllm"),
        env: dict[str, str] | None = None,
    ) -> None:
        self.command = [*command, *arguments]
        if not any(a.startswith("--port") for a in arguments):
            self.command += ["--port", "0"]
        self.env = os.environ | (env or {})
        self.url = ""
        self._log = tempfile.NamedTemporaryFile(prefix="lightllm-test-", suffix=".log")  # noqa: SIM115 - stop() closes it
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def __enter__(self) -> RealServer:
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
        if self.process is None or self.process.poll() is not None:
            self._log.close()
            return
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
        self._log.close()
        assert not alive, f"the server left processes behind: {alive}"


def run_command(*arguments: str, timeout: float = 120, env: dict[str, str] | None = None) -> tuple[int, str]:
    """The real command to its end: exit code, and stdout and stderr together."""
    done = subprocess.run(
        [sys.executable, "-m", "lightllm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        env=os.environ | (env or {}),
        text=True,
    )
    return done.returncode, done.stdout
