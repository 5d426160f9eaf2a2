"""A look at every picture of a data set: whether it can be decoded, whether it is grey, and which others are copies of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smca.datasets.batch import BoolArray, IntArray, UInt8Array
from smca.datasets.findings import Entry, Finding, Level, image_entry, of_images
from smca.datasets.images import read_image
from smca.datasets.table import AnnotationTable

_CELLS = 8
"""Of a thumbnail, per side."""
_ALIKE = 3.0
"""Copies differ by less than this in their thumbnails, of 255, as a root mean square: compression and resizing change the mean of
a cell by less, another picture of the same scene by more."""
_PLAIN = 3.0
"""Pictures whose thumbnail varies by less, of 255, as a standard deviation, are no copies for looking alike."""
_STEP, _SPREAD = 8, 8
"""A picture is grey if the colours of every 8th of its pixels (but one in a hundred) lie no further apart, of 255."""
_CHUNK = 512
_MIXED = 0.01
"""Where fewer are grey, or coloured, the data are of one kind."""


@dataclass(frozen=True, eq=False)
class Look:
    """What one picture shows."""

    fault: str
    """Why it cannot be decoded; empty if it can."""
    digest: int = 0
    """Of its file."""
    thumbnail: UInt8Array | None = None
    """[8, 8, 3]."""
    grey: bool = False


@dataclass(frozen=True, eq=False)
class Pictures:
    """What the pictures of a split show."""

    faults: dict[int, str]
    """Index of an image that cannot be decoded → why."""
    digests: IntArray
    """[images] of the files."""
    thumbnails: NDArray[np.float32]
    """[images, 192]."""
    grey: BoolArray
    """[images]."""

    @property
    def usable(self) -> IntArray:
        """Indices of the images that were decoded."""
        return np.setdiff1d(np.arange(len(self.grey)), list(self.faults))


def look_at_pictures(
    folder: Path, names: Sequence[str], track: Callable[[Iterator[Look]], Iterable[Look]] = iter
) -> Pictures:
    """Read and decode every file.

    Args:
        folder: of the pictures.
        names: relative to it.
        track: is given the pictures as they are looked at, and passes them on: to show how far it is.
    """
    faults: dict[int, str] = {}
    digests, grey = np.zeros(len(names), np.int64), np.zeros(len(names), np.bool_)
    thumbnails = np.zeros((len(names), 3 * _CELLS**2), np.float32)
    for index, look in enumerate(track(_looks(folder, names))):
        if look.thumbnail is None:
            faults[index] = look.fault
        else:
            digests[index], grey[index], thumbnails[index] = look.digest, look.grey, look.thumbnail.reshape(-1)
    return Pictures(faults, digests, thumbnails, grey)


def _looks(folder: Path, names: Sequence[str]) -> Iterator[Look]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(names), _CHUNK):  # a million at once would be a million objects that wait
            yield from pool.map(partial(_look, folder), names[start : start + _CHUNK])


def _look(folder: Path, name: str) -> Look:
    try:
        digest = hashlib.blake2b((folder / name).read_bytes(), digest_size=8).digest()
        image = read_image(folder / name)
    except (ValueError, OSError) as error:
        return Look(str(error))
    thumbnail = np.asarray(Image.fromarray(image).resize((_CELLS, _CELLS), Image.Resampling.BOX))
    some = image[::_STEP, ::_STEP].reshape(-1, 3)
    spread = some.max(axis=1) - some.min(axis=1)
    return Look("", int.from_bytes(digest, "little", signed=True), thumbnail, bool(np.mean(spread <= _SPREAD) > 0.99))


def find_in_pictures(tables: Mapping[str, AnnotationTable], pictures: Mapping[str, Pictures]) -> Iterator[Finding]:
    """What is to be said of the pictures of all splits, and between each two of them."""
    for split, seen in pictures.items():
        yield from _undecodable(split, tables[split], seen)
        yield from _copies_within(split, tables[split], seen)
    splits = list(pictures)
    for number, first in enumerate(splits):
        for second in splits[number + 1 :]:
            yield from _copies_between((first, second), tables, pictures)
    yield from _grey_and_colour(tables, pictures)


def _undecodable(split: str, table: AnnotationTable, seen: Pictures) -> Iterator[Finding]:
    def entries() -> Iterator[Entry]:
        return ({**image_entry(table, image), "why": why} for image, why in seen.faults.items())

    if count := len(seen.faults):
        level: Level = "warning" if split == "test" else "error"
        text = f"{count:,} image{'s' * (count > 1)} cannot be decoded, which ends a run that comes to them"
        yield Finding("undecodable-images", level, split, text, entries)


def _copies_within(split: str, table: AnnotationTable, seen: Pictures) -> Iterator[Finding]:
    usable = seen.usable
    _, first, counts = np.unique(seen.digests[usable], return_index=True, return_counts=True)
    repeated = np.setdiff1d(np.arange(len(usable)), first)
    if len(repeated):
        text = f"{len(repeated):,} image{'s are copies' if len(repeated) > 1 else ' is a copy'} of another one, byte for byte"
        original = dict(
            zip(seen.digests[usable][first[counts > 1]].tolist(), usable[first[counts > 1]].tolist(), strict=True)
        )
        pairs = [(image, original[int(seen.digests[image])]) for image in usable[repeated].tolist()]
        yield Finding("copies-in-a-split", "note", split, text, _pair_entries(pairs, (table, table)))


def _copies_between(
    splits: tuple[str, str], tables: Mapping[str, AnnotationTable], pictures: Mapping[str, Pictures]
) -> Iterator[Finding]:
    """Those of the second split that are in the first."""
    first, second = (pictures[split] for split in splits)
    by_digest = {
        digest: image for image, digest in zip(first.usable.tolist(), first.digests[first.usable].tolist(), strict=True)
    }
    same = [
        (by_digest[d], i) for i, d in enumerate(second.digests.tolist()) if i not in second.faults and d in by_digest
    ]
    known = {image for _, image in same}
    alike = [(a, b) for a, b in _alike(first, second) if b not in known]
    between = f"{splits[0]}, {splits[1]}"
    total = len(tables[splits[1]].sizes)
    both = tables[splits[0]], tables[splits[1]]
    for kind, pairs, how in (
        ("shared-images", same, "also in {}, byte for byte"),
        ("shared-pictures", alike, "probably also in {}: compressed or resized otherwise, or the same view again"),
    ):
        if count := len({image for _, image in pairs}):
            text = (
                f"{count:,} of the {total:,} images of {splits[1]} {'is' if count == 1 else 'are'} {how.format(splits[0])}; its AP "
                "rewards learning by heart"
            )
            yield Finding(kind, "warning", between, text, _pair_entries(pairs, both))


def _pair_entries(
    pairs: Sequence[tuple[int, int]], tables: tuple[AnnotationTable, AnnotationTable]
) -> Callable[[], Iterator[Entry]]:
    def entries() -> Iterator[Entry]:
        for a, b in pairs:
            other = image_entry(tables[1], b)
            yield {**image_entry(tables[0], a), "other_file": other["file"], "other_image_id": other["image_id"]}

    return entries


def _alike(first: Pictures, second: Pictures) -> Iterator[tuple[int, int]]:
    """Pairs of images of two splits whose thumbnails are nearly the same."""

    def sorted_by_brightness(seen: Pictures) -> tuple[IntArray, NDArray[np.float32], NDArray[np.float32]]:
        images = seen.usable
        images = images[seen.thumbnails[images].std(axis=1) > _PLAIN]
        images = images[np.argsort(seen.thumbnails[images].mean(axis=1), kind="stable")]
        thumbnails = seen.thumbnails[images] - 127.5  # around 0, for exact differences of squares
        return images, thumbnails, thumbnails.mean(axis=1)

    images_a, a, mean_a = sorted_by_brightness(first)
    images_b, b, mean_b = sorted_by_brightness(second)
    # A root mean square is no smaller than the difference of the means: only pictures of like brightness are compared.
    for start in range(0, len(a), _CHUNK):
        part = a[start : start + _CHUNK]
        low, high = np.searchsorted(mean_b, [mean_a[start] - _ALIKE, mean_a[start + len(part) - 1] + _ALIKE])
        near = b[low:high]
        squares = (part**2).sum(axis=1)[:, None] + (near**2).sum(axis=1) - 2 * part @ near.T
        for i, j in np.argwhere(squares < _ALIKE**2 * part.shape[1]).tolist():
            yield int(images_a[start + i]), int(images_b[low + j])


def _grey_and_colour(tables: Mapping[str, AnnotationTable], pictures: Mapping[str, Pictures]) -> Iterator[Finding]:
    shares = {split: float(seen.grey[seen.usable].mean()) for split, seen in pictures.items() if len(seen.usable)}
    if shares and max(shares.values()) - min(shares.values()) > 0.5:
        told = ", ".join(f"{share:.0%} of {split}" for split, share in shares.items())
        text = f"grey pictures are {told}: what is trained on is not what is measured on"
        yield Finding("grey-and-colour", "warning", ", ".join(shares), text)
        return
    for split, share in shares.items():
        if _MIXED <= share <= 1 - _MIXED:
            seen = pictures[split]
            fewer = share <= 0.5
            images = seen.usable[seen.grey[seen.usable] == fewer]
            what = f"{'grey' if fewer else 'in colour'}, the others {'in colour' if fewer else 'grey'}"
            verb = "is" if len(images) == 1 else "are"
            yield from of_images("grey-and-colour", "note", split, tables[split], images, f"{verb} {what}")
