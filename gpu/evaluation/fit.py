"""Whether a model's settings suffice for the objects that are there, and the flags that would.

queries        one per object that can be found in an image: more than the most, by half or so
stride, size   an object should be a cell of the finest level across, after the resize
prior          the Gaussian is as wide as an object at the start, within a factor
pixels         are scaled as for the backbone's weights
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from smca.datasets import Augmentation, Category
from smca.datasets.batch import FloatArray
from smca.datasets.findings import Entry, Finding, image_entry, named
from smca.datasets.table import AnnotationTable
from smca.gpu.config import ModelConfig
from smca.gpu.model.efficientnet_lite import LITE0, PIXEL_MEAN, PIXEL_STD

_MUCH = 0.05
"""Of all objects: more of them under a cell cost accuracy that one sees."""
_OF_A_CLASS = 0.2
"""Of a class's objects, likewise."""
_ROUND = 32
"""Sides are advised in multiples of so many pixels."""
_FINEST = 4
"""The finest stride that backbones have."""
_LARGEST_FACTOR = 4.0
"""Larger images than by this factor are not advised: tiles are."""
_NARROW, _WIDE, _GOOD = 1 / 6, 1.5, 0.4
"""Width of the prior in sides of a typical object: beyond these it starts badly, and this is a good start."""


@dataclass(frozen=True)
class Resize:
    """What images are resized to, as ``Augmentation.evaluation`` does."""

    short_side: int
    max_size: int

    @classmethod
    def of(cls, model: ModelConfig) -> Resize:
        """That of evaluation and prediction."""
        return cls(model.image_short_side, model.image_max_size)

    def sides(self, table: AnnotationTable) -> FloatArray:
        """[objects] the geometric mean of width and height of the rows ``table.objects``, in pixels after the resize."""
        boxes_xyxy = table.checked.clipped_xyxy[table.objects]
        sizes = table.sizes.astype(np.float64)
        scale = np.minimum(self.short_side / sizes.min(axis=1), self.max_size / sizes.max(axis=1))
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
        sides: FloatArray = np.sqrt(areas) * scale[table.images[table.objects]]
        return sides

    def flags(self, factor: float, augmentation: Augmentation) -> str:
        """Options that make images larger by `factor`, in training and at evaluation."""

        def scaled(side: int) -> int:
            return math.ceil(side * factor / _ROUND) * _ROUND

        flags = f"--model.image-short-side {scaled(self.short_side)} --model.image-max-size {scaled(self.max_size)}"
        if augmentation.short_sides:
            flags += f" --augmentation.short-sides {' '.join(str(scaled(side)) for side in augmentation.short_sides)}"
        if augmentation.max_size is not None:
            flags += f" --augmentation.max-size {scaled(augmentation.max_size)}"
        return flags


def find_in_settings(
    table: AnnotationTable, categories: Sequence[Category], model: ModelConfig, augmentation: Augmentation
) -> list[Finding]:
    """What the settings do not suffice for in these images, each with the flags to set."""
    if not len(table.objects):
        return []
    sides = Resize.of(model).sides(table)
    return [
        *_queries(table, model),
        *_cells(table, sides, categories, model, augmentation),
        *_prior(sides, model),
        *_other_sizes(model, augmentation),
        *_pixels(model),
    ]


def _queries(table: AnnotationTable, model: ModelConfig) -> Iterator[Finding]:
    counts, queries = table.objects_per_image, model.num_queries
    most, over = int(counts.max()), np.flatnonzero(counts > queries)

    def entries() -> Iterator[Entry]:
        for image in over[np.argsort(-counts[over], kind="stable")].tolist():
            yield {**image_entry(table, image), "objects": int(counts[image])}

    advice = f"set --model.num-queries {most * 3 // 2} or so"
    if len(over):
        text = (
            f"an image has {most} objects, but the model has {queries} queries, one for each object it can find: {advice} "
            f"({len(over):,} image{'s have' if len(over) > 1 else ' has'} more objects than queries)"
        )
        yield Finding("too-few-queries", "warning", "train", text, entries)
    elif most * 5 > queries * 4:
        text = f"an image has {most} objects, and the model {queries} queries, of which some find what others found: {advice}"
        yield Finding("few-queries", "note", "train", text)


def _cells(
    table: AnnotationTable,
    sides: FloatArray,
    categories: Sequence[Category],
    model: ModelConfig,
    augmentation: Augmentation,
) -> Iterator[Finding]:
    stride = model.decoder_strides[0]
    small = sides < stride
    share = float(small.mean())
    labels = table.labels[table.objects]
    totals = np.bincount(labels, minlength=len(categories))
    of_class = np.bincount(labels[small], minlength=len(categories)) / np.maximum(totals, 1)
    worst = [label for label in np.argsort(-of_class, kind="stable").tolist() if of_class[label] > _OF_A_CLASS]
    if share <= _MUCH and not worst:
        return
    rows = table.objects[small]

    def entries() -> Iterator[Entry]:
        for row, side in zip(rows.tolist(), sides[small].tolist(), strict=True):
            image = image_entry(table, int(table.images[row]))
            yield {**image, "annotation_id": int(table.ids[row]), "side_px": round(side, 2)}

    of_classes = f" ({named([f'{of_class[n]:.0%} of {categories[n].name}' for n in worst])})" if worst else ""
    # As many of all, and of each class, are to be a cell across as cost nothing that one sees.
    least = [np.quantile(sides, _MUCH), *(np.quantile(sides[labels == label], _OF_A_CLASS) for label in worst)]
    text = (
        f"{share:.1%} of the objects{of_classes} are less than a cell of {stride}×{stride} pixels across after the resize: "
        f"{_remedies(stride / max(float(min(least)), 1e-9), model, augmentation)}"
    )
    yield Finding("objects-under-a-cell", "warning", "train", text, entries)


def _remedies(factor: float, model: ModelConfig, augmentation: Augmentation) -> str:
    """What makes objects larger in cells, by a factor."""
    strides, options = model.strides, []
    finer = [strides[0] // each for each in (2, 4, 8) if each >= factor and strides[0] // each >= _FINEST]
    if finer:
        levels = [finer[0], *(strides if len(strides) > 1 else ())]
        cells = (strides[0] // finer[0]) ** 2
        options.append(f"--model.strides {' '.join(map(str, levels))} ({cells} times as many cells)")
    if factor <= _LARGEST_FACTOR:
        options.append(Resize.of(model).flags(factor, augmentation))
    return "; or ".join(options) or "cut the images into tiles, and train and predict on those"


def _prior(sides: FloatArray, model: ModelConfig) -> Iterator[Finding]:
    if model.prior_unit != "pixels" or model.cross_attention != "smca":
        return
    typical, sigmas = float(np.median(sides)), model.sigma_of_levels
    starts = " to ".join(f"{sigma:g}" for sigma in sorted({min(sigmas), max(sigmas)}))
    if max(sigmas) < _NARROW * typical or min(sigmas) > _WIDE * typical:
        text = (
            f"half of the objects are less than {typical:.0f} pixels across after the resize, and the prior starts with a standard "
            f"deviation of {starts}: set --model.prior-sigma-px {max(1, round(_GOOD * typical))} or so"
        )
        yield Finding("prior-width", "note", "train", text)


def _other_sizes(model: ModelConfig, augmentation: Augmentation) -> Iterator[Finding]:
    """Images that are trained on at quite another size than they are evaluated at."""
    trained = augmentation.short_sides
    if trained and not 0.75 * min(trained) <= model.image_short_side <= 1.34 * max(trained):
        text = (
            f"training images are resized to short sides of {', '.join(map(str, trained))}, held-out images to "
            f"{model.image_short_side}: --augmentation.short-sides and --model.image-short-side belong together"
        )
        yield Finding("resized-otherwise", "warning", "train, val", text)


def _pixels(model: ModelConfig) -> Iterator[Finding]:
    if model.backbone.weights != LITE0:
        return
    wanted = {"pixel-mean": PIXEL_MEAN, "pixel-std": PIXEL_STD}
    given = {"pixel-mean": model.pixel_mean, "pixel-std": model.pixel_std}
    wrong = [name for name, value in wanted.items() if not np.allclose(given[name], value, atol=1 / 255)]
    if wrong:
        flags = " ".join(f"--model.{name} {' '.join([f'{wanted[name]:.4f}'] * 3)}" for name in wrong)
        text = f"backbone weights {LITE0!r} have learned from pixels scaled in another way: set {flags}"
        yield Finding("pixels-scaled-otherwise", "warning", "train, val", text)
