"""What is wrong with annotations, or looks so: found in arrays, told in sentences, with the entries that it is about.

Two boxes are the same here if their intersection is more than `SAME_IOU` of their union. Which pairs are is found without comparing
all: with boxes sorted by image and left edge, the left edge of the later one of such a pair lies at most (1/SAME_IOU − 1) of the
earlier one's width behind its own; so each row is held against the next one, the one after it, and so on, while that holds.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from smca.datasets.batch import BoolArray, Category, FloatArray, IntArray
from smca.datasets.settings import shortened
from smca.datasets.table import AnnotationTable

SAME_IOU = 0.9
_NEXT = 1000
"""With so many neighbours a box is compared at most: beyond that, all are copies of each other."""
_LEAST_SIDE, _MOST_PIXELS, _LONGEST = 32, 25_000_000, 4.0
"""Of an image: a shorter side that is tiny, a number of pixels that is huge, and times as long as wide that is extreme."""
_LONGEST_BOX = 20.0
_MUCH = 0.01
"""Of all boxes: more than so many are no slips but a habit, and cost accuracy."""
_RARE = 10
_NAMES_SHOWN = 5

Level = Literal["error", "warning", "note"]
"""error: training cannot start, or would end; warning: costs accuracy, or makes the numbers wrong; note: worth a look."""
Entry = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Finding:
    """Something about data that their owner should know."""

    kind: str
    """For programs, such as "near-duplicate-boxes"."""
    level: Level
    split: str
    """"train", "val" or "test"; two of them where it lies between them."""
    text: str
    """One sentence."""
    entries: Callable[[], Iterator[Entry]] = lambda: iter(())
    """The images and annotations that it is about, as plain values."""


def image_entry(table: AnnotationTable, image: int) -> Entry:
    """What names an image."""
    return {"file": table.file_names[image], "image_id": int(table.image_ids[image])}


def row_entry(table: AnnotationTable, row: int) -> Entry:
    """What names an annotation."""
    bbox = [float(value) for value in table.boxes_xywh[row].tolist()]
    # JSON has no NaN.
    shown = [value if np.isfinite(value) else str(value) for value in bbox]
    return {**image_entry(table, int(table.images[row])), "annotation_id": int(table.ids[row]), "bbox": shown}


def find_in_split(split: str, table: AnnotationTable, categories: Sequence[Category]) -> list[Finding]:
    """What is to be said of a split by its annotations alone."""
    return [
        *_bad_boxes(split, table),
        *_same_boxes(split, table, categories),
        *_odd_images(split, table),
        *_empty_images(split, table),
    ]


def find_between(
    tables: dict[str, AnnotationTable], categories: Sequence[Category], *, held_out: str = "val"
) -> list[Finding]:
    """What is to be said of the classes, by the training images and, if there are any, the held-out ones."""
    found = _alike_names(categories)
    counts = {split: table.objects_per_class(len(categories)) for split, table in tables.items()}
    train = counts["train"]
    if not train.any():
        text = "no box to train on: a detector that never sees an object learns to find none"
        return [*found, Finding("no-boxes", "error", "train", text)]
    if held_out in counts:
        val = counts[held_out]
        if not val.any():
            text = "no box in the held-out images: there is nothing to measure an AP on"
            found.append(Finding("no-boxes", "warning", held_out, text))
        unknown, unmeasured = (train == 0) & (val > 0), (train > 0) & (val == 0) & val.any()
        both = f"train, {held_out}"
        what = f"no box to train on, and {val[unknown].sum():,} held out: never found"
        found += _of_classes("class-not-trained", "warning", both, unknown, categories, what)
        what = "no held-out box: the AP says nothing of it"
        found += _of_classes("class-not-measured", "note", both, unmeasured, categories, what)
    found += _of_classes(
        "rare-class", "note", "train", (train > 0) & (train < _RARE), categories, f"fewer than {_RARE} boxes"
    )
    used = np.sum(list(counts.values()), axis=0) > 0
    found += _of_classes("unused-class", "note", ", ".join(counts), ~used, categories, "no box in any split")
    return found


def same_boxes(table: AnnotationTable) -> tuple[IntArray, IntArray, FloatArray]:
    """Pairs of rows that are the same box on one image: first [pairs], second [pairs], IoU [pairs]."""
    rows = table.objects
    boxes_xyxy = table.checked.clipped_xyxy[rows]
    order = np.lexsort((boxes_xyxy[:, 0], table.images[rows]))
    rows, boxes_xyxy = rows[order], boxes_xyxy[order]
    images, left = table.images[rows], boxes_xyxy[:, 0]
    reach = left + (boxes_xyxy[:, 2] - left) * (1 / SAME_IOU - 1)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    here = np.arange(len(rows))
    pairs: list[tuple[IntArray, IntArray, FloatArray]] = []
    for step in range(1, _NEXT):
        here = here[here + step < len(rows)]
        here = here[(images[here + step] == images[here]) & (left[here + step] <= reach[here])]
        if not len(here):
            break
        a, b = boxes_xyxy[here], boxes_xyxy[here + step]
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        common = sides.clip(0).prod(axis=1)
        iou = common / (areas[here] + areas[here + step] - common)
        same = iou > SAME_IOU
        pairs.append((rows[here[same]], rows[here[same] + step], iou[same]))
    if not pairs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    first, second, ious = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return first, second, ious


def _bad_boxes(split: str, table: AnnotationTable) -> Iterator[Finding]:
    checked = table.checked
    sides = table.boxes_xywh[:, 2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        long = np.maximum(sides[:, 0] / sides[:, 1], sides[:, 1] / sides[:, 0]) > _LONGEST_BOX
    long &= ~(checked.degenerate | checked.outside)
    for kind, which, what in (
        ("degenerate-boxes", checked.degenerate, "without area: not trained on"),
        ("boxes-outside", checked.outside, "wholly outside the image: not trained on"),
        ("clipped-boxes", checked.clipped, "reaching out of the image: cut at its border for training"),
        ("long-boxes", long, f"more than {_LONGEST_BOX:.0f} times as long as wide"),
    ):
        if count := int(np.count_nonzero(which)):
            level: Level = "warning" if count > _MUCH * len(table.labels) else "note"
            text = f"{count:,} box{'es' * (count > 1)} {what}"
            yield Finding(kind, level, split, text, _row_entries(table, np.flatnonzero(which)))


def _row_entries(table: AnnotationTable, rows: IntArray) -> Callable[[], Iterator[Entry]]:
    return lambda: (row_entry(table, row) for row in rows.tolist())


def _same_boxes(split: str, table: AnnotationTable, categories: Sequence[Category]) -> Iterator[Finding]:
    first, second, ious = same_boxes(table)
    alike = table.labels[first] == table.labels[second]
    for kind, which, what in (
        ("near-duplicate-boxes", alike, "of boxes of one class that are nearly the same: one object, annotated twice?"),
        ("boxes-of-two-classes", ~alike, "of nearly the same boxes of different classes: which of the two is right?"),
    ):
        pairs = np.flatnonzero(which)
        if len(pairs):
            level: Level = "warning" if len(pairs) > _MUCH * len(table.objects) else "note"
            text = f"{len(pairs):,} pair{'s' * (len(pairs) > 1)} {what}"
            yield Finding(
                kind, level, split, text, _pair_entries(table, categories, first[pairs], second[pairs], ious[pairs])
            )


def _pair_entries(
    table: AnnotationTable, categories: Sequence[Category], first: IntArray, second: IntArray, ious: FloatArray
) -> Callable[[], Iterator[Entry]]:
    def entries() -> Iterator[Entry]:
        for a, b, iou in zip(first.tolist(), second.tolist(), ious.tolist(), strict=True):
            classes = [categories[int(table.labels[row])].name for row in (a, b)]
            other = {"other_annotation_id": int(table.ids[b]), "classes": classes, "iou": round(iou, 3)}
            yield {**row_entry(table, a), **other}

    return entries


def _odd_images(split: str, table: AnnotationTable) -> Iterator[Finding]:
    short, long = table.sizes.min(axis=1), table.sizes.max(axis=1)
    huge = (
        f"of more than {_MOST_PIXELS // 10**6} million pixels, slow to read: cut into tiles, or shrunk once and for all"
    )
    checks: list[tuple[str, Level, BoolArray, str]] = [
        ("tiny-images", "warning", short < _LEAST_SIDE, f"of fewer than {_LEAST_SIDE} pixels in height or width"),
        ("huge-images", "note", short * long > _MOST_PIXELS, huge),
        ("long-images", "note", long > _LONGEST * short, f"more than {_LONGEST:.0f} times as long as wide"),
    ]
    for kind, level, which, what in checks:
        yield from of_images(kind, level, split, table, np.flatnonzero(which), what)


def _empty_images(split: str, table: AnnotationTable) -> Iterator[Finding]:
    images = np.flatnonzero(table.objects_per_image == 0)
    if 2 * len(images) > len(table.sizes) > len(images):
        what = f"without an object, of {len(table.sizes):,}: of use where there is nothing to find in practice, too"
        yield from of_images("empty-images", "note", split, table, images, what)


def of_images(
    kind: str, level: Level, split: str, table: AnnotationTable, images: IntArray, what: str
) -> Iterator[Finding]:
    """A finding about these images, if there are any. what: follows "3 images"."""
    if len(images):
        text = f"{len(images):,} image{'s' * (len(images) > 1)} {what}"
        yield Finding(kind, level, split, text, lambda: (image_entry(table, i) for i in images.tolist()))


def _of_classes(
    kind: str, level: Level, split: str, which: BoolArray, categories: Sequence[Category], what: str
) -> Iterator[Finding]:
    chosen = [categories[label] for label in np.flatnonzero(which).tolist()]
    if chosen:
        text = f"{named([c.name for c in chosen])} {'has' if len(chosen) == 1 else 'have'} {what}"
        entries = [{"category_id": c.id, "class": c.name} for c in chosen]
        yield Finding(kind, level, split, text, lambda: iter(entries))


def named(names: Sequence[str]) -> str:
    """The first few names, shortened."""
    listed = ", ".join(shortened(name, 40) for name in names[:_NAMES_SHOWN])
    return listed + (f" and {len(names) - _NAMES_SHOWN:,} more classes" if len(names) > _NAMES_SHOWN else "")


def _alike_names(categories: Sequence[Category]) -> list[Finding]:
    """Classes whose names differ in case, spaces and signs only."""
    groups: dict[str, list[Category]] = defaultdict(list)
    for category in categories:
        plain = unicodedata.normalize("NFKC", category.name).casefold()
        groups[re.sub(r"[\W_]+", "", plain) or plain].append(category)
    return [
        Finding(
            "class-named-twice",
            "warning",
            "train, val",
            f"the classes {' and '.join(repr(c.name) for c in same)} are probably one, and are learned as {len(same)}: give their "
            "annotations one category",
            lambda same=same: iter([{"category_id": c.id, "class": c.name} for c in same]),  # type: ignore[misc]
        )
        for same in groups.values()
        if len(same) > 1
    ]
