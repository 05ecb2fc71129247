"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from lightllm_builtin.sources.demo import demo_model as fetch_demo_model

# As the engine's own process has it (`lightllm.engine.client.THREADS`): beside anything else that runs, a step of a
# tiny model would otherwise take as long as threads spin. To be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker has a core, with whatever it starts

# how long an example takes, to run or to draw, says how busy the machine is
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Without a device kernels run in Triton's interpreter, which has to be asked for before they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's GGUF file, in the user's own cache: downloaded (93 MB) the first time."""
    return fetch_demo_model()
