"""The same bits in every run, on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smca.gpu.config_json import cut

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""What makes matrix products on a GPU sum in the same order every time, if it is set before CUDA starts."""
_ORDERED = (":4096:8", ":16:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, PyTorch takes no operation that sums in an order of its own (if it is `wanted`). Ours never do.

    Raises:
        ValueError: CUDA has started under other settings, or an operation has no such form; names it.
    """
    if not wanted:
        yield
        return
    if os.environ.get(CUBLAS) not in _ORDERED:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise ValueError(
                f"deterministic needs {CUBLAS}={_ORDERED[0]} before CUDA starts, and it has started: set it in the environment"
            )
        os.environ[CUBLAS] = _ORDERED[0]
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ValueError(
            f"an operation of this network or loss cannot be had with --deterministic ({cut(error, 200)}): take another "
            "backbone, or train without it"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
