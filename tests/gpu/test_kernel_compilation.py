"""The Triton kernels compile for compute capability 8.0 and 9.0, without a GPU, and fit what a block may take there.

    python tests/gpu/test_kernel_compilation.py     one line of JSON per kernel: registers, spills and shared memory

What is compiled is what ``fused_attention`` launches, with its arguments: Triton's driver is replaced by one that only names a
target, and its launch by its warm-up. In processes of their own: in the others of a test run, kernels are interpreted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch

SHARED_LIMIT = 99 * 2**10
"""Bytes that a block may ask for on any GPU from compute capability 8.0 on (163 KiB on 8.0, 227 KiB on 9.0)."""

PROCESSES = 2
"""That share the cases in a test."""

# (compute capability, d, dtype, mask): every row of the block sizes, every dtype, with mask and without.
CASES = [
    (90, 32, torch.bfloat16, True),
    (90, 64, torch.bfloat16, True),
    (90, 128, torch.float16, False),
    (90, 64, torch.float32, True),
    (90, 32, torch.float32, True),
    (80, 128, torch.float32, False),
]
if os.environ.get("SMCA_KERNELS") == "all":  # as the nightly profile has it
    CASES += [
        (90, 32, torch.bfloat16, False),
        (80, 32, torch.float16, True),
        (80, 64, torch.float16, False),
        (80, 128, torch.bfloat16, False),
    ]


def compile_case(capability: int, d: int, dtype: torch.dtype, mask: bool) -> list[dict[str, Any]]:
    """Compile the three kernels of an attention forward and backward; returns what the compiler reports of each."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from smca.gpu.attention import fused as fused_attention

    class Target:
        """Stands in for the driver of a GPU."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability  # compiled kernels are kept by device

        def get_current_stream(self, device: int) -> int:
            return 0

    kernels: list[dict[str, Any]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        what = {
            "capability": capability,
            "d": d,
            "dtype": str(dtype).removeprefix("torch."),
            "mask": mask,
        }
        what |= {"kernel": self.__name__, "shared_bytes": kernel.metadata.shared}
        what["registers"] = int(registers[1]) if registers else None
        what["spilled_bytes"] = int(spills[1]) + int(spills[2]) if spills else None
        kernels.append(what)

    launch, available = JITFunction.run, fused_attention.available
    driver.set_active(Target())
    JITFunction.run, fused_attention.available = compile_only, lambda device: None
    try:
        b, h, n, size = 1, 2, 40, (8, 8)
        q, k, v = (torch.zeros(b, h, rows, d, dtype=dtype, requires_grad=True) for rows in (n, 64, 64))
        center, precision = (torch.zeros(b, h, n, 2, requires_grad=True) for _ in range(2))
        padded = torch.zeros(b, 64, dtype=torch.bool) if mask else None
        out = fused_attention.fused_smca_attention(q, k, v, center, precision, size, padded)
        out.sum().backward()
    finally:
        JITFunction.run, fused_attention.available = launch, available
    return kernels


def test_kernels_compile_and_fit() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    commands = [[sys.executable, __file__, str(number)] for number in range(PROCESSES)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    kernels = []
    for process in [subprocess.Popen(command, **pipes) for command in commands]:
        out, said = process.communicate()
        assert process.returncode == 0, said[-4000:]
        kernels += [json.loads(line) for line in out.splitlines()]
    assert len(kernels) == 3 * len(CASES)
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_LIMIT, kernel
        # In float32, whose products hold whole rows in registers (IEEE: no tensor cores), the fastest blocks spill a little.
        assert kernel["spilled_bytes"] <= (512 if kernel["dtype"] == "float32" else 128), kernel


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing is logged for a kernel that comes from a cache
        for case in CASES[int(sys.argv[1]) :: PROCESSES] if sys.argv[1:] else CASES:
            for compiled in compile_case(*case):
                print(json.dumps(compiled), flush=True)
