"""The picture of a data set: what its boxes are like, and what training sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from smca.datasets import Category, Sample
from smca.datasets.batch import FloatArray
from smca.datasets.settings import shortened
from smca.datasets.table import AnnotationTable
from smca.gpu.config import ModelConfig
from smca.gpu.evaluation.fit import Resize
from smca.gpu.pictures.drawing import contact_sheet, draw_detections
from smca.gpu.pictures.fonts import figure_families, name_with_font

_WIDTH, _DPI = 2400, 120
_CLASSES = 20
"""The most frequent, of more."""
_COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}
_SIZES = 100
"""Of images: the most frequent ones are drawn."""
_COLUMNS = 4
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
"""Numbers as people write them."""


def draw_data(
    tables: Mapping[str, AnnotationTable],
    categories: Sequence[Category],
    model: ModelConfig,
    samples: Sequence[Sample],
    path: Path,
) -> None:
    """Write one picture: histograms of all splits, and below them augmented training images with their boxes.

    Args:
        tables: split → its annotations.
        categories: the classes.
        model: whose queries, stride and image size are drawn beside them.
        samples: augmented images; at least one.
        path: picture to write.
    """
    below = f"The first {len(samples)} training images as the network sees them: resized, augmented, with the boxes to be found"
    histograms = _histograms(tables, categories, model, below)
    names = [category.name for category in categories]
    drawn = [draw_detections(s.image, s.boxes_xyxy, s.labels, None, names) for s in samples]
    sheet = contact_sheet(drawn, _COLUMNS)
    sheet = sheet.resize((_WIDTH, round(sheet.height * _WIDTH / sheet.width)), Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (_WIDTH, histograms.height + sheet.height))
    whole.paste(histograms, (0, 0))
    whole.paste(sheet, (0, histograms.height))
    whole.save(path)


def _histograms(
    tables: Mapping[str, AnnotationTable], categories: Sequence[Category], model: ModelConfig, below: str
) -> Image.Image:
    """All of them, with a line below as a heading of what follows."""
    figure = Figure(figsize=(_WIDTH / _DPI, 12), dpi=_DPI, layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_classes(axes[0, 0], tables, categories)
    _draw_counts(axes[0, 1], tables, model.num_queries)
    _draw_sides(axes[0, 2], tables, model)
    _draw_image_sizes(axes[1, 0], tables, model)
    _draw_shapes(axes[1, 1], tables)
    _draw_places(axes[1, 2], tables)
    counts = [f"{split}: {len(t.sizes):,} images, {len(t.objects):,} objects" for split, t in tables.items()]
    figure.suptitle(" · ".join(counts), fontsize=18)
    figure.supxlabel(below, fontsize=18)
    canvas: Any = FigureCanvasAgg(figure)  # untyped
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_classes(axes: Axes, tables: Mapping[str, AnnotationTable], categories: Sequence[Category]) -> None:
    counts = {split: table.objects_per_class(len(categories)) for split, table in tables.items()}
    order = np.argsort(-counts["train"], kind="stable")[:_CLASSES]
    height = 0.8 / len(counts)
    for number, (split, of_class) in enumerate(counts.items()):
        places = np.arange(len(order)) + number * height
        bars = axes.barh(places, of_class[order], height, color=_COLORS[split], label=split)
        axes.bar_label(bars, [f"{count:,}" for count in of_class[order].tolist()], padding=3)
    names = [shortened(name_with_font(categories[label].name, f"class {label}"), 20) for label in order.tolist()]
    axes.set_yticks(
        np.arange(len(order)) + 0.4 - height / 2, names, fontfamily=figure_families(names), parse_math=False
    )
    axes.invert_yaxis()
    largest, least = max(c.max() for c in counts.values()), min(c[order].min() for c in counts.values())
    logarithmic = bool(largest > 20 * max(1, least))
    if logarithmic:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(_PLAIN)
    axes.set_xlim(0, largest * (3 if logarithmic else 1.15))
    more = f", the {_CLASSES} most frequent of {len(categories)}" if len(categories) > _CLASSES else ""
    _describe(axes, f"Objects of each class{more}", f"objects{' (logarithmic)' * logarithmic}")
    axes.legend()


def _draw_counts(axes: Axes, tables: Mapping[str, AnnotationTable], queries: int) -> None:
    most = max(int(table.objects_per_image.max()) for table in tables.values())
    step = -(-(most + 1) // 40)
    edges = np.arange(0, most + 1 + step, step) - 0.5
    for split, table in tables.items():
        _step(axes, table.objects_per_image, edges, split)
    if queries <= 4 * most:
        axes.axvline(queries, color="black", linestyle="--", label=f"{queries} queries")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _describe(axes, f"Objects in an image: {most} at most", "objects", "share of the images")
    axes.legend()


def _draw_sides(axes: Axes, tables: Mapping[str, AnnotationTable], model: ModelConfig) -> None:
    resize, stride = Resize.of(model), model.decoder_strides[0]
    sides = {split: resize.sides(table) for split, table in tables.items()}
    every = np.concatenate([*sides.values(), [stride / 2, 2 * stride]])
    edges = np.geomspace(max(every.min(), 0.5), every.max() * 1.01, 50)
    for split, values in sides.items():
        _step(axes, values, edges, split)
    axes.axvspan(edges[0], max(edges[0], stride), color="tab:red", alpha=0.12)
    for level in sorted(set(model.decoder_strides)):
        axes.axvline(level, color="tab:red", linestyle="--")
    under = float(np.mean(sides["train"] < stride)) if len(sides["train"]) else 0.0
    _log(axes)
    cells = axes.secondary_xaxis(
        "top", functions=(lambda px: np.asarray(px) / stride, lambda cell: np.asarray(cell) * stride)
    )
    cells.set_xticks(2.0 ** np.arange(-3, 12))
    cells.xaxis.set_major_formatter(_PLAIN)
    cells.set_xlabel(f"the same in cells of {stride}×{stride} pixels", fontsize=12)
    title = f"Size after the resize: {under:.1%} under a cell (red)"
    _describe(axes, title, "√(width · height) in pixels", "share of the objects")


def _draw_image_sizes(axes: Axes, tables: Mapping[str, AnnotationTable], model: ModelConfig) -> None:
    for split, table in tables.items():
        sizes, counts = np.unique(table.sizes, axis=0, return_counts=True)
        frequent = np.argsort(-counts, kind="stable")[:_SIZES]
        for height, width in sizes[frequent].tolist():
            axes.add_patch(
                Rectangle((0, 0), width, height, fill=False, edgecolor=_COLORS[split], alpha=0.5, linewidth=2)
            )
    every = np.concatenate([table.sizes for table in tables.values()])
    typical = np.median(every, axis=0)
    scale = min(model.image_short_side / typical.min(), model.image_max_size / typical.max())
    height, width = (typical * scale).tolist()
    axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor="black", linestyle="--", linewidth=2))
    high, wide = np.maximum(every.max(axis=0), (height, width)) * 1.05
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    axes.set_aspect("equal")
    _describe(axes, "Size of the images; dashed: as the network sees them", "width in pixels", "height in pixels")


def _draw_shapes(axes: Axes, tables: Mapping[str, AnnotationTable]) -> None:
    edges = np.geomspace(1 / 8, 8, 49)
    for split, table in tables.items():
        sides = _sides(table)
        _step(axes, np.clip(sides[:, 0] / sides[:, 1], edges[0], edges[-1]), edges, split)
    _log(axes)
    axes.axvline(1, color="grey", linewidth=0.8)
    _describe(axes, "Shape of the boxes: left tall, right wide", "width / height", "share of the objects")


def _draw_places(axes: Axes, tables: Mapping[str, AnnotationTable]) -> None:
    table = tables["train"]
    boxes, sizes = table.checked.clipped_xyxy[table.objects], table.sizes[table.images[table.objects], ::-1]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes
    axes.hist2d(centers[:, 0], centers[:, 1], bins=24, range=((0, 1), (0, 1)), cmap="Blues")
    axes.invert_yaxis()
    axes.set_aspect("equal")
    _describe(axes, "Where objects lie in training images (darker: more)", "x of the centre / width", "y / height")


def _sides(table: AnnotationTable) -> FloatArray:
    boxes = table.checked.clipped_xyxy[table.objects]
    return boxes[:, 2:] - boxes[:, :2]


def _step(axes: Axes, values: NDArray[Any], edges: NDArray[Any], split: str) -> None:
    """A histogram of shares, so that splits of different size can be compared."""
    shares = np.histogram(values, edges)[0] / max(1, len(values))
    axes.stairs(shares, edges, color=_COLORS[split], label=split, linewidth=2)
    axes.stairs(shares, edges, color=_COLORS[split], alpha=0.15, fill=True)
    axes.margins(y=0.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _log(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _describe(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    axes.set_title(title, fontsize=14, fontweight="bold")
    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(y_label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
