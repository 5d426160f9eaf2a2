"""Pictures: detections on an image, several images on one sheet, and curves of training runs."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from smca.gpu.pictures.fonts import Part, figure_families, label_parts, name_with_font, text_width

LEGIBLE_SIDE = 480
"""Small images are enlarged until the shorter side has at least this many pixels, so that text stays legible."""
LARGEST_SIDE = 2048
"""Enlarging stops before the longer side exceeds this many pixels."""

_Rectangle = tuple[float, float, float, float]
_Color = tuple[int, int, int]
_GOLDEN_ANGLE = 0.618033988749895
_PAPER: _Color = (255, 255, 255)


def draw_detections(
    image: NDArray[np.uint8] | Image.Image,
    boxes_xyxy: ArrayLike,
    labels: ArrayLike,
    scores: ArrayLike | None,
    class_names: Sequence[str],
    threshold: float = 0.0,
    *,
    truth_xyxy: ArrayLike | None = None,
) -> Image.Image:
    """Draw the boxes whose score reaches the threshold, each in its class's colour with name and score.

    Args:
        image: uint8 [H, W, 3] RGB, or a PIL image. It is not changed.
        boxes_xyxy: [T, 4] corners (x0, y0, x1, y1) in pixels of `image`; parts beyond its border are cut off.
        labels: [T] index of each box's class in `class_names`.
        scores: [T] in [0, 1]; None = boxes without scores, such as annotations: all are drawn, with their names alone.
        class_names: name of each class.
        threshold: least score that is drawn; 0 draws everything.
        truth_xyxy: [S, 4] ground truth boxes, drawn thin, dashed and white.

    Returns:
        A new RGB image; its size is a whole multiple of `image`'s if that was too small for legible text.

    Raises:
        ValueError: shapes or types that do not fit, a box that is not finite, a label without a name.
    """
    canvas = _as_picture(image)
    boxes = _as_boxes(boxes_xyxy, "boxes_xyxy")
    truth = np.zeros((0, 4)) if truth_xyxy is None else _as_boxes(truth_xyxy, "truth_xyxy")
    label_of = np.asarray(labels).reshape(-1)
    score_of = np.ones(len(boxes)) if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    if not len(boxes) == len(label_of) == len(score_of):
        raise ValueError(
            f"expected one label and one score per box, got {len(boxes)} boxes, {len(label_of)} labels and {len(score_of)} scores"
        )
    if len(label_of) and not 0 <= label_of.min() <= label_of.max() < len(class_names):
        raise ValueError(
            f"labels must be indices into the {len(class_names)} class names, got {label_of.min()} … {label_of.max()}: "
            "were the detections made by a model with other classes?"
        )

    factor = _enlargement(canvas.size)
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    short_side = min(canvas.size)
    line = max(2, round(short_side / 240))
    text_height = max(13, round(short_side / 36))

    for box in truth * factor:
        _dashed_rectangle(pen, _clipped(box, canvas.size), max(1, line // 2), dash=4 * line)
    kept = [int(i) for i in np.argsort(score_of, kind="stable") if score_of[i] >= threshold]
    for i in kept:  # the most confident last, on top
        pen.rectangle(_clipped(boxes[i] * factor, canvas.size), outline=class_color(int(label_of[i])), width=line)
    taken: list[_Rectangle] = []
    for i in reversed(kept):  # the most confident first: it gets the best place for its text
        label = int(label_of[i])
        score = None if scores is None else float(score_of[i])
        parts = label_parts(class_names[label], label, score, text_height, canvas.width - 5)
        place = _label_place(parts, _clipped(boxes[i] * factor, canvas.size), canvas.size, taken)
        taken.append(place)
        color = class_color(label)
        pen.rectangle(place, fill=color)
        x, baseline = place[0] + 2, place[1] + _ascent(parts)
        for part in parts:
            pen.text((x, baseline), part.text, fill=_readable_on(color), font=part.font, anchor="ls")
            x += text_width([part])
    return canvas


def class_color(label: int) -> _Color:
    """A saturated RGB colour for a class: any number of labels get distinct hues, neighbours far apart."""
    hue = (0.02 + label * _GOLDEN_ANGLE) % 1.0
    value = (1.0, 0.82, 0.92)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay images out row by row on white, each in the middle of a cell as large as the largest of them.

    Args:
        images: at least one; sizes may differ.
        columns: images per row, at least 1; fewer images than that make one narrower row.

    Raises:
        ValueError: no images, or columns below 1.
    """
    if not images:
        raise ValueError("contact_sheet needs at least one image, got none")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    gap = max(4, min(width, height) // 60)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), _PAPER)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left = gap + column * (width + gap) + (width - image.width) // 2
        top = gap + row * (height + gap) + (height - image.height) // 2
        sheet.paste(image, (left, top))
    return sheet


def training_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Picture of one run: the loss by epoch, and AP and AP50 by epoch.

    Args:
        metrics: the lines of a run's metrics.jsonl, each with ``epoch``, ``loss``, ``ap``, ``ap50`` and
            ``train_seconds``; a value that is None (no ground truth to evaluate on) leaves a gap. Of several lines for
            one epoch, the last counts.
        path: picture to write; its suffix names the format.

    Raises:
        ValueError: no lines, or one without these fields.
    """
    lines = _by_epoch(metrics, ("epoch", "loss", "ap", "ap50", "train_seconds"))
    epochs = list(lines)
    # A Figure of its own rather than pyplot: no global state, and never a window.
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, ap_axes = figure.subplots(1, 2)
    loss_axes.plot(epochs, [_number(line["loss"]) for line in lines.values()], marker=".", color="tab:blue")
    _label(loss_axes, "training loss")
    loss_axes.set_ylim(bottom=0)
    last = lines[epochs[-1]]
    for key, name, color in (("ap50", "AP50", "tab:orange"), ("ap", "AP", "tab:green")):
        text = name if last[key] is None else f"{name} (last {last[key]:.3f})"
        ap_axes.plot(epochs, [_number(line[key]) for line in lines.values()], marker=".", color=color, label=text)
    _label(ap_axes, "validation")
    ap_axes.set_ylim(0, 1)
    ap_axes.legend()
    figure.suptitle(f"{_duration(last['train_seconds'])} of training")
    figure.savefig(path, dpi=120)


def compare_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    path: Path,
    *,
    metric: str = "ap",
    title: str = "",
    log_epochs: bool = False,
) -> None:
    """Picture of several recipes: mean over the seeds by epoch as a line, from worst to best seed as a band.

    Args:
        runs: recipe name → one entry per seed → the lines of that run's metrics.jsonl, each with ``epoch`` and `metric`.
            Epochs that not all seeds of a recipe have reached are left out: a mean over fewer would jump.
        path: picture to write; its suffix names the format.
        metric: field of the lines that is drawn, "ap" or "ap50".
        title: heading of the picture.
        log_epochs: logarithmic axis of epochs, for recipes of very different length.

    Raises:
        ValueError: no recipes, a recipe without seeds, seeds without a common epoch, or a line without these fields.
    """
    if not runs:
        raise ValueError("compare_curves needs at least one recipe, got none")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn: list[Line2D] = []
    for number, (name, seeds) in enumerate(runs.items(), start=1):
        if not seeds:
            raise ValueError(f"recipe {name!r} has no runs: give the metrics of at least one seed")
        lines = [_by_epoch(seed, ("epoch", metric)) for seed in seeds]
        epochs = sorted(set.intersection(*(set(seed) for seed in lines)))
        if not epochs:
            raise ValueError(
                f"the seeds of recipe {name!r} have no epoch in common: {[list(seed)[:5] for seed in lines]}"
            )
        values = np.array([[_number(seed[epoch][metric]) for epoch in epochs] for seed in lines])  # [seeds, epochs]
        count = "" if len(seeds) == 1 else f", {len(seeds)} seeds"
        text = f"{name_with_font(name, f'recipe {number}')} ({values[:, -1].mean():.3f}{count})"
        (line,) = axes.plot(epochs, values.mean(axis=0), marker=".", label=text)
        drawn.append(line)
        axes.fill_between(
            epochs, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0
        )
    _label(axes, metric.upper())
    axes.set_ylim(bottom=0)
    if log_epochs:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    # Names as they are: in any script, a "$" being no formula and a "_" in front hiding nothing.
    title, names = name_with_font(title, ""), [str(line.get_label()) for line in drawn]
    families = figure_families([title, *names])
    axes.set_title(title, fontfamily=families, parse_math=False)
    legend = axes.legend(drawn, names, prop={"family": families})
    for said in legend.get_texts():
        said.set_parse_math(False)
    figure.savefig(path, dpi=120)


def _by_epoch(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[int, Mapping[str, Any]]:
    """The lines by epoch in order; a resumed run may have written an epoch twice, and its last line counts."""
    for number, line in enumerate(metrics, start=1):
        missing = [name for name in names if name not in line]
        if missing:
            raise ValueError(f"line {number} of the metrics has no {', '.join(missing)}; it has {', '.join(line)}")
    if not metrics:
        raise ValueError("no metrics to draw: the run has not been evaluated yet")
    lines = {int(line["epoch"]): line for line in metrics}
    return {epoch: lines[epoch] for epoch in sorted(lines)}


def _label(axes: Axes, y_label: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"


def _as_picture(image: NDArray[np.uint8] | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"image must be uint8 [H, W, 3] or a PIL image, got {array.dtype} {list(array.shape)}")
    return Image.fromarray(array)


def _as_boxes(boxes_xyxy: ArrayLike, name: str) -> NDArray[np.float64]:
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must be [T, 4] (x0, y0, x1, y1), got shape {list(boxes.shape)}")
    if not np.isfinite(boxes).all():
        raise ValueError(f"{name} must be finite, got {boxes[~np.isfinite(boxes).all(axis=1)][0].tolist()}")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        wrong = boxes[(boxes[:, 2:] < boxes[:, :2]).any(axis=1)][0]
        raise ValueError(
            f"{name} must be corners with x0 ≤ x1 and y0 ≤ y1, got {wrong.tolist()}; are they cxcywh or xywh?"
        )
    return boxes


def _enlargement(size: tuple[int, int]) -> int:
    return max(1, min(math.ceil(LEGIBLE_SIDE / min(size)), LARGEST_SIDE // max(size)))


def _clipped(box_xyxy: NDArray[np.float64], size: tuple[int, int]) -> _Rectangle:
    x0, y0, x1, y1 = np.clip(box_xyxy, 0, [size[0] - 1, size[1] - 1] * 2).tolist()
    return x0, y0, x1, y1


def _readable_on(color: _Color) -> _Color:
    """Black or white, whichever stands out (ITU-R BT.601 luma)."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _PAPER


def _label_place(
    parts: Sequence[Part],
    box: _Rectangle,
    size: tuple[int, int],
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """Where the text goes: above the box, inside its top, below it or inside its bottom; the first that is free."""
    width, height = text_width(parts) + 4, _ascent(parts) + max(part.font.getmetrics()[1] for part in parts)
    left = max(0.0, min(box[0], size[0] - 1 - width))
    places = []
    for top in (box[1] - height, box[1], box[3], box[3] - height):
        top = max(0.0, min(top, size[1] - 1 - height))
        places.append((left, top, left + width, top + height))
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    return (free or places)[0]


def _ascent(parts: Sequence[Part]) -> int:
    """Pixels from the top of the tallest font to the line that all stand on."""
    return max(part.font.getmetrics()[0] for part in parts)


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _dashed_rectangle(pen: ImageDraw.ImageDraw, box: _Rectangle, width: int, dash: int) -> None:
    """White dashes on a dark ground, so that they show on light and on dark images."""
    x0, y0, x1, y1 = box
    pen.rectangle(box, outline=(0, 0, 0), width=width)
    for start in np.arange(x0, x1, 2 * dash).tolist():
        for y in (y0, y1):
            pen.line((start, y, min(start + dash, x1), y), fill=_PAPER, width=width)
    for start in np.arange(y0, y1, 2 * dash).tolist():
        for x in (x0, x1):
            pen.line((x, start, x, min(start + dash, y1)), fill=_PAPER, width=width)
