"""What a loss is divided by."""

from __future__ import annotations

from torch import Tensor, distributed


def boxes_per_process(count: Tensor) -> Tensor:
    """The objects of this process in a step → the mean over all processes, of at least one object in all: what each process
    divides its loss by, so that the mean of their gradients is that of one process that has all images."""
    count, world = count.float(), 1
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        world = distributed.get_world_size()
    return count.clamp(min=1.0) / world
