"""The picture of the queries' Gaussians as a run trains: where they are on a held-out image, and how wide, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from smca.datasets.batch import FloatArray, UInt8Array
from smca.gpu.model import DRAW_THRESHOLD

COLUMNS = 5
"""Evaluations whose queries are drawn one by one, at most."""
PANEL, GAP, TOP = 2.1, 0.12, 0.6
"""In inches: the width of an image, the space between two, and that above all."""
MARGIN = 0.04
"""What is drawn around an image, of its sides."""
_FINDS, _IDLE, _OBJECT = "#d7191c", "#2c5f8a", "black"
_PIXELS, _GREYS = 200, 12
"""Of the drawn image: its longer side and its shades. More of them would make the file, not the picture."""
_COLORS = 200
"""Of the file."""
_EVENLY = 12**-0.5
"""Standard deviation of what lies evenly over an image, of its side."""
_DOTTED: dict[str, Any] = {"linewidth": 0.8, "linestyle": ":"}


def draw_priors(
    lines: Sequence[Mapping[str, Any]], image: UInt8Array, boxes_xyxy: FloatArray, file: Path | BinaryIO
) -> None:
    """Write the picture as PNG.

    Args:
        lines: of priors.jsonl, one for each evaluation, in order; ``smca.gpu.model.prior_statistics.measure`` says what they
            have. The last one has a map. Of several of one epoch the last counts.
        image: [H, W, 3] RGB, that of the maps.
        boxes_xyxy: [T, 4] its objects, in its pixels.
        file: where to.
    """
    lines = list({line["epoch"]: line for line in lines}.values())
    chosen = _chosen(lines)
    rows, layers = chosen[-1]["map"]["layers"], len(lines[-1]["layers"])
    # In inches from the top. Placed by hand: matplotlib's own layout takes longer than all else.
    panel = PANEL * min(max(image.shape[0] / image.shape[1], 0.5), 1.5)  # of the image's shape, within limits
    maps_end = TOP + len(rows) * panel + (len(rows) - 1) * GAP
    width, height = COLUMNS * (PANEL + GAP) + 0.75, maps_end + 3.95
    figure = Figure((width, height), dpi=90)
    sides = {"left": 0.7 / width, "right": 1 - 0.15 / width}
    above = figure.add_gridspec(
        len(rows),
        COLUMNS,
        **sides,
        top=1 - TOP / height,
        bottom=1 - maps_end / height,
        wspace=GAP / PANEL,
        hspace=GAP / panel,
    )
    below = figure.add_gridspec(
        1, len(lines[-1]["strides"]) + 2, **sides, top=1 - (maps_end + 1.45) / height, bottom=0.5 / height, wspace=0.3
    )
    _draw_maps(above.subplots(squeeze=False)[:, : len(chosen)], chosen, rows, layers, image, boxes_xyxy)
    _draw_curves(below.subplots(squeeze=False)[0], lines, layers)
    for unused in figure.axes[: len(rows) * COLUMNS]:
        unused.set_visible(unused.has_data())
    _write_around(figure, 1 - (maps_end + 0.5) / height, 1 - (maps_end + 1.0) / height, lines[-1]["images"])
    canvas: Any = FigureCanvasAgg(figure)  # untyped
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(_COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def _chosen(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of those that have a map: the first, the last, and what is nearest to evenly between."""
    with_map = [line for line in lines if "map" in line]
    epochs = np.array([line["epoch"] for line in with_map])
    nearest = [np.abs(epochs - epoch).argmin() for epoch in np.linspace(epochs[0], epochs[-1], COLUMNS)]
    return [with_map[i] for i in sorted(set(nearest))]


def _draw_maps(
    axes: NDArray[Any],
    chosen: Sequence[Mapping[str, Any]],
    rows: Sequence[int],
    layers: int,
    image: UInt8Array,
    boxes_xyxy: FloatArray,
) -> None:
    height, width = image.shape[:2]
    scale = min(1.0, _PIXELS / max(height, width))
    small = Image.fromarray(image).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    shades = np.round(np.asarray(small.convert("L")) / 255 * _GREYS) / _GREYS
    for (row, column), panel in np.ndenumerate(axes):
        panel.imshow(shades, cmap="gray", vmin=-2, vmax=1, extent=(0, 1, 1, 0), aspect=height / width)
        for x0, y0, x1, y1 in (boxes_xyxy / [width, height, width, height]).tolist():
            panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=_OBJECT, **_DOTTED))
        _draw_queries(panel, chosen[column]["map"], row)
        panel.set(xlim=(-MARGIN, 1 + MARGIN), ylim=(1 + MARGIN, -MARGIN), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        panel.tick_params(labelsize=8, labelbottom=row == len(rows) - 1, labelleft=column == 0)
        if row == 0:
            panel.set_title(f"epoch {chosen[column]['epoch']}", fontsize=12)
        if row == len(rows) - 1:
            panel.set_xlabel("x / width", fontsize=10)
        if column == 0:
            name = f"layer {rows[row] + 1}" + " (last)" * (0 < rows[row] == layers - 1)
            panel.set_ylabel(f"{name}\ny / height", fontsize=10)


def _draw_queries(axes: Axes, shown: Mapping[str, Any], row: int) -> None:
    """A dot in each query's centre, and an ellipse around it unless its prior is flat."""
    queries = np.array(shown["queries"][row], dtype=np.float64)  # [Q, 4], None becomes NaN
    finds = np.array(shown["scores"], dtype=np.float64) >= DRAW_THRESHOLD
    faint = 0.35 * min(1.0, 60 / max(1, (~finds).sum()))  # hundreds of ellipses would hide the image
    for those, color, dot, line, alpha in ((~finds, _IDLE, 4, 0.4, faint), (finds, _FINDS, 14, 1.4, 1.0)):
        bounded = queries[those & np.isfinite(queries).all(-1)]
        (x, y), (width, height) = queries[those, :2].T, 2 * bounded[:, 2:].T
        ellipses = EllipseCollection(
            width,
            height,
            np.zeros(len(bounded)),
            units="xy",
            offsets=bounded[:, :2],
            offset_transform=axes.transData,
            facecolors="none",
            edgecolors=color,
            linewidths=line,
            alpha=alpha,
        )
        axes.add_collection(ellipses, autolim=False)
        axes.scatter(x, y, s=dot, color=color, alpha=max(alpha, 0.6), linewidths=0)


def _draw_curves(axes: NDArray[Any], lines: Sequence[Mapping[str, Any]], layers: int) -> None:
    """One panel per level, one for widths beside boxes, one for the spread of centres; a curve per layer."""
    epochs, strides = [line["epoch"] for line in lines], lines[-1]["strides"]

    def values(name: str) -> NDArray[np.float64]:
        """[evaluations, layers, …], None becomes NaN."""
        return np.array([[layer[name] for layer in line["layers"]] for line in lines], dtype=np.float64)

    px, unit, level = (
        values("sigma_px"),
        "σ in pixels of the network's input",
        ", stride {}" if len(strides) > 1 else "",
    )
    panels = [(px[:, :, j], "Width" + level.format(stride), unit * (j == 0)) for j, stride in enumerate(strides)]
    panels.append((values("sigma_of_box"), "Width beside the box", "σ / side of the query's box"))
    panels.append((values("spread"), "Spread of all centres", "std / side of the image"))
    for panel, (curves, title, y_label) in zip(axes, panels, strict=True):
        for layer in range(layers):
            color, curve = colormaps["viridis"](0.85 * (1 - layer / max(1, layers - 1))), curves[:, layer]
            if curve.ndim == 2:  # [evaluations, 3]
                if layer in (0, layers - 1):
                    panel.fill_between(epochs, curve[:, 0], curve[:, 2], color=color, alpha=0.18, linewidth=0)
                curve = curve[:, 1]
            panel.plot(epochs, curve, color=color, marker=".", label=f"layer {layer + 1}")
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("epoch", fontsize=10)
        panel.set_ylabel(y_label, fontsize=9)
        most = curves[np.isfinite(curves)].max(initial=0)
        panel.set(xlim=(epochs[0] - 0.5, epochs[-1] + 0.5), ylim=(0, 1.1 * most or 1))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    axes[0].legend(fontsize=8)
    axes[-1].axhline(_EVENLY, color="gray", linestyle="--", linewidth=1, label="evenly over the image")
    axes[-1].set_ylim(0, max(1.2 * _EVENLY, axes[-1].get_ylim()[1]))
    axes[-1].legend(handles=axes[-1].lines[-1:], fontsize=8, loc="lower right")


def _write_around(figure: Figure, legend: float, heading: float, images: int) -> None:
    """Both headings and the legend of the maps, whose places are fractions of the height."""
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o"}
    together = "its Gaussians together: one standard deviation"
    figure.legend(
        handles=[
            Line2D(
                [], [], color=_FINDS, markersize=6, label=f"query that detects (last score ≥ {DRAW_THRESHOLD})", **dots
            ),
            Line2D([], [], color=_IDLE, markersize=4, alpha=0.6, label="other query", **dots),
            Line2D([], [], color="gray", linestyle="none", marker="$◯$", markersize=11, label=together),
            Line2D([], [], color=_OBJECT, label="object", **_DOTTED),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, legend),
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    bold: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 13, "fontweight": "bold"}
    figure.text(0.5, 0.992, "Where the decoder's queries look, on one held-out image", **bold)
    weighed = "median and 10–90 %, queries weighed by score"
    counted = f"{images} held-out image{'s' * (images > 1)}"
    figure.text(0.5, heading, f"How wide their Gaussians are, over {counted}: {weighed}", **bold)
