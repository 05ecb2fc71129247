"""What kernels ask of a CUDA device, found without one: `attend` is called on CPU tensors, and in place of each launch
its kernel is compiled. Run in a process of its own, as without a device tests interpret kernels:

    python tests/compiled.py '{"capability": 90, "dtype": "bfloat16", "heads": 32, "kv_heads": 8, "head_dim": 128}'

prints a line for each launch: the kernel's name and its bytes of shared memory. Several jobs may be given.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton
from attention_steps import Step, run
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightllm_builtin.triton_attention import backend, kernels

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
}
SCALARS = {int: "i32", float: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """In place of a kernel: what is launched is compiled, as the launch would."""

    kernel: Any
    capability: int

    def __getitem__(self, grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        names = self.kernel.arg_names
        types = {name: "constexpr" for name in constants}
        divisible = {}
        for i, arg in enumerate(args):
            tensor = isinstance(arg, torch.Tensor)
            fixed = type(arg) is int and not self.kernel.params[i].do_not_specialize
            if fixed and arg == 1:  # a launch compiles this number in
                constants[names[i]], types[names[i]] = 1, "constexpr"
                continue
            types[names[i]] = POINTERS[arg.dtype] if tensor else SCALARS[type(arg)]
            if tensor or (fixed and arg % 16 == 0):
                divisible[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(
            self.kernel,
            {name: types[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            divisible,
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        binary = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        print(self.kernel.fn.__name__, binary.metadata.shared)  # noqa: T201 - its output


if __name__ == "__main__":
    names = ("write_slots", "rotate_and_write", "decode", "combine", "prefill")
    launched = {name: getattr(kernels, name) for name in names}
    for job in map(json.loads, sys.argv[1:]):
        capability = job.pop("capability")
        for name, kernel in launched.items():
            setattr(kernels, name, Compiled(kernel, capability))
        ran = run(backend.TritonAttention, Step(**job, sizes=((2000, 1), (100, 50))))
        turn = torch.ones(2, len(ran.q), 1, ran.spec.head_dim, dtype=ran.q.dtype)
        target, qkv = ran.batch.attention, torch.cat((ran.q, ran.k, ran.v), 1)
        target._attend = lambda layer, q, batch: q  # compiled already
        target.attend_packed(ran.spec, qkv, tuple(turn), ran.batch)
