"""Opening a data set in COCO's format: the annotation file is held against the pictures, so that what is wrong shows now."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from smca.datasets.batch import BoolArray, FloatArray, IntArray, Report, digest_of
from smca.datasets.boxes import CheckedBoxes, boxes_in_pixels, check_boxes, require_xywh
from smca.datasets.coco_file import CocoFile, read_coco_file
from smca.datasets.coco_index import CocoIndex, Texts
from smca.datasets.file_names import find_images
from smca.datasets.frame import Headers, decide_frame, read_headers
from smca.datasets.images import Frame
from smca.datasets.options import AnnotationOptions

_EXAMPLES = 3


def open_coco(
    images_dir: Path,
    annotations_file: Path,
    options: AnnotationOptions,
    tell: Callable[[str, float], None] | None = None,
) -> CocoIndex:
    """Read the annotation file, find the pictures and read their headers, decide what boxes refer to, and check them.

    tell: is told of the progress: what is done, and the fraction of it.

    Raises what `CocoDetection` raises.
    """
    size = max(1, annotations_file.stat().st_size) if annotations_file.is_file() else 1
    file = read_coco_file(annotations_file, (lambda read: tell("annotations", read / size)) if tell else None)
    names, corrected, links = find_images(images_dir, file.file_names, annotations_file)
    headers = read_headers(
        images_dir, names, annotations_file, (lambda fraction: tell("images", fraction)) if tell else None
    )
    crowd = _crowd(file, options, annotations_file)
    frame, sizes, boxes = _boxes(file, headers, options, names, annotations_file)
    picture_sizes = headers.sizes(frame)
    trained = ~(crowd | boxes.degenerate | boxes.outside)
    own_ids = file.own_image_ids != file.image_ids.tolist()
    return CocoIndex(
        frame=frame,
        categories=file.categories,
        own_category_ids=file.own_category_ids,
        report=_report(
            file,
            boxes,
            names,
            crowd=crowd,
            trained=trained,
            frame=frame,
            turned=int(headers.turned.sum()),
            resized=int((sizes != picture_sizes).any(axis=1).sum()),
            links=links,
            corrected=corrected,
        ),
        digest=digest_of(
            [
                [(category.id, category.name) for category in file.categories],
                names,
                file.image_ids,
                sizes,
                file.positions[file.order],
                file.labels[file.order],
                boxes.file_xywh[file.order],
                crowd[file.order],
                trained[file.order],
            ]
        ),
        names=Texts.of(names),
        own_image_ids=Texts.of([json.dumps(own) for own in file.own_image_ids] if own_ids else []),
        image_ids=file.image_ids,
        sizes=sizes,
        picture_sizes=picture_sizes,
        positions=file.positions,
        file_xywh=boxes.file_xywh,
        clipped_xyxy=boxes.clipped_xyxy,
        areas=file.areas,
        labels=file.labels,
        crowd=crowd,
        degenerate=boxes.degenerate,
        outside=boxes.outside,
        clipped=boxes.clipped,
        trained=trained,
        annotation_ids=file.annotation_ids,
        order=file.order,
        starts=file.starts,
    )


def _report(
    file: CocoFile,
    boxes: CheckedBoxes,
    names: Sequence[str],
    *,
    crowd: BoolArray,
    trained: BoolArray,
    frame: Frame,
    turned: int,
    resized: int,
    links: int,
    corrected: int,
) -> Report:
    used = np.bincount(file.labels[trained], minlength=len(file.categories))
    dropped = np.flatnonzero(boxes.degenerate | boxes.outside)
    repairs = [f"{count:,} {what}" for what, count in file.repairs.items()]
    return Report(
        images=len(names),
        boxes=int(trained.sum()),
        classes=len(file.categories),
        empty_images=len(names) - len(np.unique(file.positions[trained])),
        crowds=int(np.count_nonzero(crowd & ~boxes.degenerate & ~boxes.outside)),
        degenerate=int(boxes.degenerate.sum()),
        outside=int(boxes.outside.sum()),
        clipped=int(boxes.clipped.sum()),
        turned=turned,
        frame=frame,
        links=links,
        resized=resized,
        repairs=tuple(repairs + [f"{corrected:,} file names corrected"] * bool(corrected)),
        unused_classes=tuple(c.name for c, n in zip(file.categories, used, strict=True) if n == 0),
        dropped_examples=tuple(
            f"annotation {file.annotation_ids[row]} of {names[file.positions[row]]}, "
            f"bbox {[float(f'{v:.6g}') for v in file.boxes[row]]}"
            for row in dropped[:_EXAMPLES]
        ),
    )


def _boxes(
    file: CocoFile, headers: Headers, options: AnnotationOptions, names: Sequence[str], path: Path
) -> tuple[Frame, IntArray, CheckedBoxes]:
    """The frame of the boxes, [images, 2] height and width in it, and the boxes in it."""
    # A picture's sides are needed to read fractions, and boxes in pixels to decide which side is which.
    written = np.where(file.sizes > 0, file.sizes, headers.sizes("upright"))
    frame = decide_frame(
        options, headers, file, boxes_in_pixels(file.boxes, _sides(written, file), options), names, path
    )
    sizes = _annotated_sizes(file, headers, frame, options)
    sides = _sides(sizes, file)
    if options.box_format == "auto":
        require_xywh(file.boxes, sides, path)
    return frame, sizes, check_boxes(boxes_in_pixels(file.boxes, sides, options), sides)


def _annotated_sizes(file: CocoFile, headers: Headers, frame: Frame, options: AnnotationOptions) -> IntArray:
    """[images, 2] height and width in pixels that boxes are in: the pictures' own, unless they were resized since."""
    sizes = headers.sizes(frame)
    if options.sizes != "scaled":
        return sizes
    own = [(file.sizes == each).all(axis=1) for each in (headers.stored_sizes, headers.sizes("upright"))]
    resized = (file.sizes > 0).all(axis=1) & ~own[0] & ~own[1]
    return np.where(resized[:, None], file.sizes, sizes)


def _sides(sizes: IntArray, file: CocoFile) -> FloatArray:
    """[images, 2] height and width → [rows, 2] width and height for each annotation."""
    return sizes[file.positions, ::-1].astype(np.float64)


def _crowd(file: CocoFile, options: AnnotationOptions, path: Path) -> BoolArray:
    """[rows] whether an annotation is a region of many objects."""
    if options.crowd == "objects":
        return np.zeros_like(file.crowd)
    if options.crowd == "auto" and len(file.crowd) and file.crowd.all():
        raise ValueError(
            f'{path}: all {len(file.crowd):,} annotations have "iscrowd": 1, which marks regions of many objects that nobody '
            "annotated one by one, so that there would be nothing to train on or to find. Exports of brushes and masks set it on "
            "every object: if these are objects, --annotations.crowd objects; if they are regions indeed, --annotations.crowd "
            "regions"
        )
    return file.crowd
