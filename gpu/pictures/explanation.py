"""One picture of why: for the best detections, where their heads looked in every layer."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle
from PIL import Image

from smca.gpu.model.explanation import Explanation
from smca.gpu.pictures.drawing import draw_detections
from smca.gpu.pictures.fonts import figure_families

ROWS = 4
"""Detections in a picture, at most."""
PANEL = 2.6
"""Width of a panel in inches."""


def attention_on_image(shown: Explanation, query: int, layer: int, *, prior: bool = True) -> npt.NDArray[np.float64]:
    """A query's attention per pixel, heads averaged and levels weighed as the query does: [H, W] of 200 pixels along the longer
    side, which add up to 1. `query` counts within `shown`."""
    height, width = shown.image_size
    scale = 200 / max(height, width)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    total = np.zeros(shape)
    levels = shown.attention if prior else shown.attention_without_prior
    for level, cell_xy, weight in zip(levels, shown.cell_sizes_xy, shown.level_weights[layer, query], strict=True):
        cells = level[layer, query].mean(0)
        # The cells cover the image and a little more, where it is no whole number of them.
        covered = np.array(cells.shape[::-1]) * cell_xy / [width, height] * shape[::-1]
        picture = Image.fromarray(cells.astype(np.float32)).resize(
            (max(1, round(covered[0])), max(1, round(covered[1]))), Image.Resampling.BILINEAR
        )
        values = np.asarray(picture)[: shape[0], : shape[1]].astype(np.float64)
        padded = np.pad(values, [(0, n - m) for n, m in zip(shape, values.shape, strict=True)], mode="edge")
        total += weight * padded / padded.sum()
    return total


def draw_explanation(image: npt.NDArray[np.uint8], shown: Explanation, class_names: Sequence[str]) -> Image.Image:
    """A row for each of the best detections: the layers from first to last, and the last one without its prior.

    Args:
        image: [H, W, 3] RGB, of any size.
        shown: of it, with maps.
        class_names: of the model.

    Returns:
        An image; if nothing is to be shown, the photograph alone.
    """
    rows = min(ROWS, len(shown.queries))
    if not rows:
        return draw_detections(image, np.zeros((0, 4)), [], [], class_names)
    layers, steered = len(shown.scores), shown.centers_xy is not None
    columns = layers + steered
    height, width = shown.image_size
    figure = Figure((PANEL * columns, (PANEL * height / width + 0.35) * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        label = int(shown.scores[-1, row].argmax())
        for column in range(columns):
            layer, prior = min(column, layers - 1), column < layers
            _panel(axes[row, column], image, shown, row, layer, prior=prior)
            what = f"layer {layer + 1}: {shown.scores[layer, row, label]:.2f}" if prior else "without the prior"
            name = f"{class_names[label]}, " if column == 0 else ""
            title = axes[row, column].set_title(f"{name}{what}", fontsize=9)
            title.set_fontfamily(figure_families([title.get_text()]))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def _panel(
    axes: Axes, image: npt.NDArray[np.uint8], shown: Explanation, query: int, layer: int, *, prior: bool
) -> None:
    height, width = shown.image_size
    axes.imshow(image, extent=(0, width, height, 0))
    heat = attention_on_image(shown, query, layer, prior=prior)
    axes.imshow(heat**0.5, cmap="inferno", alpha=0.65, extent=(0, width, height, 0))
    if prior and shown.centers_xy is not None and shown.sigmas_xy is not None:
        heads = shown.centers_xy.shape[2]
        for head, level in np.ndindex(heads, shown.centers_xy.shape[3]):
            sigma = shown.sigmas_xy[layer, query, head, level]
            if np.isfinite(sigma).all():
                center, color = shown.centers_xy[layer, query, head, level], f"C{head % 10}"
                axes.add_patch(Ellipse(center, *(2 * sigma), fill=False, edgecolor=color, linewidth=0.8))
    x0, y0, x1, y1 = shown.boxes_xyxy[layer, query]
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="#ffd60a", linewidth=1.5))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
