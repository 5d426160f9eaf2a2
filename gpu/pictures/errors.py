"""The folder of ``smca evaluate --errors``: curves, confusions, and a contact sheet for each cause of errors."""

from __future__ import annotations

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from smca.datasets.batch import FloatArray, UInt8Array
from smca.gpu.evaluation.errors import ErrorReport
from smca.gpu.evaluation.image_errors import CAUSES, Error
from smca.gpu.evaluation.operating_point import OperatingReport
from smca.gpu.pictures.drawing import class_color
from smca.gpu.pictures.fonts import figure_families, name_with_font
from smca.gpu.pictures.operating_point import draw_confusion, draw_precision_recall

SHOWN = 24
"""Errors on a sheet, at most: evenly from all of its cause."""
_COLUMNS = 6
_WIDTH, _HEIGHT = 2.9, 3.9
"""Of an error on the sheet, with its text, in inches."""
_AROUND = 1.0
"""How much of the surroundings is shown on each side, as a fraction of the larger side of the boxes."""
_LEAST = 24.0
"""Half the side of what is shown, in pixels of the image, at least."""
_LETTERS, _LINES = 48, 5
"""Of the text below a picture: letters per line, and lines."""


def write_errors(
    operating: OperatingReport, report: ErrorReport, read: Callable[[int], UInt8Array], folder: Path
) -> None:
    """Write errors.json, precision_recall.png, confusion.png and the contact sheets into `folder`.

    It is made if there is none; sheets of an earlier report are removed.

    Args:
        operating: curves, thresholds and confusions.
        report: the errors and their causes.
        read: image id → [H, W, 3] RGB.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for sheet in (folder / f"{kind}-{cause}.png" for kind, causes in CAUSES.items() for cause in causes):
        sheet.unlink(missing_ok=True)
    written = {**operating.as_dict(), "causes": report.as_dict()}
    (folder / "errors.json").write_text(json.dumps(written, indent=1, allow_nan=False), encoding="utf-8")
    draw_precision_recall(operating, folder / "precision_recall.png")
    draw_confusion(operating, folder / "confusion.png")
    draw_errors(report.errors, read, report.class_names, folder)


def draw_errors(
    errors: Sequence[Error], read: Callable[[int], UInt8Array], class_names: Sequence[str], folder: Path
) -> list[Path]:
    """Write a sheet for each kind and cause.

    Args:
        errors: all of them; a sheet names each by its place here.
        read: image id → [H, W, 3] RGB.
        class_names: of the model.
        folder: receives missed-CAUSE.png and false-CAUSE.png.

    Returns:
        What was written.
    """
    names = [name_with_font(name, f"class {label}") for label, name in enumerate(class_names)]
    by_cause: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, error in enumerate(errors):
        by_cause[error.kind, error.cause].append(number)
    written = []
    for (kind, cause), numbers in by_cause.items():
        chosen = [numbers[i] for i in np.linspace(0, len(numbers) - 1, min(SHOWN, len(numbers))).round().astype(int)]
        rows = math.ceil(len(chosen) / _COLUMNS)
        figure = Figure((_WIDTH * _COLUMNS, _HEIGHT * rows + 0.5), dpi=80, layout="constrained")
        figure.suptitle(_title(kind, cause, len(chosen), len(numbers)), fontsize=14)
        for axes in figure.subplots(rows, _COLUMNS, squeeze=False).flat:
            axes.set_axis_off()
        for axes, number in zip(figure.axes, chosen, strict=False):
            _draw(axes, number, errors[number], read(errors[number].image_id), names)
        path = folder / f"{kind}-{cause}.png"
        figure.savefig(path)
        written.append(path)
    return written


def _title(kind: str, cause: str, shown: int, of: int) -> str:
    meaning = CAUSES[kind][cause]
    what, colors = {
        "missed": ("Missed objects", "white, dashed: the object; in colour: the box of its query"),
        "false": ("False boxes", "in colour: the box"),
    }[kind]
    return f"{what}: {meaning} ({f'{shown} of {of}' if shown < of else f'all {of}'}). {colors[0].upper()}{colors[1:]}"


def _draw(axes: Axes, number: int, error: Error, image: UInt8Array, names: Sequence[str]) -> None:
    """The part of an image that an error is about, with text below."""
    box, boxes = np.array(error.box_xyxy), [np.array(error.box_xyxy)]
    if error.kind == "missed":
        if error.query_box_xyxy is not None and error.query_label is not None:
            answer = np.array(error.query_box_xyxy)
            if _touch(box, answer):
                boxes.append(answer)
            _rectangle(axes, answer, error.query_label, f"{names[error.query_label]} {error.query_score:.2f}")
        for color, line in (("black", "-"), ("white", (0, (4, 4)))):
            axes.add_patch(_outline(box, edgecolor=color, linestyle=line, linewidth=1.8))
    else:
        _rectangle(axes, box, error.label, f"{names[error.label]} {error.score:.2f}")
    x0, y0, x1, y1 = _window(np.stack(boxes), image.shape)
    axes.imshow(image[y0:y1, x0:x1], extent=(x0, x1, y1, y0), interpolation="bilinear")
    axes.set(xlim=(x0, x1), ylim=(y1, y0))
    lines = textwrap.wrap(f"{number} · image {error.image_id} · {names[error.label]}: {error.evidence}", _LETTERS)
    text = "\n".join(lines if len(lines) <= _LINES else [*lines[: _LINES - 1], lines[_LINES - 1][: _LETTERS - 1] + "…"])
    below = axes.set_title(text, y=-0.02, va="top", loc="left", fontsize=8, parse_math=False)
    below.set_fontfamily(figure_families([text]))


def _rectangle(axes: Axes, box: FloatArray, label: int, text: str) -> None:
    color = [channel / 255 for channel in class_color(label)]
    axes.add_patch(_outline(box, edgecolor=color, linewidth=2))
    said = axes.text(
        box[0],
        box[1],
        text,
        fontsize=8,
        color="white",
        backgroundcolor=color,
        clip_on=True,
        va="bottom",
        parse_math=False,
    )
    said.set_fontfamily(figure_families([text]))


def _outline(box: FloatArray, **look: object) -> Rectangle:
    x0, y0, x1, y1 = box
    return Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **look)  # type: ignore[arg-type]


def _touch(a: FloatArray, b: FloatArray) -> bool:
    return bool((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all())


def _window(boxes: FloatArray, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A square around boxes [n, 4], as far as it is inside the image: x0, y0, x1, y1 in whole pixels."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    half = max(_LEAST, (0.5 + _AROUND) * float((high - low).max()))
    extent = np.array([shape[1], shape[0]])
    x0, y0 = np.clip(np.floor((low + high) / 2 - half), 0, extent - 1).astype(int).tolist()
    x1, y1 = np.clip(np.ceil((low + high) / 2 + half), 1, extent).astype(int).tolist()
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)
