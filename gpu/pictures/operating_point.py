"""The pictures of an operating report: precision-recall curves and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from smca.datasets.settings import shortened
from smca.gpu.evaluation.operating_point import CURVES_AT, IOU, OperatingPoint, OperatingReport
from smca.gpu.pictures.fonts import figure_families, name_with_font

_LABELLED = 12
"""Classes whose curves have a colour and a name: the most frequent ones."""
_MARKED = 6
"""Of more curves, the thresholds are in the legend alone: they would lie on each other."""
_IN_MATRIX = 100
"""Classes with rows of their own; of more, the most frequent ones, and all others together."""
_NAME_LENGTH = 24
_LARGEST_INCHES = 24.0


def draw_precision_recall(report: OperatingReport, path: Path) -> None:
    """One curve per class at each IoU; in the first panel, a dot where F1 is best, on the curves that have a name."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    panels = figure.subplots(1, len(CURVES_AT), sharey=True)
    frequent = [label for label in _by_frequency(report) if not np.isnan(report.precisions[IOU][label, 0])]
    labelled = sorted(frequent[:_LABELLED])
    lines: list[Line2D] = []
    for axes, iou in zip(panels, CURVES_AT, strict=True):
        for label in frequent[_LABELLED:]:
            axes.plot(*_until_zero(report.recalls, report.precisions[iou][label]), color="0.8", linewidth=0.8)
        drawn = [
            axes.plot(*_until_zero(report.recalls, report.precisions[iou][label]), color=_color(place), linewidth=1.8)[
                0
            ]
            for place, label in enumerate(labelled)
        ]
        lines = lines or drawn
        axes.set_title(f"IoU {iou:.2f}", fontsize=14, fontweight="bold")
        axes.set_xlabel("recall", fontsize=12)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("precision", fontsize=12)
    for place, label in enumerate(labelled):
        _mark_point(panels[0], report.points[label], _color(place), with_text=len(labelled) <= _MARKED)
    if labelled:
        _name_curves(panels[-1], report, labelled, lines)
    more = f"; grey: the other {len(frequent) - len(labelled)} classes" if len(frequent) > len(labelled) else ""
    title = f"Precision and recall; dots: the score of best F1{more}"
    figure.suptitle(title if frequent else "No curves: no class has objects", fontsize=14)
    figure.savefig(path, dpi=120)


def draw_confusion(report: OperatingReport, path: Path) -> None:
    """Counts, and as colour the share of their row: rows are true classes, columns what was detected."""
    counts, names = _confusion_of_most(report)
    sums = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(sums, 1)
    shares[-1, -1] = np.nan  # nothing, and not detected
    cells = len(counts)
    side = min(_LARGEST_INCHES, max(5.0, 2.5 + 0.55 * cells))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font_size = min(12.0, 28 * side / cells)  # half of a cell, of which axes and names leave 56 points per inch
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        text = str(counts[row, column])
        size = min(font_size, 85 * side / cells / len(text))
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    families = figure_families(names)
    style: dict[str, Any] = {"fontsize": font_size, "fontfamily": families, "parse_math": False}
    axes.set_xticks(range(cells), [*names, "missed"], rotation=90, **style)
    axes.set_yticks(range(cells), [*names, "background"], **style)
    # Lines that set nothing (background, missed) apart from the classes.
    axes.axhline(cells - 1.5, color="black", linewidth=1)
    axes.axvline(cells - 1.5, color="black", linewidth=1)
    axes.set_xlabel("detected", fontsize=12)
    axes.set_ylabel("true", fontsize=12)
    axes.set_title(f"Confusion at the scores of best F1\n(objects; IoU {IOU:.2f})", fontsize=13)
    figure.colorbar(image, ax=axes, shrink=0.6, fraction=0.05, pad=0.02, label="share of the row")
    figure.savefig(path, dpi=120)


def _by_frequency(report: OperatingReport) -> list[int]:
    """Labels, of the most frequent class first."""
    order: list[int] = np.argsort(-report.confusion[:-1].sum(axis=1), kind="stable").tolist()
    return order


def _confusion_of_most(report: OperatingReport) -> tuple[NDArray[np.int64], list[str]]:
    """The matrix and the names of its classes; of too many classes, the least frequent ones in one row and column."""
    names, counts = _names(report), report.confusion
    if len(names) <= _IN_MATRIX:
        return counts, names
    order = _by_frequency(report)
    kept, rest = sorted(order[:_IN_MATRIX]), order[_IN_MATRIX:]
    groups = [*([label] for label in kept), rest, [len(names)]]
    joined = np.array([[counts[np.ix_(rows, columns)].sum() for columns in groups] for rows in groups])
    return joined, [*(names[label] for label in kept), f"{len(rest)} others"]


def _names(report: OperatingReport) -> list[str]:
    return [shortened(name_with_font(name, f"class {label}"), _NAME_LENGTH) for label, name in enumerate(report.names)]


def _until_zero(recalls: NDArray[Any], precision: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A curve up to the last recall that is reached, from where it falls to 0."""
    end = int(np.count_nonzero(precision))
    return np.append(recalls[:end], recalls[max(end - 1, 0)]), np.append(precision[:end], 0.0)


def _mark_point(axes: Axes, point: OperatingPoint | None, color: str, *, with_text: bool) -> None:
    if point is None:
        return
    axes.plot(point.recall, point.precision, "o", color=color, markersize=7, markeredgecolor="black", zorder=3)
    if with_text:
        place = (point.recall, point.precision)
        axes.annotate(f"{point.threshold:.2f}", place, (5, 5), textcoords="offset points", fontsize=10, zorder=4)


def _name_curves(axes: Axes, report: OperatingReport, labelled: Sequence[int], lines: Sequence[Line2D]) -> None:
    """A legend beside the panel: name, AP50, and the threshold with its F1."""
    names, texts = _names(report), []
    for label in labelled:
        point = report.points[label]
        best = "" if point is None else f", F1 {point.f1:.2f} from {point.threshold:.2f}"
        texts.append(f"{names[label]} (AP50 {report.precisions[IOU][label].mean():.2f}{best})")
    legend = axes.legend(
        lines, texts, prop={"family": figure_families(texts)}, bbox_to_anchor=(1.02, 1), loc="upper left"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _color(place: int) -> str:
    """Of matplotlib's ten, then two darker ones."""
    return ([f"C{number}" for number in range(10)] + ["navy", "black"])[place]
