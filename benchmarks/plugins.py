"""What installed plugins cost at start: the server with 50 of them and with none, and `lightllm-serve plugins`.

    python benchmarks/plugins.py [--model demo] [--plugins 50] [--rounds 9]

The two are started in turn, and the ratio of their medians is printed. The plugins are real distributions (dist-info,
entry point, a requirement on lightllm-serve) in a temporary folder; each declares a tool parser and a route hook.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from lightllm.testing import Server  # noqa: E402

PLUGIN = """
from lightllm import ToolParserRecord, hookimpl

lightllm_requires = ">=0.1,<0.2"

@hookimpl
def lightllm_tool_parsers():
    return [ToolParserRecord(name="parser-{i}", target="bench_plugin_{i}_work:Parser")]

@hookimpl
def lightllm_routes():
    return []
"""


def install(folder: Path, count: int) -> None:
    for i in range(count):
        info = folder / f"bench_plugin_{i}-1.0.dist-info"
        info.mkdir()
        requires = "Requires-Dist: lightllm-serve<0.2,>=0.1\n"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bench-plugin-{i}\nVersion: 1.0\n{requires}\n")
        (info / "entry_points.txt").write_text(f"[lightllm]\nbench-{i} = bench_plugin_{i}\n")
        (folder / f"bench_plugin_{i}.py").write_text(PLUGIN.format(i=i))


def start_seconds(model: str, env: dict[str, str]) -> float:
    begin = time.perf_counter()
    with Server("--model", model, env=env):
        return time.perf_counter() - begin


def list_seconds(env: dict[str, str]) -> float:
    begin = time.perf_counter()
    command = [sys.executable, "-m", "lightllm", "plugins"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | env)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--plugins", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), given.plugins)
        envs = {"none": {"PYTHONPATH": ""}, str(given.plugins): {"PYTHONPATH": folder}}
        for what, seconds in (
            ("start until the first answer", lambda env: start_seconds(given.model, env)),
            ("lightllm-serve plugins", list_seconds),
        ):
            taken: dict[str, list[float]] = {name: [] for name in envs}
            for _ in range(given.rounds + 1):  # the first warms caches up
                for name, env in envs.items():
                    taken[name].append(seconds(env))
            medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
            none, some = medians.values()
            sys.stdout.write(
                f"{what}: {none:.3f} s without plugins, {some:.3f} s with {given.plugins}: ratio {some / none:.3f}\n"
            )


if __name__ == "__main__":
    main()
