"""The assignment problems of a training step, all in one launch on the GPU (docs/method.md §5).

The kernel, ``assignment.cu``, solves each problem by shortest augmenting paths (Crouse 2016, "On implementing 2D
rectangular assignment algorithms", the algorithm of SciPy's ``linear_sum_assignment``), one block per problem, with prices
in float64: the optimum is that of SciPy on the same float32 costs. Where several assignments cost the same, it may choose
another of them than SciPy, but always the same one. CuPy compiles it at first use and launches it.

Shape letters: M decoder layers, B images, N queries, T targets (padded).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("assignment.cu")
THREADS = 128  # per block: 300 queries are 3 columns per thread; more threads would only make the reductions longer
STATIC_BYTES = 1024  # shared memory that the kernel uses for its reductions, for any shape
BYTES_PER_COLUMN = 38  # three float64, three int32 and two bytes


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available(device: torch.device | str) -> str | None:
    """Why `assign` cannot run on `device`, and what to do about it; None if it can."""
    if torch.device(device).type != "cuda":
        return f"the assignment kernel needs a CUDA device, and this is {str(device)!r}: use the scipy backend there"
    if not torch.cuda.is_available():
        return "the assignment kernel needs a CUDA device, and PyTorch sees none here: use the scipy backend"
    package = "cupy-cuda12x" if (torch.version.cuda or "").startswith("12.") else "cupy-cuda13x"
    try:
        import cupy  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return f"cupy is not installed: pip install {package}"
        return f"cupy does not import ({error}): reinstall it with pip install {package}"
    except ImportError as error:
        return f"cupy does not import ({error}): reinstall it with pip install {package}"
    return None


def shared_bytes(queries: int, targets: int) -> int:
    """Dynamic shared memory of one block, in bytes."""
    return BYTES_PER_COLUMN * max(queries, targets)


def check_shared(queries: int, targets: int, limit: int) -> None:
    """Raise a ValueError if a problem of this size needs more than `limit` bytes of shared memory per block."""
    if shared_bytes(queries, targets) + STATIC_BYTES > limit:
        raise ValueError(
            f"assign: expected at most {(limit - STATIC_BYTES) // BYTES_PER_COLUMN} queries and targets on this GPU, whose "
            f"blocks have {limit} bytes of shared memory, got {queries} queries and {targets} targets. Use the scipy backend."
        )


@torch.library.custom_op("smca::assign", mutates_args=())
def assign(cost: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of least total cost for every layer and image.

    Nothing here waits for the GPU. To learn whether all costs were finite, read `status`, best together with another result
    that goes to the host anyway (`(status >= 0).any()`, and `nonfinite_entry` for the place).

    Args:
        cost: [M, B, N, T] float32 on a CUDA device.
        valid: [B, T] bool on the same device; False where a target is padding, whose costs are ignored.

    Returns:
        query: [M, B, T] int64. −1 where a target is padding; where there are more targets than queries and the cheapest
            assignment leaves this one out; and throughout a problem that has a cost that is not finite.
        status: [M, B] int64. −1, or the flat index n·T + t of the first valid cost that is not finite.

    Raises:
        ValueError: shapes, dtypes or devices other than these, or more queries or targets than shared memory holds
            (1,266 fit on any GPU, 4,365 on an A100, 6,090 on an H100).
        RuntimeError: `available` says why it cannot run.
    """
    _check(cost, valid)
    reason = available(cost.device)
    if reason is not None:
        raise RuntimeError(reason)
    layers, batch, queries, targets = cost.shape
    query, status = _outputs(cost)
    if status.numel() == 0 or query.numel() == 0 or queries == 0:
        return query.fill_(-1), status.fill_(-1)
    properties = torch.cuda.get_device_properties(cost.device)
    # The limit for a kernel that asks for it (see _kernel); PyTorch's stubs lack it.
    limit = int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
    check_shared(queries, targets, limit)

    import cupy

    cost, valid = cost.contiguous(), valid.contiguous()
    with cupy.cuda.Device(cost.device.index):
        kernel = _kernel(cost.device.index, limit - STATIC_BYTES)
        pointers = [cupy.uint64(tensor.data_ptr()) for tensor in (cost, valid, query, status)]
        sizes = [cupy.int32(size) for size in (batch, queries, targets)]
        with _stream(cost.device):
            kernel(
                (layers * batch,),  # grid: one block per problem
                (THREADS,),
                (*pointers, *sizes),
                shared_mem=shared_bytes(queries, targets),
            )
    return query, status


@assign.register_fake
def _(cost: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    _check(cost, valid)
    return _outputs(cost)


def nonfinite_entry(status: Tensor, targets: int) -> tuple[int, int, int, int] | None:
    """(layer, image, query, target) of the first cost that is not finite; None if all are. Waits for the GPU.

    Args:
        status: [M, B], from `assign`.
        targets: T of the costs that `assign` got.
    """
    for layer, row in enumerate(status.tolist()):
        for image, flat in enumerate(row):
            if flat >= 0:
                return layer, image, flat // targets, flat % targets
    return None


def _outputs(cost: Tensor) -> tuple[Tensor, Tensor]:
    layers, batch, _, targets = cost.shape
    query = torch.empty((layers, batch, targets), dtype=torch.int64, device=cost.device)
    return query, torch.empty((layers, batch), dtype=torch.int64, device=cost.device)


def _check(cost: Tensor, valid: Tensor) -> None:
    if cost.ndim != 4 or cost.dtype != torch.float32:
        raise ValueError(f"cost: expected [M, B, N, T] float32, got {list(cost.shape)} {cost.dtype}")
    if valid.ndim != 2 or valid.dtype != torch.bool:
        raise ValueError(f"valid: expected [B, T] bool, got {list(valid.shape)} {valid.dtype}")
    if valid.shape[0] != cost.shape[1] or valid.shape[1] != cost.shape[3]:
        raise ValueError(
            f"valid: expected [B, T] = {[cost.shape[1], cost.shape[3]]}, as cost has, got {list(valid.shape)}"
        )
    if valid.device != cost.device:
        raise ValueError(f"valid: expected on the device of cost, {cost.device}, got {valid.device}")


def _stream(device: torch.device) -> Any:
    """PyTorch's current stream on `device`, as CuPy's."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14; its ExternalStream warns of being deprecated
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)


@functools.cache
def _kernel(device: int, dynamic_limit: int) -> Any:
    """The compiled kernel, on the current device, which is `device`; half a second the first time.

    Above 48 KB a kernel has to ask for dynamic shared memory. This one asks once for all of it: what a launch takes then
    depends only on the launch.
    """
    import cupy

    kernel = cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=("-std=c++17",)).get_function("assign")
    kernel.max_dynamic_shared_size_bytes = dynamic_limit
    return kernel
