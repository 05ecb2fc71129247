"""Fixtures for the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightllm_builtin.sources.demo import demo_model as fetch_demo_model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's GGUF file, in the user's own cache: downloaded (93 MB) the first time."""
    return fetch_demo_model()
