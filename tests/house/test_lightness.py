"""Listing and serving start fast because nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "litestar", "transformers", "uvicorn", "huggingface_hub", "numpy", "jinja2")


def loaded_by(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter holds after running ``code``."""
    tail = f"\nimport sys\nsys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=600, check=True
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
