"""Keeps decoded images in memory: for data that fit, on a machine whose cores are better used for training.

The bytes live in anonymous shared memory (`mmap`), reserved once and filled as images are read, so that loader workers
that were forked from this process share one copy. It is not under /dev/shm, whose size containers often limit to
64 MB. A worker started by `spawn` or `forkserver` receives an empty cache of its own.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from smca.datasets.batch import UInt8Array


class ImageCache:
    """Keeps uint8 RGB images of known sizes; `nbytes` is what it takes when full: the sum of height·width·3."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        """sizes: (height, width) in pixels of every image, in the dataset's order."""
        self._sizes = list(sizes)
        self._reserve()

    def _reserve(self) -> None:
        areas = np.array([height * width * 3 for height, width in self._sizes], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(areas)])
        self.nbytes = int(self._starts[-1])
        # Pages are taken from the system only when first written.
        self._pixels: UInt8Array = np.frombuffer(mmap.mmap(-1, max(1, self.nbytes)), dtype=np.uint8)
        self._filled: UInt8Array = np.frombuffer(mmap.mmap(-1, max(1, len(self._sizes))), dtype=np.uint8)

    def get(self, index: int) -> UInt8Array | None:
        """The image [H, W, 3] as a read-only view, or None if it has not been put in yet."""
        if not self._filled[index]:
            return None
        return self._view(index, writeable=False)

    def put(self, index: int, image: UInt8Array) -> UInt8Array:
        """Keep `image` [H, W, 3] and return the kept copy, read-only. Its size must be the one given for `index`."""
        self._view(index, writeable=True)[...] = image
        self._filled[index] = 1  # after the bytes: another worker must not read half an image
        return self._view(index, writeable=False)

    def _view(self, index: int, writeable: bool) -> UInt8Array:
        view = self._pixels[self._starts[index] : self._starts[index + 1]].reshape(*self._sizes[index], 3)
        view.flags.writeable = writeable
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {"_sizes": self._sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reserve()
