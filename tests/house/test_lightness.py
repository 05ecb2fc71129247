"""Listing and serving start fast because nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "litestar", "transformers", "uvicorn", "huggingface_hub", "numpy", "jinja2")


def loaded_by(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter holds after running ``code``."""
    tail = f"\nimport sys\nsys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=120, check=True
    )
    return result.stderr.split()


@pytest.mark.parametrize(
    "module", ["lightllm", "lightllm.plugins", "lightllm.config", "lightllm.cli", "lightllm.engine.request"]
)
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == []


def test_listing_the_plugins_imports_nothing_heavy() -> None:
    assert loaded_by("from lightllm.cli import main\nmain(['plugins'])\nmain(['plugins', '--json'])") == []


def test_reading_the_configuration_imports_nothing_heavy() -> None:
    imports = "from lightllm.config import *\nfrom lightllm.plugins import *\n"
    assert loaded_by(imports + "read_config([], {}, Plugins.discover(quiet=True))") == []


def test_listing_the_plugins_takes_less_than_half_a_second() -> None:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lightllm", "plugins"], capture_output=True, timeout=60, check=True)
        return time.perf_counter() - start

    # The machine may be busy with something else; it is not so five times in a row.
    assert min(once() for _ in range(5)) < 0.5
