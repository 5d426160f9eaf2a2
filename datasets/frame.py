"""Whether boxes refer to photographs as they are stored or as viewers show them: decided for a whole data set, from evidence.

A camera that is held upright stores a picture on its side, with an EXIF orientation that tells viewers to turn it. Labelling tools
show it turned, so boxes are upright, whichever size they write; COCO's own boxes refer to the stored pixels. What tells them apart:

    the sizes written    those of the upright picture: upright. (Those of the stored one say nothing: some tools write them and
                         mean upright.)
    the boxes            some reach out of one of the two and all lie within the other

A half turn, a mirrored and a square picture have one size either way; they follow the others of their data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from smca.datasets.batch import FloatArray
from smca.datasets.coco_file import CocoFile
from smca.datasets.images import Frame, Header, read_header
from smca.datasets.options import AnnotationOptions

_TOLERANCE_PX = 1.0
_FLAG = "--annotations.frame upright (as viewers show them) or --annotations.frame stored"
_SHOWN = 3
_READERS = 8


def read_headers(images_dir: Path, names: Sequence[str], annotations_file: Path) -> list[Header]:
    """Size and orientation of every image. Raises ValueError that names those which are no pictures."""

    def header_or_fault(name: str) -> Header | str:
        try:
            return read_header(images_dir / name)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(_READERS) as pool:
        headers = list(pool.map(header_or_fault, names))
    faults = [header for header in headers if isinstance(header, str)]
    if faults:
        raise ValueError(
            f"{len(faults):,} of {len(names):,} images of {annotations_file} cannot be used: {'; '.join(faults[:_SHOWN])}"
            f"{'; …' if len(faults) > _SHOWN else ''}, or remove their entries from the annotation file"
        )
    return [header for header in headers if isinstance(header, Header)]


def decide_frame(
    options: AnnotationOptions,
    headers: Sequence[Header],
    file: CocoFile,
    boxes_xywh: FloatArray,
    names: Sequence[str],
    annotations_file: Path,
) -> Frame:
    """The frame that boxes refer to; also checks the sizes written.

    Args:
        headers: of each image.
        file: the annotation file, with the sizes written and the rows of each image.
        boxes_xywh: [rows, 4] its boxes in pixels.
        names: of the images, for messages.

    Raises:
        ValueError: a size that is neither the stored nor the upright one's (unless `options.sizes` allows it), or evidence that is
            missing or contradicts itself and no `options.frame` to decide.
    """
    written = file.sizes
    if options.sizes == "auto":
        _check_sizes(headers, written, names, annotations_file)
    turned = [i for i, header in enumerate(headers) if header.is_turned]
    if options.frame != "auto":
        return options.frame
    if not turned:
        return "upright"
    rows = {i: boxes_xywh[file.rows_of(i)] for i in turned}
    by_size = [
        i
        for i in turned
        if written[i] == headers[i].size("upright") and headers[i].size("upright") != headers[i].stored_size
    ]
    upright = [i for i in turned if _only_fit("upright", headers[i], rows[i])]
    stored = [i for i in turned if _only_fit("stored", headers[i], rows[i])]
    say_upright, say_stored = sorted({*by_size, *upright}), sorted(set(stored) - set(by_size))
    as_stored = [
        i
        for i in turned
        if by_size and written[i] == headers[i].stored_size != headers[i].size("upright") and i not in upright
    ]
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


def _only_fit(frame: Frame, header: Header, boxes_xywh: FloatArray) -> bool:
    """Whether all boxes lie within the picture in this frame, and some reach out of it in the other."""
    other: Frame = "stored" if frame == "upright" else "upright"
    return _fit(header.size(frame), boxes_xywh) and not _fit(header.size(other), boxes_xywh)


def _fit(size: tuple[int, int], boxes_xywh: FloatArray) -> bool:
    boxes = boxes_xywh[np.isfinite(boxes_xywh).all(axis=1)]
    ends = boxes[:, :2] + boxes[:, 2:]
    return bool((ends <= np.array([size[1], size[0]]) + _TOLERANCE_PX).all())


def _check_sizes(
    headers: Sequence[Header], written: Sequence[tuple[int, int] | None], names: Sequence[str], annotations_file: Path
) -> None:
    wrong = [
        i
        for i, (header, size) in enumerate(zip(headers, written, strict=True))
        if size is not None and size not in (header.stored_size, header.size("upright"))
    ]
    if not wrong:
        return
    height, width = headers[wrong[0]].stored_size
    size = written[wrong[0]]
    assert size is not None
    raise ValueError(
        f"{names[wrong[0]]} is {width}×{height} pixels, but {annotations_file} says {size[1]}×{size[0]}"
        f"{f' (and so for {len(wrong):,} of {len(names):,} images)' if len(wrong) > 1 else ''}; boxes would be misplaced: use the "
        "images that were annotated; or, if the pictures were resized since, --annotations.sizes scaled; or, if the sizes written "
        "are wrong, --annotations.sizes ignored"
    )


def _some(indices: Sequence[int], names: Sequence[str]) -> str:
    listed = ", ".join(names[i] for i in indices[:_SHOWN]) + (", …" if len(indices) > _SHOWN else "")
    return f"{len(indices):,} image{'s' * (len(indices) > 1)} ({listed})"
