"""What a loss is divided by."""

from __future__ import annotations

from torch import Tensor, distributed


def at_least_one(count: Tensor) -> Tensor:
    """A number of this process → its mean over all processes, at least 1, so that a batch has one divisor wherever its images
    are, and an empty one has one too."""
    count = count.float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count = count / distributed.get_world_size()
    return count.clamp(min=1.0)
