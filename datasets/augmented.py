"""`Augmented`: a dataset whose images are augmented anew in every epoch, reproducibly."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from smca.datasets.batch import Category, CocoDict, DetectionDataset, Report, Sample
from smca.datasets.transforms import Augmentation


class Augmented(torch.utils.data.Dataset[Sample]):
    """`dataset` with `augmentation` applied anew to every image in every epoch.

    The random numbers of an image, and the seed of those that a network draws for it, come from (seed, epoch, index)
    alone: neither the number of loader workers nor the order of the images matters, and a resumed run sees what the
    uninterrupted one would have seen. The epoch is kept in shared memory, so that `set_epoch` reaches persistent workers.
    """

    def __init__(self, dataset: DetectionDataset, augmentation: Augmentation, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"Augmented: seed must be at least 0, got {seed}")
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Call before iterating over the loader: with persistent workers, batches fetched ahead keep the old epoch."""
        if epoch < 0:
            raise ValueError(f"Augmented: epoch must be at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that the next image is augmented for."""
        return int(self._epoch)

    @property
    def categories(self) -> tuple[Category, ...]:
        """Those of the wrapped dataset."""
        return self.dataset.categories

    @property
    def report(self) -> Report:
        """That of the wrapped dataset."""
        return self.dataset.report

    @property
    def digest(self) -> str:
        """That of the wrapped dataset."""
        return self.dataset.digest

    def ground_truth(self) -> CocoDict:
        """That of the wrapped dataset: in pixels of the stored images, not of the augmented ones."""
        return self.dataset.ground_truth()

    def read(self, index: int, least_short_side: float) -> Sample:
        """An augmented image has the size that the augmentation gives it."""
        return self[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        sample = self.augmentation(self.dataset.read(index, self.augmentation.least_short_side), rng)
        return dataclasses.replace(sample, seed=int(rng.integers(2**63)))
