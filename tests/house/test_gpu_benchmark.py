"""The cases of benchmarks/gpu/run.py at the sizes they have on a device. Here it is a clock, which takes no time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASES = """
import sys
from pathlib import Path
import clock, run
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.plugins import Plugins, Recipe

plugins = Plugins.discover(Recipe(given=(clock.__file__,)), quiet=True)
engine = build_engine(Config(max_batch_tokens=run.PREFILL, prefix_cache=False), plugins, Path(sys.argv[1]))
for count, context in run.DECODES:
    assert run.decode_seconds(engine, count, context, 40_000, "cpu") > 0
    assert not engine.busy
assert run.engine_rate(engine, *run.HTTP, 40_000) > 0
"""


def test_sequences_last_as_long_as_they_are_timed(demo_model: Path) -> None:
    paths = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS / "gpu")])
    environment = {**os.environ, "PYTHONPATH": paths, "CLOCK_COPIES": "0"}
    command = [sys.executable, "-c", CASES, str(demo_model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
