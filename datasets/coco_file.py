"""Reading a COCO annotation file: what it says, before it is held against the pictures.

    {"images":      [{"id", "file_name", "width", "height"}, …],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"?, "area"?}, …],
     "categories":  [{"id", "name"}, …]}

Annotations are kept in flat arrays, without segmentations: COCO's training split thus takes 50 MB instead of 3 GB, and loader
workers do not copy it page by page as they would copy Python objects.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smca.datasets import json_values
from smca.datasets.batch import BoolArray, Category, FloatArray, IntArray
from smca.datasets.json_values import Entry, Identity
from smca.datasets.settings import shown

_LARGEST_ID = 2**63 - 1


@dataclass(frozen=True, eq=False)
class CocoFile:
    """An annotation file. A row is an annotation; rows stand in the file's order."""

    image_ids: list[int]
    """The file's own, if all are whole numbers of 64 bits; otherwise 1, 2, 3 …"""
    own_image_ids: list[Any]
    """As the file writes them."""
    file_names: list[str]
    """As written."""
    sizes: list[tuple[int, int] | None]
    """(height, width) in pixels; None where the file has none."""
    categories: tuple[Category, ...]
    """Sorted by id; ids as of images."""
    own_category_ids: dict[int, Any]
    """As the file writes them, by the id in `categories`."""
    positions: IntArray
    """[rows] index of the image."""
    boxes: FloatArray
    """[rows, 4] as written."""
    labels: IntArray
    """[rows] index into `categories`."""
    crowd: BoolArray
    """[rows] iscrowd."""
    areas: FloatArray
    """[rows] pixels²; NaN where the file has none, or an impossible one."""
    annotation_ids: IntArray
    """[rows] the file's own, if all are whole numbers of 64 bits; otherwise 1, 2, 3 …"""
    repairs: Counter[str]
    """What was written otherwise than COCO's format has it, and how often."""

    @cached_property
    def order(self) -> IntArray:
        """[rows] The rows image by image, those of one image in the file's order."""
        return np.argsort(self.positions, kind="stable")

    def rows_of(self, image: int) -> IntArray:
        """The rows of an image."""
        return self.order[self._starts[image] : self._starts[image + 1]]

    @cached_property
    def _starts(self) -> IntArray:
        """[images + 1] Where each image's rows begin in `order`."""
        return np.searchsorted(self.positions[self.order], np.arange(len(self.image_ids) + 1))


def read_coco_file(path: Path) -> CocoFile:
    """Read the annotation file at `path`.

    Raises FileNotFoundError if it is missing; ValueError, naming the file and the entry, if it is not JSON, lacks a
    key, has a value whose meaning is not certain, repeats an id, or refers to an image or a category that it does not list.
    """
    content = _load(path)
    repairs: Counter[str] = Counter()
    categories = _unique(content["categories"], "categories", "category id", path, repairs)
    names = {key: json_values.text(entry, "name", f"{path}: categories[{n}]") for key, (n, entry) in categories.items()}
    order = sorted(categories, key=lambda key: (isinstance(key, str), key))
    category_ids = _numbered(order)
    label_of = {key: label for label, key in enumerate(order)}

    images = _unique(content["images"], "images", "id", path, repairs)
    position_of = {key: position for position, key in enumerate(images)}
    file_names, sizes = [], []
    for number, entry in images.values():
        where = f"{path}: images[{number}] (id {shown(entry['id'])})"
        file_names.append(json_values.text(entry, "file_name", where))
        height, width = json_values.side(entry, "height", where), json_values.side(entry, "width", where)
        sizes.append(None if height is None or width is None else (height, width))
    if unknown := sizes.count(None):
        repairs["image sizes taken from the pictures"] = unknown

    count = len(content["annotations"])
    positions, labels = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    boxes, areas = np.zeros((count, 4)), np.full(count, np.nan)
    crowd = np.zeros(count, dtype=np.bool_)
    ids: list[Identity | None] = []
    seen: set[Identity] = set()
    for row, entry in enumerate(content["annotations"]):
        where = f"{path}: annotations[{row}]"
        annotation_id = None
        if entry.get("id") is not None:
            annotation_id = json_values.identity(entry, "id", where, repairs)
            where = f"{where} (id {shown(annotation_id)})"
            if annotation_id in seen:
                raise ValueError(f"{where}: this id was used before; give every annotation its own id")
            seen.add(annotation_id)
        ids.append(annotation_id)
        image_id = json_values.identity(entry, "image_id", where, repairs)
        category_id = json_values.identity(entry, "category_id", where, repairs)
        if image_id not in position_of:
            raise ValueError(
                f"{where}: image_id {shown(image_id)} is not in 'images'; add the image or remove the annotation"
            )
        if category_id not in label_of:
            raise ValueError(
                f"{where}: category_id {shown(category_id)} is not in 'categories' (ids {shown(order[:20])}); "
                "add the category or correct the annotation"
            )
        positions[row], labels[row] = position_of[image_id], label_of[category_id]
        boxes[row] = json_values.box(entry, where, repairs)
        crowd[row] = json_values.crowd(entry, where)
        area = json_values.number(entry.get("area"))
        areas[row] = area if area is not None and math.isfinite(area) and area > 0 else np.nan
    if missing := ids.count(None):
        repairs["annotations without an id numbered"] = missing
    return CocoFile(
        image_ids=_numbered(list(images)),
        own_image_ids=[entry["id"] for _, entry in images.values()],
        file_names=file_names,
        sizes=sizes,
        categories=tuple(Category(number, names[key]) for number, key in zip(category_ids, order, strict=True)),
        own_category_ids={number: categories[key][1]["id"] for number, key in zip(category_ids, order, strict=True)},
        positions=positions,
        boxes=boxes,
        labels=labels,
        crowd=crowd,
        areas=areas,
        annotation_ids=np.array(_numbered(ids), dtype=np.int64),
        repairs=repairs,
    )


def _load(path: Path) -> dict[str, list[Entry]]:
    if not path.is_file():
        raise FileNotFoundError(f"the annotation file {path} does not exist; expected a JSON file in COCO's format")
    content = json_values.load_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected an object with 'images', 'annotations' and 'categories', got a {type(content).__name__}"
            "; is it a file of detection results?"
        )
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise ValueError(
                f"{path}: the key {key!r} is missing (the file has {shown(sorted(content))}); export in COCO's format"
            )
        if not isinstance(content[key], list):
            raise ValueError(f"{path}: {key!r} must be a list, got a {type(content[key]).__name__}")
        for number, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: {key}[{number}] must be an object, got {shown(entry)}")
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f"{path}: {key!r} is empty; there is nothing to train on or to evaluate")
    return content


def _unique(
    entries: Sequence[Entry], table: str, name: str, path: Path, repairs: Counter[str]
) -> Mapping[Identity, tuple[int, Entry]]:
    """Each id with its entry and the entry's number."""
    known: dict[Identity, tuple[int, Entry]] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: {table}[{number}]"
        key = json_values.identity(entry, "id", where, repairs)
        if key in known:
            raise ValueError(
                f"{where}: {name} {shown(key)} was used before, by {table}[{known[key][0]}]; give every entry its own id"
            )
        known[key] = number, entry
    return known


def _numbered(ids: Sequence[Identity | None]) -> list[int]:
    """`ids` if all are whole numbers of 64 bits, a missing one after the largest; otherwise 1, 2, 3 …"""
    whole = [key for key in ids if isinstance(key, int) and abs(key) <= _LARGEST_ID]
    missing = ids.count(None)
    if len(whole) + missing < len(ids) or max(whole, default=0) > _LARGEST_ID - missing:
        return list(range(1, len(ids) + 1))
    following = iter(range(max(whole, default=0) + 1, max(whole, default=0) + 1 + missing))
    return [key if isinstance(key, int) else next(following) for key in ids]
