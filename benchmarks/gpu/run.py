"""How close to the device's limits this engine runs, in one command and one table, and transformers beside it.

    python benchmarks/gpu/run.py                          # Llama-3-8B's shape on a CUDA device, about 8 minutes
    python benchmarks/gpu/run.py --shape qwen2.5-7b
    python benchmarks/gpu/run.py --quantization fp8 --no-peers
    python benchmarks/gpu/run.py --profile --no-peers     # after each case, the kernels that took its time
    python benchmarks/gpu/run.py --shape tiny --device cpu  # whether this script works; its figures mean nothing

Weights are random. First the device is measured: how fast it copies, how fast it multiplies. Those are the floors:
a decode step has to read the weights and the keys and values of its sequences once; a prefill has to do its
multiplications. "of the floor" is floor / time. Before that, log-probabilities are compared with float32 PyTorch's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import checkpoints  # noqa: E402
import serving  # noqa: E402

from lightllm.assemble import build_engine  # noqa: E402
from lightllm.checks import describe  # noqa: E402
from lightllm.config import Config  # noqa: E402
from lightllm.engine.engine import Engine  # noqa: E402
from lightllm.engine.request import Abort, Generate, Logprobs, SamplingParams  # noqa: E402
from lightllm.interfaces import AttentionJob, AttentionSpec  # noqa: E402
from lightllm.nn.batch import Batch, KVPool  # noqa: E402
from lightllm.plugins import Plugins  # noqa: E402
from lightllm.selection import choose  # noqa: E402

TOLERANCE = {"auto": 0.15, "fp8": 0.6}
"""Of log-probabilities against float32, by quantization: of bfloat16, and of fp8, which rounds to 3 bits. Random
weights of this size give logits of variance about 1."""

DECODES = ((1, 1024), (64, 1024), (256, 1024))
PREFILL = 8192
HTTP = (64, 512, 128)
"""Concurrency, tokens in, tokens out."""

ATTENTION = (64, 8192)
"""Sequences, context of the attention kernel alone."""

TINY: dict[str, Any] = {"decodes": ((1, 64), (8, 64)), "prefill": 256, "http": (4, 32, 16), "attention": (4, 256)}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], Any], times: int = 5) -> float:
    """The median, after one that warms up."""
    taken = []
    for _ in range(times + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def repeated_seconds(device: str, work: Callable[[], Any], repeats: int = 10) -> float:
    """Of work that takes the device less time than it takes Python to start it: several at once."""
    count = repeats if device == "cuda" else 1

    def several() -> None:
        for _ in range(count):
            work()

    return seconds(device, several) / count


def profile(device: str, work: Callable[[], Any]) -> None:
    """Write which kernels (on a CPU, which operators) take the most of its time."""
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as found:
        work()
        synchronize(device)
    table = found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15, max_name_column_width=70)
    sys.stdout.write(f"\n{table}\n")


# ---------------------------------------------------------------------------------------------------------------------
# The device's limits


def copy_rate(device: str, megabytes: int) -> float:
    """Bytes a second, read and written."""
    a = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / repeated_seconds(device, lambda: b.copy_(a))


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / repeated_seconds(device, lambda: a @ b)


# ---------------------------------------------------------------------------------------------------------------------
# The engine


def release(device: str) -> None:
    """Give back to the device the memory of what is no longer referred to: a pool is sized by what is free."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def engine(folder: Path, device: str, **settings: Any) -> Iterator[Engine]:
    release(device)
    built = build_engine(Config(device=device, prefix_cache=False, **settings), Plugins.discover(quiet=True), folder)
    try:
        yield built
    finally:
        built.close()


def requests(count: int, tokens: int, vocabulary: int, **params: Any) -> list[Generate]:
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(3, vocabulary, (count, tokens), generator=generator).tolist()
    settings = SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | params)
    return [Generate(id=str(i), prompt=prompt, params=settings) for i, prompt in enumerate(drawn)]


def check_numerics(shape: str, device: str, **settings: Any) -> float:
    """The largest difference of log-probabilities, of a model of this shape but two layers: those of prompts, and those
    of answers as long as the tokens are the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.write(Path(folder) / "model", shape, device, layers=2)
        asked = requests(4, 200, checkpoints.SHAPES[shape]["vocab_size"], max_tokens=16, prompt_logprobs=0, logprobs=0)
        found: list[list[list[Logprobs]]] = []
        plain = {"attention_backend": "torch", "operators": "torch", "sampler": "standard", "dtype": "float32"}
        for each in (plain, settings):
            with engine(path, device, max_total_tokens=4096, max_model_len=400, **each) as one:
                done = one.generate(*asked)
                found.append([[*(o.prompt_logprobs or ()), *(o.logprobs or ())] for o in done.values()])
    off = []
    for ours, theirs in zip(*found, strict=True):
        same = itertools.takewhile(lambda pair: pair[0].token == pair[1].token, zip(ours, theirs, strict=True))
        off += [abs(a.logprob - b.logprob) for a, b in same]
    return max(off)


def decode_seconds(
    one: Engine, count: int, context: int, vocabulary: int, device: str, steps: int = 32, profiled: bool = False
) -> float:
    """A step in which each of ``count`` sequences of about ``context`` tokens gets one. The first get some while the
    last ones' prompts are computed."""
    asked = requests(count, context - steps, vocabulary, max_tokens=4 * steps)
    for request in asked:
        one.add(request)
    begun: set[str] = set()
    while len(begun) < count:
        begun |= {output.id for output in one.step().outputs if output.tokens}
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        step = one.step()
        taken.append(time.perf_counter() - began)
        assert len(step.outputs) == count, "a sequence was preempted, or has ended"
    if profiled:
        profile(device, lambda: [one.step() for _ in range(8)])
    for request in asked:
        one.abort(Abort(id=request.id))
    while one.busy:
        one.step()
    return statistics.median(taken)


def prefill_seconds(one: Engine, tokens: int, vocabulary: int, device: str, profiled: bool = False) -> float:
    def work() -> None:
        one.generate(*requests(1, tokens, vocabulary, max_tokens=1))

    taken = seconds(device, work)
    if profiled:
        profile(device, work)
    return taken


def engine_rate(one: Engine, count: int, tokens: int, output: int, vocabulary: int) -> float:
    """Output tokens a second of ``count`` requests together, prefills included."""
    began = time.perf_counter()
    done = one.generate(*requests(count, tokens, vocabulary, max_tokens=output))
    return sum(len(o.tokens) for o in done.values()) / (time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------------------------
# Attention alone


def attention_seconds(
    spec: AttentionSpec, device: str, dtype: str, sequences: int, context: int, new: int
) -> tuple[str, float]:
    """The backend that ``auto`` chooses, and its time for one layer: each sequence brings its last ``new`` tokens."""
    job = AttentionJob(layers=(spec,), device=device, dtype=dtype, max_model_len=context)
    plugins = Plugins.discover(quiet=True)
    chosen = choose(plugins, "attention_backends", "auto", job)
    pool = KVPool([spec], sequences * context, getattr(torch, dtype), device)
    backend = plugins.load(chosen)(job, pool)
    slots = torch.arange(sequences * context, device=device).view(sequences, context)
    batch = Batch.of(list(slots), [new] * sequences, backend)
    batch.plan = backend.plan(batch)

    def tensor(heads: int) -> torch.Tensor:
        return torch.randn(sequences * new, heads, spec.head_dim, device=device).to(getattr(torch, dtype))

    q, k, v = tensor(spec.heads), tensor(spec.kv_heads), tensor(spec.kv_heads)
    with torch.inference_mode():
        return chosen.label, repeated_seconds(device, lambda: backend.attend(spec, q, k, v, batch))


def sdpa_seconds(spec: AttentionSpec, device: str, dtype: str, tokens: int) -> float:
    """PyTorch's own flash attention over one prompt."""

    def tensor(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, spec.head_dim, device=device).to(getattr(torch, dtype))

    q, k, v = tensor(spec.heads), tensor(spec.kv_heads), tensor(spec.kv_heads)
    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        return repeated_seconds(device, lambda: attention(q, k, v, is_causal=True, enable_gqa=True))


# ---------------------------------------------------------------------------------------------------------------------
# Over HTTP, and the peer


def http_rate(
    folder: Path, device: str, concurrency: int, tokens: int, output: int, vocabulary: int, settings: list[str]
) -> float:
    ids = range(3, vocabulary)
    port = serving.free_port()
    command = [sys.executable, "-m", "lightllm", "--model", str(folder), "--device", device, "--port", str(port)]
    server = serving.Server("lightllm-serve", [*command, "--no-prefix-cache", *settings], port)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        server.start(Path(log.name))
        try:
            asyncio.run(serving.measure(server, concurrency, tokens, output, concurrency, ids))
            measured = asyncio.run(serving.measure(server, concurrency, tokens, output, 2 * concurrency, ids))
            return measured.tokens_per_second
        finally:
            server.stop()


def transformers_work(
    folder: Path, device: str, count: int, tokens: int, output: int, vocabulary: int
) -> dict[str, Callable[[], Any]]:
    """The same requests for transformers' `generate`, and for its continuous batching."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    prompts = [request.prompt for request in requests(count, tokens, vocabulary)]
    ids = torch.tensor(prompts, device=device)
    plain = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False, "pad_token_id": 0}
    config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def continuous() -> None:
        done = model.generate_batch(inputs=prompts, generation_config=config)
        assert {len(one.generated_tokens) for one in done.values()} == {output}

    return {
        "transformers generate": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **plain),
        "transformers continuous batching": continuous,
    }


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=checkpoints.SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quantization", choices=("auto", "fp8"), default="auto", help="fp8: floors are of one byte a weight"
    )
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--profile", action="store_true", help="write which kernels each case's time went to")
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightllm.linear").setLevel(logging.DEBUG)  # what was timed when the model was loaded
    tiny, device, write = given.shape == "tiny", given.device, sys.stdout.write
    dtype = "bfloat16" if device == "cuda" else "float32"
    decodes = TINY["decodes"] if tiny else DECODES
    prefill = TINY["prefill"] if tiny else PREFILL
    concurrency, tokens, output = TINY["http"] if tiny else HTTP
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    write(f"{name}, torch {torch.__version__}, {given.shape}, {dtype}, {time.strftime('%Y-%m-%d')}\n\n")
    copies = copy_rate(device, 64 if tiny else 4096)
    products = matrix_rate(device, getattr(torch, dtype), 512 if tiny else 8192)
    write(f"copies {copies / 1e9:,.0f} GB/s, multiplies {products / 1e12:,.1f} TFLOP/s\n")
    off = check_numerics(given.shape, device, dtype=dtype, quantization=given.quantization)
    allowed = TOLERANCE[given.quantization]
    write(f"log-probabilities are off by {off:.4f} from float32 PyTorch's, {allowed} is allowed\n\n")
    assert off < allowed

    config = checkpoints.SHAPES[given.shape]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    spec = AttentionSpec(
        layer=0,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        scale=head_dim**-0.5,
    )
    bytes_each = getattr(torch, dtype).itemsize
    sequences, context = TINY["attention"] if tiny else ATTENTION
    label, taken = attention_seconds(spec, device, dtype, sequences, context, 1)
    read = 2 * sequences * context * spec.kv_heads * head_dim * bytes_each
    write(f"attention of {label}, one layer: decode, {sequences} x {context}: {taken * 1e3:.3f} ms, ")
    write(f"{read / taken / copies:.0%} of the rate of a copy; ")
    label, taken = attention_seconds(spec, device, dtype, 1, prefill, prefill)
    reference = sdpa_seconds(spec, device, dtype, prefill)
    write(f"prefill, {prefill}: {taken * 1e3:.3f} ms, {reference / taken:.0%} of the speed of PyTorch's own\n\n")

    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoints.write(Path(scratch) / "model", given.shape, device)
        vocabulary = config["vocab_size"]
        longest = max(prefill, *(context for _, context in decodes)) + 128
        largest = max(longest, *(count * (context + 64) for count, context in decodes))
        settings: dict[str, Any] = {"max_batch_tokens": prefill, "max_total_tokens": largest, "max_model_len": longest}
        settings["quantization"] = given.quantization

        def engine_cases() -> float:
            """A function, so that nothing of the engine is left when it ends: a server needs the device's memory."""
            with engine(folder, device, dtype=dtype, **settings) as one:
                write("\n".join(one.ready.summary))
                write("\n\n| case | time ms | floor ms | of the floor |\n| --- | --- | --- | --- |\n")
                sizes = dict(checkpoints.tensors(checkpoints.COMMON | config, config["num_hidden_layers"]))
                weights = sum(math.prod(size) for name, size in sizes.items() if "embed_tokens" not in name)
                head = config["hidden_size"] * vocabulary
                weight_bytes = (weights - head) * (1 if given.quantization == "fp8" else bytes_each) + head * bytes_each
                token = 2 * spec.kv_heads * head_dim * config["num_hidden_layers"] * bytes_each

                def row(case: str, taken: float, floor: float) -> None:
                    write(f"| {case} | {taken * 1e3:.2f} | {floor * 1e3:.2f} | {floor / taken:.0%} |\n")
                    sys.stdout.flush()

                for count, context in decodes:
                    taken = decode_seconds(one, count, context, vocabulary, device, profiled=given.profile)
                    row(f"decode, {count} x {context}", taken, (weight_bytes + count * context * token) / copies)
                # q k^T and p v, the causal half
                attention = 2 * prefill**2 * spec.heads * head_dim * config["num_hidden_layers"]
                operations = 2 * prefill * (weights - head) + 2 * head + attention
                taken = prefill_seconds(one, prefill, vocabulary, device, given.profile)
                row(f"prefill, {prefill}", taken, operations / products)
                return engine_rate(one, concurrency, tokens, output, vocabulary)

        own = engine_cases()
        release(device)
        options = [
            "--quantization",
            given.quantization,
            "--dtype",
            dtype,
            "--max-model-len",
            str(longest),
            "--max-total-tokens",
            str(largest),
        ]
        served = http_rate(folder, device, concurrency, tokens, output, vocabulary, options)
        write(f"\n{concurrency} requests of {tokens} tokens in, {output} out, output tok/s:\n")
        write(f"- engine {own:,.0f}\n- over HTTP {served:,.0f}, {served / own:.0%} of the engine's\n")
        if not given.no_peers:
            for peer, work in transformers_work(folder, device, concurrency, tokens, output, vocabulary).items():
                try:
                    with torch.inference_mode():
                        rate = concurrency * output / seconds(device, work, times=1)
                    write(f"- {peer} {rate:,.0f}; ours over HTTP is {served / rate:.2f} times as fast\n")
                except Exception as error:
                    write(f"- {peer} failed: {describe(error)}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
