"""Boxes as written → boxes to train on: their format, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smca.datasets.batch import BoolArray, FloatArray
from smca.datasets.options import AnnotationOptions

ROUNDING_PX = 0.5
"""A box may reach out of its image by this much (rounding) before it is counted as clipped."""
_LEAST_SIDE = float(np.finfo(np.float32).eps)
"""Of the image's: batches hold boxes as float32 fractions, in which a thinner box has no side."""
_FIT, _BEYOND, _BEYOND_COUNT = 0.95, 0.1, 2
"""Boxes have another format if so many of them lie within their image when read so, and so many reach out of it as x, y, w, h."""
_MARGIN = 0.02
"""Of the image's sides: carelessly drawn boxes reach out by so much, and prove nothing."""
_PERCENT_COUNT, _PERCENT_SIDE = 20, 200
"""Boxes that all lie in the first 100 pixels are percentages if they are so many, on images of at least such sides."""


@dataclass(frozen=True, eq=False)
class CheckedBoxes:
    """One row per annotation."""

    file_xywh: FloatArray
    """[rows, 4] x, y, width, height in pixels, as written."""
    clipped_xyxy: FloatArray
    """[rows, 4] corners in pixels, cut at the image's border."""
    degenerate: BoolArray
    """[rows] without area, or not finite."""
    outside: BoolArray
    """[rows] wholly outside the image."""
    clipped: BoolArray
    """[rows] cut by more than `ROUNDING_PX`."""


def boxes_in_pixels(values: FloatArray, sizes: FloatArray, options: AnnotationOptions) -> FloatArray:
    """[rows, 4] as written, in the format that `options` names → x, y, width, height in pixels. sizes: [rows, 2] width, height."""
    order, _, unit = ("xywh" if options.box_format == "auto" else options.box_format).partition("-")
    scale = {"": np.ones(4), "fractions": np.tile(sizes, 2), "percent": np.tile(sizes, 2) / 100}[unit]
    first, second = np.split(values * scale, 2, axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        if order == "xyxy":
            second = second - first
        elif order == "cxcywh":
            first = first - second / 2
    return np.concatenate([first, second], axis=1)


def check_boxes(file_xywh: FloatArray, sizes: FloatArray) -> CheckedBoxes:
    """file_xywh [rows, 4] in pixels of images of width and height `sizes` [rows, 2]."""
    with np.errstate(invalid="ignore", over="ignore"):
        start, sides = file_xywh[:, :2], file_xywh[:, 2:]
        end = start + sides
        clipped_start, clipped_end = np.maximum(start, 0.0), np.minimum(end, sizes)
        finite = np.isfinite(np.concatenate([file_xywh, end], axis=1)).all(axis=1)
        degenerate: BoolArray = ~finite | (sides <= _LEAST_SIDE * sizes).any(axis=1)
        left = clipped_end - clipped_start
        outside: BoolArray = ~degenerate & (left <= _LEAST_SIDE * sizes).any(axis=1)
        beyond = np.maximum(-start, end - sizes).max(axis=1, initial=-np.inf)
    return CheckedBoxes(
        file_xywh=file_xywh,
        clipped_xyxy=np.concatenate([clipped_start, clipped_end], axis=1),
        degenerate=degenerate,
        outside=outside,
        clipped=~degenerate & ~outside & (beyond > ROUNDING_PX),
    )


def require_xywh(values: FloatArray, sizes: FloatArray, path: Path) -> None:
    """Raise ValueError, with the evidence, if boxes are probably not x, y, width, height in pixels.

    values: [rows, 4] as written.  sizes: [rows, 2] width and height of each one's image.
    """
    finite = np.isfinite(values).all(axis=1)
    values, sizes = values[finite], sizes[finite]
    if not len(values):
        return
    start, second = values[:, :2], values[:, 2:]
    if (values >= 0).all() and (values <= 1).all() and (values % 1).any():
        _refuse(path, values, f"all {len(values):,} lie between 0 and 1", "fractions of the image", "xywh-fractions")
    ends = start + second
    percent = (values >= 0).all() and (ends <= 100.5).all() and (sizes >= _PERCENT_SIDE).all()
    if percent and len(values) >= _PERCENT_COUNT and (ends > 50).any():
        evidence = f"all {len(values):,} end before 100.5, on images of at least {_PERCENT_SIDE} pixels"
        _refuse(path, values, evidence, "percent of the image", "xywh-percent")
    margin = np.maximum(_MARGIN * sizes, ROUNDING_PX)
    beyond = (ends > sizes + margin).any(axis=1)
    if beyond.sum() < _BEYOND_COUNT or beyond.mean() < _BEYOND:
        return
    half = second / 2
    within = {
        "xyxy": ("two corners", (start >= -margin) & (second > start) & (second <= sizes + margin)),
        "cxcywh": ("centre and sides", (second > 0) & (start >= half - margin) & (start + half <= sizes + margin)),
    }
    for box_format, (name, fit) in within.items():
        share = fit.all(axis=1).mean()
        if share >= _FIT:
            evidence = (
                f"{beyond.sum():,} of {len(values):,} reach out of their image if read as x, y, width, height, and "
                f"{'all' if share == 1 else f'{share:.0%}'} lie within it if read as {name}"
            )
            _refuse(path, values[beyond], evidence, name, box_format)


def _refuse(path: Path, examples: FloatArray, evidence: str, meaning: str, box_format: str) -> None:
    raise ValueError(
        f"{path}: its boxes look like {meaning}, not like COCO's x, y, width, height in pixels: {evidence}; the first is "
        f"{[float(f'{v:.6g}') for v in examples[0]]}. If they are, read them so: --annotations.box-format {box_format}; if they "
        "are right as they stand: --annotations.box-format xywh"
    )
