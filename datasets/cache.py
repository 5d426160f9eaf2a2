"""Keeps decoded images in memory: for data that fit, on a machine whose cores are better used for training.

The bytes live in anonymous shared memory (`mmap`), reserved once and filled as images are read, so that loader workers
that were forked from this process share one copy. It is not under /dev/shm, whose size containers often limit to
64 MB. A worker started by `spawn` or `forkserver` receives an empty cache of its own.

Data that do not fit are kept in part: the first images, as many as `memory_limit` allows.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from smca.datasets.batch import IntArray, UInt8Array

_SHARE = 3
"""A cache takes at most one part in so many of the memory that is free: training and held-out data have one each."""


class ImageCache:
    """Keeps uint8 RGB images of known sizes; `nbytes` is what it takes when full: the sum of height·width·3 of those it keeps."""

    def __init__(self, sizes: IntArray, limit: int | None = None) -> None:
        """sizes: [images, 2] height and width in pixels, in the dataset's order.  limit: bytes; None = `memory_limit()`."""
        limit = memory_limit() if limit is None else limit
        kept = int(np.searchsorted(np.cumsum(sizes.prod(axis=1) * 3), limit, side="right"))
        self._sizes = sizes[:kept]
        self.left_out = len(sizes) - kept
        """Images that it has no room for."""
        self._reserve()

    def _reserve(self) -> None:
        self._starts = np.concatenate([[0], np.cumsum(self._sizes.prod(axis=1) * 3)])
        self.nbytes = int(self._starts[-1])
        # Pages are taken from the system only when first written.
        self._pixels: UInt8Array = np.frombuffer(mmap.mmap(-1, max(1, self.nbytes)), dtype=np.uint8)
        self._filled: UInt8Array = np.frombuffer(mmap.mmap(-1, max(1, len(self._sizes))), dtype=np.uint8)

    def get(self, index: int) -> UInt8Array | None:
        """The image [H, W, 3] as a read-only view, or None if it has not been put in yet."""
        if index >= len(self._sizes) or not self._filled[index]:
            return None
        return self._view(index, writeable=False)

    def put(self, index: int, image: UInt8Array) -> UInt8Array:
        """Keep `image` [H, W, 3] and return the kept copy, read-only. Its size must be the one given for `index`.

        An image that there is no room for is returned as it is.
        """
        if index >= len(self._sizes):
            return image
        self._view(index, writeable=True)[...] = image
        self._filled[index] = 1  # after the bytes: another worker must not read half an image
        return self._view(index, writeable=False)

    def _view(self, index: int, writeable: bool) -> UInt8Array:
        view = self._pixels[self._starts[index] : self._starts[index + 1]].reshape(*self._sizes[index], 3)
        view.flags.writeable = writeable
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {"_sizes": self._sizes, "left_out": self.left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reserve()


def memory_limit() -> int:
    """Bytes that a cache of this process may take: a share of what the machine, or the container around it, has free."""
    free = [_meminfo_available(), _container_available()]
    known = [each for each in free if each is not None]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
    return min(known) // _SHARE // processes if known else 1 << 62


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):  # not Linux
        return None


def _container_available() -> int | None:
    """Of the control group (version 2, then 1) that this process is in, if it has a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            return max(0, int((root / limit).read_text("ascii")) - int((root / used).read_text("ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
