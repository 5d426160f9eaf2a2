"""Which images make which step: a function of seed, epoch and step alone, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class GlobalBatches(Sampler[list[int]]):
    """This process's part of every batch of an epoch, from any batch on, in one list or in several.

    Each epoch has a permutation of its own, of which a batch takes the next `batch_size` indices; process r of W takes every W-th
    of them, from the r-th on. What is left over at the end of an epoch is left out; fewer images than one batch are one batch.
    """

    def __init__(
        self, length: int, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0, parts: int = 1
    ) -> None:
        """Divide up an epoch.

        Args:
            length: images in an epoch.
            batch_size: images per step, over all processes.
            rank: of this process.
            world: number of processes.
            seed: of the permutations.
            parts: lists of indices that a process's part of a batch is divided into, one after the other.

        Raises:
            ValueError: batches that the processes cannot share equally.
        """
        if batch_size % (world * parts):
            of_each = f", which each take them in {parts} parts (accumulate)" if parts > 1 else ""
            raise ValueError(
                f"batch_size = {batch_size} images per step cannot be split over {world} processes{of_each}: take a multiple of "
                f"{world * parts}"
            )
        self.length, self.batch_size, self.rank, self.world, self.seed = length, batch_size, rank, world, seed
        self.parts = parts
        self.epoch = self.first = 0

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration be this epoch's, from this batch on."""
        self.epoch, self.first = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return max(1, self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(self.first, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            while len(indices) % (self.world * self.parts):  # fewer than a batch: each part needs as many as the others
                indices.append(indices[len(indices) % self.length])
            for part in range(self.parts):
                yield indices[self.rank + part * self.world :: self.world * self.parts]


def seed_step(device: torch.device, seed: int, step: int, rank: int = 0) -> None:
    """Seed what a step draws on the device and on the host, dropout and noise, from where the step stands in the run: a step that
    is done again after a resumption draws the same numbers, and processes draw different ones."""
    # 64 bits of a hash: neighbouring steps of neighbouring seeds have nothing in common.
    low, high = np.random.SeedSequence((seed, step, rank)).generate_state(2, np.uint32).tolist()
    value = high << 32 | low
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)
