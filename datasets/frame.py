"""Whether boxes refer to photographs as they are stored or as viewers show them: decided for a whole data set, from evidence.

A camera that is held upright stores a picture on its side, with an EXIF orientation that tells viewers to turn it. Labelling tools
show it turned, so boxes are upright, whichever size they write; COCO's own boxes refer to the stored pixels. What tells them apart:

    the sizes written    those of the upright picture: upright. (Those of the stored one say nothing: some tools write them and
                         mean upright.)
    the boxes            some reach out of one of the two and all lie within the other

A half turn, a mirrored and a square picture have one size either way; they follow the others of their data set.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smca.datasets.batch import BoolArray, FloatArray, IntArray
from smca.datasets.coco_file import CocoFile
from smca.datasets.images import Frame, Header, read_header
from smca.datasets.options import AnnotationOptions

_TOLERANCE_PX = 1.0
_FLAG = "--annotations.frame upright (as viewers show them) or --annotations.frame stored"
_SHOWN = 3
_READERS = 8
_BLOCK = 256
_MANY = 20_000


@dataclass(frozen=True, eq=False)
class Headers:
    """What the files of pictures say before they are decoded."""

    stored_sizes: IntArray
    """[images, 2] height and width in pixels."""
    orientations: IntArray
    """[images] EXIF's, 1 to 8; 1 = as stored."""

    @property
    def turned(self) -> BoolArray:
        """[images] whether viewers show it otherwise than it is stored."""
        turned: BoolArray = self.orientations != 1
        return turned

    def sizes(self, frame: Frame) -> IntArray:
        """[images, 2] height and width in pixels."""
        swapped = (self.orientations >= 5) & (frame == "upright")
        return np.where(swapped[:, None], self.stored_sizes[:, ::-1], self.stored_sizes)


def read_headers(
    images_dir: Path, names: Sequence[str], annotations_file: Path, progress: Callable[[float], None] | None = None
) -> Headers:
    """Size and orientation of every image. Raises ValueError that names those which are no pictures.

    progress: is told now and then what fraction of them is done.
    """
    values = np.ones((len(names), 3), dtype=np.int64)
    faults: list[str] = []
    blocks = [names[start : start + _BLOCK] for start in range(0, len(names), _BLOCK)]
    with _readers(len(names)) as pool:
        for number, (found, faulty) in enumerate(pool.map(_read_block, itertools.repeat(images_dir), blocks)):
            values[number * _BLOCK : number * _BLOCK + len(found)] = found
            faults += faulty
            if progress is not None:
                progress((number + 1) / len(blocks))
    if faults:
        raise ValueError(
            f"{len(faults):,} of {len(names):,} images of {annotations_file} cannot be used: {'; '.join(faults[:_SHOWN])}"
            f"{'; …' if len(faults) > _SHOWN else ''}, or remove their entries from the annotation file"
        )
    return Headers(values[:, :2], values[:, 2])


def _readers(count: int) -> Executor:
    """Threads, which wait for files side by side; for many images processes, since decoders spend most of the time in Python.

    They are forked, as torch's loaders are, and so at once: other ways of starting them import the main module again, which takes
    seconds, and in a script without ``if __name__ == "__main__"`` reads the data again.
    """
    processes = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if count >= _MANY and processes > 1:
        return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
    return ThreadPoolExecutor(_READERS)


def _read_block(images_dir: Path, names: Sequence[str]) -> tuple[list[tuple[int, int, int]], list[str]]:
    """Height, width and orientation of each image, 1 where it cannot be read; and what is wrong with those."""
    found, faults = [], []
    for name in names:
        try:
            header = read_header(images_dir / name)
        except (ValueError, OSError) as error:
            faults.append(str(error))
            header = Header((1, 1), 1)
        found.append((*header.stored_size, header.orientation))
    return found, faults


def decide_frame(
    options: AnnotationOptions,
    headers: Headers,
    file: CocoFile,
    boxes_xywh: FloatArray,
    names: Sequence[str],
    annotations_file: Path,
) -> Frame:
    """The frame that boxes refer to; also checks the sizes written.

    Args:
        headers: of the images.
        file: the annotation file, with the sizes written and the rows of each image.
        boxes_xywh: [rows, 4] its boxes in pixels.
        names: of the images, for messages.

    Raises:
        ValueError: a size that is neither the stored nor the upright one's (unless `options.sizes` allows it), or evidence that is
            missing or contradicts itself and no `options.frame` to decide.
    """
    if options.sizes == "auto":
        _check_sizes(headers, file.sizes, names, annotations_file)
    if options.frame != "auto":
        return options.frame
    turned: list[int] = np.flatnonzero(headers.turned).tolist()
    if not turned:
        return "upright"
    upright_sizes = headers.sizes("upright")
    differ = (upright_sizes != headers.stored_sizes).any(axis=1)
    written_upright = differ & (file.sizes == upright_sizes).all(axis=1)
    written_stored = differ & (file.sizes == headers.stored_sizes).all(axis=1)
    rows = {i: boxes_xywh[file.rows_of(i)] for i in turned}
    by_size = [i for i in turned if written_upright[i]]
    fit_upright = {i for i in turned if _fit(upright_sizes[i], rows[i])}
    fit_stored = {i for i in turned if _fit(headers.stored_sizes[i], rows[i])}
    upright, stored = fit_upright - fit_stored, fit_stored - fit_upright
    say_upright, say_stored = sorted({*by_size, *upright}), sorted(stored - set(by_size))
    as_stored = [i for i in turned if by_size and written_stored[i] and i not in upright]
    contradicting = sorted({*say_stored, *as_stored}) if say_upright else []
    if contradicting:
        raise ValueError(
            f"{annotations_file}: boxes or sizes refer to the upright picture in {_some(say_upright, names)}, but to the stored "
            f"one in {_some(contradicting, names)} (their EXIF orientation turns them for viewing). Decide with {_FLAG}"
        )
    if say_upright or say_stored:
        return "upright" if say_upright else "stored"
    with_boxes = [i for i in turned if len(rows[i])]
    if with_boxes:
        raise ValueError(
            f"{annotations_file}: the EXIF orientation of {_some(with_boxes, names)} turns them for viewing, and neither sizes nor "
            "boxes tell whether the boxes refer to the turned or to the stored picture. Look at one in your labelling tool and "
            f"decide with {_FLAG}"
        )
    return "upright"


def _fit(size: IntArray, boxes_xywh: FloatArray) -> bool:
    """Whether all boxes lie within a picture of this height and width."""
    boxes = boxes_xywh[np.isfinite(boxes_xywh).all(axis=1)]
    return bool((boxes[:, :2] + boxes[:, 2:] <= size[::-1] + _TOLERANCE_PX).all())


def _check_sizes(headers: Headers, written: IntArray, names: Sequence[str], annotations_file: Path) -> None:
    known = (written != 0).any(axis=1)
    right = [(written == sizes).all(axis=1) for sizes in (headers.stored_sizes, headers.sizes("upright"))]
    wrong = np.flatnonzero(known & ~right[0] & ~right[1])
    if not len(wrong):
        return
    (height, width), size = headers.stored_sizes[wrong[0]], written[wrong[0]]
    raise ValueError(
        f"{names[wrong[0]]} is {width}×{height} pixels, but {annotations_file} says {size[1]}×{size[0]}"
        f"{f' (and so for {len(wrong):,} of {len(names):,} images)' if len(wrong) > 1 else ''}; boxes would be misplaced: use the "
        "images that were annotated; or, if the pictures were resized since, --annotations.sizes scaled; or, if the sizes written "
        "are wrong, --annotations.sizes ignored"
    )


def _some(indices: Sequence[int], names: Sequence[str]) -> str:
    listed = ", ".join(names[i] for i in indices[:_SHOWN]) + (", …" if len(indices) > _SHOWN else "")
    return f"{len(indices):,} image{'s' * (len(indices) > 1)} ({listed})"
