"""How numbers are computed in a run: the same bits in every one, on a GPU too, and no time spent on the smallest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


def flushes_denormals() -> bool:
    """Whether this process takes numbers too small for the usual format for 0."""
    least = 5e-324
    return least * 1.0 == 0.0


@contextmanager
def without_denormals() -> Iterator[None]:
    """Within it, numbers too small for the usual format are 0, and afterwards as before: a narrow Gaussian leaves such attention
    weights, with which a CPU computes far more slowly."""
    flushed = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


def arrange_gradients(parallel: DistributedDataParallel) -> None:
    """Let every start of a run sum gradients over the processes in the same order.

    DDP puts all gradients into one bucket for its first backward pass, and from the second on into several, by their arrival. Where
    an element lies decides in which order three processes and more sum it, so a resumed run would round its first step otherwise
    than the uninterrupted run does. The first pass is therefore one of zeros, without the network. (DDP that looks for unused
    parameters keeps its one arrangement: nothing is done.)
    """
    if parallel.find_unused_parameters:
        return
    network = parallel.module
    parallel.module = _Weights(network)
    try:
        weights = parallel()
    finally:
        parallel.module = network
    torch.autograd.backward(weights, [torch.zeros_like(p) for p in network.parameters() if p.requires_grad])
    network.zero_grad(set_to_none=True)


class _Weights(nn.Module):
    """All parameters of a network that are trained."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> list[Tensor]:
        return [p.view_as(p) for p in self.network.parameters() if p.requires_grad]
