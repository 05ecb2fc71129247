"""The real command: as a server (the kit's), and run to its end."""

from __future__ import annotations

import os
import subprocess
import sys


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
