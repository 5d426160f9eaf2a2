"""How an annotation file is to be understood where it does not say so itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AnnotationOptions:
    """What decides where an annotation file leaves room; "auto" takes what is certain, and refuses what is probably wrong."""

    frame: Literal["auto", "upright", "stored"] = "auto"
    """What boxes refer to in photographs that have an EXIF orientation: the picture as viewers show it ("upright"), or as its
    pixels are stored. "auto" decides from sizes and boxes."""
    box_format: Literal[
        "auto",
        "xywh",
        "xyxy",
        "cxcywh",
        "xywh-fractions",
        "xyxy-fractions",
        "cxcywh-fractions",
        "xywh-percent",
        "xyxy-percent",
        "cxcywh-percent",
    ] = "auto"
    """What the four numbers of "bbox" are: corner and sides ("xywh", as COCO has it), two corners, or centre and sides; in pixels,
    in fractions of the image's width and height, or in percent of them. "auto" is "xywh", and refuses boxes that look like
    another."""
    crowd: Literal["auto", "regions", "objects"] = "auto"
    """What "iscrowd": 1 means: a region of many objects, which is not trained on ("regions", as COCO has it), or nothing
    ("objects"): exports of brushes and masks set it on every object. "auto" is "regions", and refuses a file in which all are."""
    sizes: Literal["auto", "scaled", "ignored"] = "auto"
    """What holds where "width" and "height" are not the picture's: its boxes are in pixels of the size written, since the picture
    was resized after it was annotated ("scaled"; results are in those pixels, too), or the size written is wrong ("ignored").
    "auto" refuses such a file."""
