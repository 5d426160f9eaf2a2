"""A model divided over processes (FSDP2): each keeps a part of every parameter, its gradient and the optimiser's state of it.

The parameters of a layer of backbone or encoder are put together from all processes for its forward pass and again for its backward
pass, those of the decoder and the heads for a whole step. Such a parameter is a ``DTensor``, divided along its first axis. All
functions here also take what is not divided, and leave it as it is.
"""

from __future__ import annotations

import atexit
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from smca.gpu.model import SMCADETR
from smca.gpu.model.recompute import blocks_of


def shard(model: SMCADETR, device: torch.device, world: int) -> None:
    """Divide a model, in place, over all processes, before the optimiser is made. Buffers stay whole.

    Args:
        model: the same on each process, on its device.
        device: of the model.
        world: number of processes.
    """
    # Nothing writes into what the model returns, slices or not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (world,))
    for layer in (*blocks_of(model.backbone.body), *model.encoder.layers):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    atexit.register(_let_go, mesh)


def _let_go(mesh: DeviceMesh) -> None:
    """End the threads of the group of processes, which PyTorch's caches keep through `mesh` when the group is destroyed: one that
    still holds a tensor when Python ends would bring down a process that has done everything (SIGABRT)."""
    getattr(mesh, "_pg_registry", {}).clear()
    gc.collect()  # the layers keep the group, too


def local(tensor: Tensor) -> Tensor:
    """This process's part, of which a change is a change of the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_like(part: Tensor, like: Tensor) -> Tensor:
    """All of the tensor of which each process has a `part`, as it has one of `like`. Every process must ask."""
    if not isinstance(like, DTensor):
        return part
    together = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return together.full_tensor()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of `tensor`, which every process has the whole of, the part that it has of `like`, which has the same shape."""
    if not isinstance(like, DTensor):
        return tensor
    copies = [Replicate()] * like.device_mesh.ndim
    everywhere = DTensor.from_local(tensor, like.device_mesh, copies, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every process has the whole of, divided as `like` is. Every process must ask."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device).contiguous(), like.device_mesh, like.placements)


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state of a model with all parameters put together, one after the other, on the CPU. Every process must ask.

    Args:
        model: divided or not.
        keep: False leaves the result empty, on a process that has no use for it.
    """
    weights = {}
    for name, value in model.state_dict().items():
        together = whole(value)
        if keep:
            weights[name] = together.cpu()
    return weights


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within it, every process has all parameters of `model`, so that each may go through as many batches as it has."""
    divided = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in divided:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in divided:
            module.set_reshard_after_forward(
                module is not model, recurse=False
            )  # as it was: the outermost one stays together
            module.reshard()


@contextmanager
def adding_up(model: nn.Module, *, now: bool) -> Iterator[None]:
    """Whether processes add up the gradients of a backward pass within it: with those of a step's last part they do.

    Args:
        model: ``DistributedDataParallel``, a divided model, or one of a single process.
        now: False leaves each process with its own.
    """
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    yield
