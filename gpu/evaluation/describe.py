"""What is in data, in words and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from smca.datasets import Category
from smca.datasets.batch import FloatArray, IntArray
from smca.datasets.settings import shortened
from smca.datasets.table import AnnotationTable
from smca.gpu.config import ModelConfig
from smca.gpu.evaluation.fit import Resize

_CLASSES_SHOWN = 20


def sizes_in_words(table: AnnotationTable) -> str:
    """The sizes of the images, and how many objects they have."""
    sizes, counts = np.unique(table.sizes, axis=0, return_counts=True)
    (height, width), share = sizes[counts.argmax()].tolist(), counts.max() / counts.sum()
    low, high = sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()
    if len(sizes) == 1:
        told = f"all {width}×{height} pixels"
    else:
        told = f"{low[1]} to {high[1]} pixels wide, {low[0]} to {high[0]} high, {share:.0%} of them {width}×{height}"
    objects = table.objects_per_image
    return f"{told} · {objects.mean():.1f} objects in an image, {objects.max()} at most"


def class_table(tables: Mapping[str, AnnotationTable], categories: Sequence[Category], model: ModelConfig) -> str:
    """Objects and images of each class in each split, and how large they are for the network."""
    columns = [[*_counts(table, len(categories))] for table in tables.values()]
    train = tables["train"]
    sides, labels = Resize.of(model).sides(train), train.labels[train.objects]
    order = np.argsort(-columns[0][0], kind="stable")
    rows = [
        ["class", *(f"{split}: {what}" for split in tables for what in ("objects", "images")), "size after the resize"]
    ]
    for label in order[:_CLASSES_SHOWN].tolist():
        counts = [f"{column[label]:,}" for pair in columns for column in pair]
        rows.append(
            [shortened(categories[label].name, 30), *counts, _spread(sides[labels == label], model.decoder_strides[0])]
        )
    if len(categories) > 1:
        totals = [
            f"{n:,}" for pair, t in zip(columns, tables.values(), strict=True) for n in (pair[0].sum(), len(t.sizes))
        ]
        rows.append(["all", *totals, _spread(sides, model.decoder_strides[0])])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if (more := len(categories) - _CLASSES_SHOWN) > 0:
        lines.insert(-1, f"… and {more:,} less frequent ones")
    return "\n".join([*lines, "(size: square root of the area; 5%, 50% and 95% of the training objects are smaller)"])


def _counts(table: AnnotationTable, classes: int) -> tuple[IntArray, IntArray]:
    """[classes] objects, and images that have any."""
    pairs = np.unique(table.images[table.objects] * classes + table.labels[table.objects])
    return table.objects_per_class(classes), np.bincount(pairs % classes, minlength=classes)


def _spread(sides: FloatArray, stride: int) -> str:
    """The size of most objects, in pixels and in cells."""
    if not len(sides):
        return "–"
    low, middle, high = np.quantile(sides, [0.05, 0.5, 0.95])
    return f"{low:.0f} … {middle:.0f} … {high:.0f} px = {low / stride:.1f} … {middle / stride:.1f} … {high / stride:.1f} cells"


def settings_in_words(table: AnnotationTable, preset: str, model: ModelConfig) -> str:
    """What the data are held against."""
    under = np.mean(Resize.of(model).sides(table) < model.decoder_strides[0]) if len(table.objects) else 0.0
    return (
        f"settings of {preset}: {model.num_queries} queries for {table.objects_per_image.max()} objects at most in an image · "
        f"images resized to {model.image_short_side} pixels on the shorter side, {model.image_max_size} at most · cells of "
        f"{', '.join(map(str, model.decoder_strides))} pixels, {under:.1%} of the objects smaller than the finest"
    )
