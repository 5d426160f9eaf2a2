"""Values of an annotation file as exporters write them: read where their meaning is certain, refused by name where not."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import numpy as np
from pycocotools import mask as rle  # type: ignore[import-untyped]

from smca.datasets.settings import shown

Identity = int | str
"""An id: a whole number of any size, or a text that is none."""
Entry = dict[str, Any]

_WHOLE = re.compile(r"\s*([+-]?\d{1,40})(\.0+)?\s*")
_LARGEST_SIDE = 1_000_000


def required(entry: Entry, key: str, where: str) -> Any:
    """The value of a key that COCO's format needs."""
    if key not in entry:
        raise ValueError(
            f"{where}: the key {key!r} is missing (the entry has {shown(sorted(entry))}); COCO's format needs it"
        )
    return entry[key]


def identity(entry: Entry, key: str, where: str, repairs: Counter[str]) -> Identity:
    """An id. "12" and 12.0 are 12; any other text is an id as it is."""
    value = required(entry, key, where)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    whole = _whole(value)
    if whole is not None:
        repairs["ids written as text or as fractions"] += 1
        return whole
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError(f"{where}: {key!r} must be an integer or a text, got {shown(value)}")


def text(entry: Entry, key: str, where: str) -> str:
    """A text that is not empty; a number stands for its digits."""
    value = required(entry, key, where)
    if isinstance(value, int) and not isinstance(value, bool) and key == "name":
        return shown(value)
    if not isinstance(value, str) or not value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: {key!r} must be a non-empty string of whole characters, got {shown(value)}")
    return value


def side(entry: Entry, key: str, where: str) -> int | None:
    """Width or height in pixels; None where it is missing, null or 0, as some exporters write what they do not know."""
    value = entry.get(key)
    if value is None or value == 0:
        return None
    whole = value if isinstance(value, int) and not isinstance(value, bool) else _whole(value)
    if whole is None or not 1 <= whole <= _LARGEST_SIDE:
        raise ValueError(f"{where}: {key!r} must be an integer from 1 to {_LARGEST_SIDE:,}, got {shown(value)}")
    return whole


def box(entry: Entry, where: str, repairs: Counter[str]) -> tuple[float, float, float, float]:
    """'bbox' as four numbers; where it is missing, the extent of 'segmentation'."""
    value = entry.get("bbox")
    if value in (None, [], "") and entry.get("segmentation"):
        repairs["boxes taken from outlines"] += 1
        return _extent(entry["segmentation"], where)
    if "bbox" not in entry:
        required(entry, "bbox", f"{where}, which has no 'segmentation' either")
    parts = re.split(r"[,;\s]+", value.strip().strip("[]()").strip()) if isinstance(value, str) else value
    parts = parts if isinstance(parts, list) else []
    numbers = [number(part) for part in parts]
    if len(numbers) != 4 or None in numbers:
        raise ValueError(f"{where}: 'bbox' must be four numbers [x, y, width, height] in pixels, got {shown(value)}")
    if any(isinstance(part, str) for part in parts):
        repairs["boxes written as text"] += 1
    x, y, w, h = (float("nan") if n is None else n for n in numbers)
    return x, y, w, h


def number(value: object) -> float | None:
    """A number, also as text; None for anything else. What is too large for a float is infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def crowd(entry: Entry, where: str) -> bool:
    """'iscrowd': 0 or 1, also as text, as true or false, or missing."""
    value = entry.get("iscrowd")
    if value is None:
        return False
    known = number(value) if not isinstance(value, bool) else float(value)
    if known not in (0.0, 1.0):
        raise ValueError(f"{where}: 'iscrowd' must be 0 or 1, got {shown(value)}")
    return known == 1.0


def _whole(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    match = _WHOLE.fullmatch(value) if isinstance(value, str) else None
    return int(match[1]) if match else None


def _extent(segmentation: Any, where: str) -> tuple[float, float, float, float]:
    """x, y, width, height of polygons or of a run-length encoded mask."""
    try:
        if isinstance(segmentation, dict):
            height, width = (int(s) for s in segmentation["size"])
            counts = segmentation["counts"]
            if isinstance(counts, list):
                segmentation = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
                if sum(counts) != height * width or min(counts) < 0:
                    raise ValueError(f"its counts sum to {sum(counts)}, not to {height}×{width}")
            rle.decode(segmentation)  # which checks it
            x, y, w, h = (float(v) for v in rle.toBbox(segmentation))
            return x, y, w, h
        polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
        points = np.concatenate([np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons])
        (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        return x0, y0, x1 - x0, y1 - y0
    except Exception as error:  # pycocotools and NumPy meet a malformed one with errors of many kinds
        raise ValueError(
            f"{where}: there is no 'bbox', and 'segmentation' {shown(segmentation)} is neither a list of polygons "
            f"[x, y, x, y, …] nor a run-length encoded mask ({shown(error)})"
        ) from error
