"""Reading a COCO annotation file: what it says, before it is held against the pictures.

    {"images":      [{"id", "file_name", "width", "height"}, …],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"?, "area"?}, …],
     "categories":  [{"id", "name"}, …]}

It is read entry by entry into flat arrays, without segmentations: an entry is forgotten as soon as its numbers are taken.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smca.datasets import json_values
from smca.datasets.batch import BoolArray, Category, FloatArray, IntArray
from smca.datasets.json_stream import entries_of
from smca.datasets.json_values import Entry, Identity
from smca.datasets.settings import shown

_LARGEST_ID = 2**63 - 1
_NUMBERS = frozenset({int, float})


@dataclass(frozen=True, eq=False)
class CocoFile:
    """An annotation file. A row is an annotation; rows stand in the file's order."""

    image_ids: IntArray
    """[images] the file's own, if all are whole numbers of 64 bits; otherwise 1, 2, 3 …"""
    own_image_ids: Sequence[Any]
    """As the file writes them."""
    file_names: Sequence[str]
    """As written."""
    sizes: IntArray
    """[images, 2] height and width in pixels; 0, 0 where the file has none."""
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
    order: IntArray
    """[rows] the rows image by image, those of one image in the file's order."""
    starts: IntArray
    """[images + 1] where each image's rows begin in `order`."""
    repairs: Counter[str]
    """What was written otherwise than COCO's format has it, and how often."""

    def rows_of(self, image: int) -> IntArray:
        """The rows of an image."""
        return self.order[self.starts[image] : self.starts[image + 1]]


def read_coco_file(path: Path, progress: Callable[[int], None] | None = None) -> CocoFile:
    """Read the annotation file at `path`.

    progress: is told now and then how many of its bytes have been read.

    Raises FileNotFoundError if it is missing; ValueError, naming the file and the entry, if it is not JSON, lacks a
    key, has a value whose meaning is not certain, repeats an id, or refers to an image or a category that it does not list.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the annotation file {path} does not exist; expected a JSON file in COCO's format")
    repairs: Counter[str] = Counter()
    images, categories, rows = _Images(path, repairs), _Categories(path, repairs), _Rows(path, repairs)
    tables: dict[str, Callable[[int, Entry], None]]
    tables = {"images": images.add, "annotations": rows.add, "categories": categories.add}
    for table, number, entry in entries_of(path, tables, progress):
        tables[table](number, entry)
    for name, known in (("images", images.ids), ("categories", categories.ids)):
        if not known:
            raise ValueError(f"{path}: {name!r} is empty; there is nothing to train on or to evaluate")
    sizes = np.array(images.sizes, dtype=np.int64).reshape(-1, 2)
    if unknown := int((sizes == 0).all(axis=1).sum()):
        repairs["image sizes taken from the pictures"] = unknown
    order = sorted(categories.ids, key=lambda key: (isinstance(key, str), key))
    category_ids = _numbered(order)
    positions = rows.resolved("image_id", rows.images, list(images.ids))
    labels = rows.resolved("category_id", rows.categories, order)
    return CocoFile(
        image_ids=np.array(_numbered(list(images.ids)), dtype=np.int64),
        own_image_ids=images.own_ids,
        file_names=images.file_names,
        sizes=sizes,
        categories=tuple(
            Category(number, categories.names[key]) for number, key in zip(category_ids, order, strict=True)
        ),
        own_category_ids={number: categories.own_ids[key] for number, key in zip(category_ids, order, strict=True)},
        positions=positions,
        boxes=np.array(rows.boxes, dtype=np.float64).reshape(-1, 4),
        labels=labels,
        crowd=np.array(rows.crowd, dtype=np.bool_),
        areas=np.array(rows.areas, dtype=np.float64),
        annotation_ids=rows.ids(),
        order=np.argsort(positions, kind="stable"),
        starts=np.concatenate([[0], np.cumsum(np.bincount(positions, minlength=len(images.ids)))]),
        repairs=repairs,
    )


class _Images:
    """The table "images" of a file, entry by entry."""

    def __init__(self, path: Path, repairs: Counter[str]) -> None:
        self._path, self._repairs = path, repairs
        self.ids: dict[Identity, int] = {}
        self.own_ids: list[Any] = []
        self.file_names: list[str] = []
        self.sizes = array("q")

    def add(self, number: int, entry: Entry) -> None:
        """Take an entry."""
        where = f"{self._path}: images[{number}]"
        _take_id(self.ids, number, entry, "images", "id", where, self._repairs)
        where = f"{where} (id {shown(entry['id'])})"
        self.own_ids.append(entry["id"])
        self.file_names.append(json_values.text(entry, "file_name", where))
        height, width = json_values.side(entry, "height", where), json_values.side(entry, "width", where)
        self.sizes.extend((0, 0) if height is None or width is None else (height, width))


class _Categories:
    """The table "categories" of a file, entry by entry."""

    def __init__(self, path: Path, repairs: Counter[str]) -> None:
        self._path, self._repairs = path, repairs
        self.ids: dict[Identity, int] = {}
        self.own_ids: dict[Identity, Any] = {}
        self.names: dict[Identity, str] = {}

    def add(self, number: int, entry: Entry) -> None:
        """Take an entry."""
        where = f"{self._path}: categories[{number}]"
        key = _take_id(self.ids, number, entry, "categories", "category id", where, self._repairs)
        self.own_ids[key], self.names[key] = entry["id"], json_values.text(entry, "name", where)


class _Rows:
    """The table "annotations" of a file, entry by entry: millions of them, so what is written as it should be is taken at once."""

    def __init__(self, path: Path, repairs: Counter[str]) -> None:
        self._path, self._repairs = path, repairs
        self.images: tuple[dict[Identity, int], array[int]] = {}, array("q")
        self.categories: tuple[dict[Identity, int], array[int]] = {}, array("q")
        """Ids in the order in which they came, and that place for every row."""
        self.boxes, self.areas, self.crowd = array("d"), array("d"), bytearray()
        self._whole_ids = array("q")
        self._other_ids: dict[int, Identity | None] = {}
        """Of rows whose id is missing or no whole number of 64 bits, which have 0 in `_whole_ids`."""

    def add(self, number: int, entry: Entry) -> None:
        """Take an entry."""
        plain = _plain(entry)
        annotation_id, image_id, category_id, box, area, crowd = plain or self._careful(number, entry)
        try:
            self._whole_ids.append(annotation_id)  # type: ignore[arg-type]
        except (TypeError, OverflowError):  # it is none
            self._whole_ids.append(0)
            self._other_ids[number] = annotation_id
        known, places = self.images
        places.append(known.setdefault(image_id, len(known)))
        known, places = self.categories
        places.append(known.setdefault(category_id, len(known)))
        self.boxes.extend(box)
        self.areas.append(area)
        self.crowd.append(crowd)

    def _careful(self, number: int, entry: Entry) -> _Row:
        where = self._where(number)
        annotation_id = None
        if entry.get("id") is not None:
            annotation_id = json_values.identity(entry, "id", where, self._repairs)
            where = f"{where} (id {shown(annotation_id)})"
        image_id = json_values.identity(entry, "image_id", where, self._repairs)
        category_id = json_values.identity(entry, "category_id", where, self._repairs)
        box = json_values.box(entry, where, self._repairs)
        crowd = json_values.crowd(entry, where)
        area = json_values.number(entry.get("area"))
        known = area is not None and math.isfinite(area) and area > 0
        return annotation_id, image_id, category_id, box, area if area is not None and known else math.nan, crowd

    def _where(self, number: int) -> str:
        return f"{self._path}: annotations[{number}]"

    def _named(self, number: int) -> str:
        annotation_id = self._other_ids.get(number, self._whole_ids[number])
        return self._where(number) + ("" if annotation_id is None else f" (id {shown(annotation_id)})")

    def resolved(self, key: str, taken: tuple[dict[Identity, int], array[int]], order: Sequence[Identity]) -> IntArray:
        """[rows] the place in `order` of the id under `key`.

        Raises ValueError for one that is not in `order`.
        """
        known, places = taken
        place_in_order = {identity: place for place, identity in enumerate(order)}
        lookup = np.array([place_in_order.get(identity, -1) for identity in known], dtype=np.int64)
        found = lookup[np.array(places, dtype=np.int64)]
        if (found < 0).any():
            number = int(np.argmax(found < 0))
            where, identity = self._named(number), shown(list(known)[places[number]])
            if key == "image_id":
                raise ValueError(
                    f"{where}: image_id {identity} is not in 'images'; add the image or remove the annotation"
                )
            raise ValueError(
                f"{where}: category_id {identity} is not in 'categories' (ids {shown(order[:20])}); "
                "add the category or correct the annotation"
            )
        return found

    def ids(self) -> IntArray:
        """[rows] the annotations' ids, numbered where the file has none.

        Raises ValueError for one that is used twice.
        """
        whole = np.array(self._whole_ids, dtype=np.int64)
        others = np.fromiter(self._other_ids, dtype=np.int64, count=len(self._other_ids))
        is_whole = np.ones(len(whole), dtype=np.bool_)
        is_whole[others] = False
        numbers = np.flatnonzero(is_whole)
        sorted_numbers = numbers[np.argsort(whole[numbers], kind="stable")]
        again = sorted_numbers[1:][np.diff(whole[sorted_numbers]) == 0].tolist()
        seen: set[Identity] = set()
        for number, identity in self._other_ids.items():
            if identity in seen:
                again.append(number)
            if identity is not None:
                seen.add(identity)
        if again:
            raise ValueError(f"{self._named(min(again))}: this id was used before; give every annotation its own id")
        if not self._other_ids:
            return whole
        if missing := list(self._other_ids.values()).count(None):
            self._repairs["annotations without an id numbered"] = missing
        ids: list[Identity | None] = whole.tolist()
        for number, identity in self._other_ids.items():
            ids[number] = identity
        return np.array(_numbered(ids), dtype=np.int64)


_Row = tuple[Identity | None, Identity, Identity, Sequence[float], float, bool]
"""Id of the annotation, of its image and its category, box, area (NaN where there is none), iscrowd."""


def _plain(entry: Entry) -> _Row | None:
    """The row of an entry in which everything is of the type that COCO's format has; None for any other."""
    try:
        x, y, w, h = entry["bbox"]
        annotation_id, image_id, category_id = entry["id"], entry["image_id"], entry["category_id"]
        area, crowd = entry.get("area"), entry.get("iscrowd", 0)
        if (
            type(x) in _NUMBERS
            and type(y) in _NUMBERS
            and type(w) in _NUMBERS
            and type(h) in _NUMBERS
            and type(annotation_id) is int
            and type(image_id) is int
            and type(category_id) is int
            and type(crowd) is int
            and 0 <= crowd <= 1
            and (area is None or type(area) in _NUMBERS)
        ):
            area = float(area) if area is not None and 0 < area < math.inf else math.nan
            return annotation_id, image_id, category_id, (float(x), float(y), float(w), float(h)), area, crowd == 1
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    return None


def _take_id(
    known: dict[Identity, int],
    number: int,
    entry: Entry,
    table: str,
    name: str,
    where: str,
    repairs: Counter[str],
) -> Identity:
    """The id of an entry, which none before it may have."""
    key = json_values.identity(entry, "id", where, repairs)
    if key in known:
        raise ValueError(
            f"{where}: {name} {shown(key)} was used before, by {table}[{known[key]}]; give every entry its own id"
        )
    known[key] = number
    return key


def _numbered(ids: Sequence[Identity | None]) -> list[int]:
    """`ids` if all are whole numbers of 64 bits, a missing one after the largest; otherwise 1, 2, 3 …"""
    whole = [key for key in ids if isinstance(key, int) and abs(key) <= _LARGEST_ID]
    missing = ids.count(None)
    if len(whole) + missing < len(ids) or max(whole, default=0) > _LARGEST_ID - missing:
        return list(range(1, len(ids) + 1))
    following = iter(range(max(whole, default=0) + 1, max(whole, default=0) + 1 + missing))
    return [key if isinstance(key, int) else next(following) for key in ids]
