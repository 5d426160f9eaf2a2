"""Reading and checking a COCO annotation file; the arrays that `CocoDetection` serves from.

    {"images":      [{"id", "file_name", "width", "height"}, …],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"?, "area"?}, …],
     "categories":  [{"id", "name"}, …]}

Annotations are kept in flat arrays sorted by image, without segmentations: COCO's training split thus takes 50 MB
instead of 3 GB, and loader workers do not copy it page by page as they would copy Python objects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smca.datasets.batch import Category, CocoDict, FloatArray, IntArray, Report

ROUNDING_PX = 0.5
"""A box may reach out of its image by this much (rounding) before it is counted as clipped."""
_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """A checked annotation file. A row is an annotation; rows of image i are starts[i] to starts[i + 1]."""

    image_ids: list[int]
    file_names: list[str]
    sizes: list[tuple[int, int]]
    """(height, width) in pixels."""
    categories: tuple[Category, ...]
    report: Report
    starts: IntArray
    """[images + 1]."""
    boxes_xyxy: FloatArray
    """[rows, 4] pixels, inside the image."""
    labels: IntArray
    """[rows] index into `categories`."""
    crowd: NDArray[np.bool_]
    """[rows]."""
    areas: FloatArray
    """[rows] pixels²: the file's own (of the segmentation, if it has one), or that of the box."""
    annotation_ids: IntArray
    """[rows] the file's own."""

    def ground_truth(self) -> CocoDict:
        """See `CocoDetection.ground_truth`."""
        shift = max(0, 1 - int(self.annotation_ids.min())) if len(self.annotation_ids) else 0
        annotations: list[dict[str, Any]] = []
        for i, image_id in enumerate(self.image_ids):
            for row in range(int(self.starts[i]), int(self.starts[i + 1])):
                x0, y0, x1, y1 = (float(value) for value in self.boxes_xyxy[row])
                annotations.append(
                    {
                        "id": int(self.annotation_ids[row]) + shift,
                        "image_id": image_id,
                        "category_id": self.categories[self.labels[row]].id,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": float(self.areas[row]),
                        "iscrowd": int(self.crowd[row]),
                    }
                )
        return {
            "info": {},
            "licenses": [],
            "images": [
                {"id": image_id, "file_name": name, "width": width, "height": height}
                for image_id, name, (height, width) in zip(self.image_ids, self.file_names, self.sizes, strict=True)
            ],
            "annotations": annotations,
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }


def read_annotations(path: Path) -> CocoAnnotations:
    """Read and check the annotation file at `path`.

    Raises FileNotFoundError if it is missing; ValueError, naming the file and the entry, if it is not JSON, lacks a
    key, has a value of the wrong kind, repeats an id, or refers to an image or a category that it does not list.
    """
    content = _load(path)
    categories = _categories(content["categories"], path)
    image_ids, file_names, sizes = _images(content["images"], path)
    label_of = {category.id: label for label, category in enumerate(categories)}
    position_of = {image_id: position for position, image_id in enumerate(image_ids)}

    positions: list[int] = []
    rows: list[tuple[float, float, float, float, float]] = []
    labels: list[int] = []
    crowd: list[bool] = []
    annotation_ids: list[int] = []
    seen: set[int] = set()
    counts = {"degenerate": 0, "outside": 0, "clipped": 0}
    dropped: list[str] = []
    for number, entry in enumerate(content["annotations"]):
        where = f"{path}: annotations[{number}]"
        annotation_id = _integer(entry, "id", where)
        where = f"{where} (id {annotation_id})"
        if annotation_id in seen:
            raise ValueError(f"{where}: this id was used before; give every annotation its own id")
        seen.add(annotation_id)
        image_id, category_id = _integer(entry, "image_id", where), _integer(entry, "category_id", where)
        if image_id not in position_of:
            raise ValueError(f"{where}: image_id {image_id} is not in 'images'; add the image or remove the annotation")
        if category_id not in label_of:
            raise ValueError(
                f"{where}: category_id {category_id} is not in 'categories' (ids {sorted(label_of)[:20]}); "
                "add the category or correct the annotation"
            )
        x, y, w, h = bbox = _bbox(entry, where)
        position = position_of[image_id]
        height, width = sizes[position]
        x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
        fault = ""
        if not all(math.isfinite(value) for value in bbox) or w <= 0 or h <= 0:
            fault = "degenerate"
        elif x1 <= x0 or y1 <= y0:
            fault = "outside"
        elif max(-x, -y, x + w - width, y + h - height) > ROUNDING_PX:
            counts["clipped"] += 1
        if fault:
            counts[fault] += 1
            if len(dropped) < _EXAMPLES:
                dropped.append(f"annotation {annotation_id} of {file_names[position]}, bbox {entry['bbox']}")
            continue
        positions.append(position)
        clipped = (x0, y0, x1, y1) != (x, y, x + w, y + h)
        rows.append((x0, y0, x1, y1, _area(entry, (x1 - x0) * (y1 - y0), clipped)))
        labels.append(label_of[category_id])
        crowd.append(_iscrowd(entry, where))
        annotation_ids.append(annotation_id)

    # A stable sort: annotations of an image stay in the file's order.
    order = np.argsort(np.array(positions, dtype=np.int64), kind="stable")
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)[order]
    label_array = np.array(labels, dtype=np.int64)[order]
    crowd_array = np.array(crowd, dtype=np.bool_)[order]
    per_image = np.bincount(np.array(positions, dtype=np.int64), minlength=len(image_ids))
    trained = np.bincount(np.array(positions, dtype=np.int64)[order][~crowd_array], minlength=len(image_ids))
    used = np.bincount(label_array[~crowd_array], minlength=len(categories))
    return CocoAnnotations(
        image_ids=image_ids,
        file_names=file_names,
        sizes=sizes,
        categories=categories,
        report=Report(
            images=len(image_ids),
            boxes=int(trained.sum()),
            classes=len(categories),
            empty_images=int((trained == 0).sum()),
            crowds=int(crowd_array.sum()),
            unused_classes=tuple(category.name for category, n in zip(categories, used, strict=True) if n == 0),
            dropped_examples=tuple(dropped),
            **counts,
        ),
        starts=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        boxes_xyxy=table[:, :4].copy(),
        labels=label_array,
        crowd=crowd_array,
        areas=table[:, 4].copy(),
        annotation_ids=np.array(annotation_ids, dtype=np.int64)[order],
    )


def _load(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"the annotation file {path} does not exist; expected a JSON file in COCO's format")
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; was the download or the export cut short?") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected an object with 'images', 'annotations' and 'categories', got a {type(content).__name__}"
            "; is it a file of detection results?"
        )
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise ValueError(
                f"{path}: the key {key!r} is missing (the file has {sorted(content)}); export in COCO's format"
            )
        if not isinstance(content[key], list):
            raise ValueError(f"{path}: {key!r} must be a list, got a {type(content[key]).__name__}")
        for number, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: {key}[{number}] must be an object, got {entry!r}")
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f"{path}: {key!r} is empty; there is nothing to train on or to evaluate")
    return content


def _categories(entries: Sequence[dict[str, Any]], path: Path) -> tuple[Category, ...]:
    categories: dict[int, Category] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: categories[{number}]"
        category = Category(_integer(entry, "id", where), _text(entry, "name", where))
        if category.id in categories:
            raise ValueError(f"{where}: category id {category.id} was used before; give every category its own id")
        categories[category.id] = category
    return tuple(categories[category_id] for category_id in sorted(categories))


def _images(entries: Sequence[dict[str, Any]], path: Path) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    ids: dict[int, int] = {}
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    for number, entry in enumerate(entries):
        where = f"{path}: images[{number}]"
        image_id = _integer(entry, "id", where)
        where = f"{where} (id {image_id})"
        if image_id in ids:
            raise ValueError(f"{where}: images[{ids[image_id]}] has the same id; give every image its own")
        ids[image_id] = number
        names.append(_text(entry, "file_name", where))
        size = _integer(entry, "height", where), _integer(entry, "width", where)
        if min(size) < 1:
            raise ValueError(f"{where}: width and height must be at least 1, got {size[1]}×{size[0]}")
        sizes.append(size)
    return list(ids), names, sizes


def _require(entry: dict[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise ValueError(f"{where}: the key {key!r} is missing (the entry has {sorted(entry)}); COCO's format needs it")
    return entry[key]


def _integer(entry: dict[str, Any], key: str, where: str) -> int:
    value = _require(entry, key, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key!r} must be an integer, got {value!r}")
    return value


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = _require(entry, key, where)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {key!r} must be a non-empty string, got {value!r}")
    return value


def _bbox(entry: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    value = _require(entry, "bbox", where)
    numeric = isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not numeric or len(value) != 4:
        raise ValueError(f"{where}: 'bbox' must be four numbers [x, y, width, height] in pixels, got {value!r}")
    x, y, w, h = (float(v) for v in value)
    return x, y, w, h


def _iscrowd(entry: dict[str, Any], where: str) -> bool:
    value = entry.get("iscrowd", 0)
    if value not in (0, 1):
        raise ValueError(f"{where}: 'iscrowd' must be 0 or 1, got {value!r}")
    return bool(value)


def _area(entry: dict[str, Any], box_area: float, clipped: bool) -> float:
    area = entry.get("area")
    if not isinstance(area, (int, float)) or isinstance(area, bool) or not math.isfinite(area) or area <= 0:
        return box_area
    return min(float(area), box_area) if clipped else float(area)
