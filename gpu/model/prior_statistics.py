"""What the Gaussians of all queries are on some images, in numbers: how wide, how far apart, and where.

Shape letters: M decoder layers, Q queries, h heads, J levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smca.datasets.batch import UInt8Array
from smca.gpu.model.explanation import Explanation

if TYPE_CHECKING:
    from smca.gpu.model.detector import SMCADETR

QUANTILES = (0.1, 0.5, 0.9)
_LEAST_WEIGHT = 1e-12
"""Of a Gaussian: where all scores are 0 they count alike."""

Array = npt.NDArray[np.float64]


def measure(model: SMCADETR, images: Sequence[UInt8Array], example: int) -> dict[str, Any]:
    """What the Gaussians of all queries are on some images.

    A Gaussian's width is √(σx·σy). Quantiles weigh it by its query's best score in the layer, times what the query gives its level:
    queries that find nothing hardly count. null is a width without end: the prior is flat.

    Args:
        model: with a prior. Its mode stays as it was.
        images: [H, W, 3] RGB each, of any sizes.
        example: which of them is drawn.

    Returns:
        Plain values, to four digits.
        "images": how many. "strides": [J].
        "layers": for each of the M layers "sigma_px" [J, 3], widths in pixels of the network's input at QUANTILES; "sigma_of_box"
        [3], widths over √(w·h) of the query's box likewise; "spread", the standard deviation of all queries' centres over an
        image, of its sides (0.29 if they lie evenly over it).
        "map": of the example alone, "layers", the first and the last; "queries" [layers, Q, 4], for all Gaussians of a query
        together the mean (x, y) and the standard deviations (x, y), of the image's sides; "scores" [Q], each query's best in
        the last layer.
    """
    strides = np.array(model.config.decoder_strides, dtype=np.float64)
    seen = [model.explain(image, queries=range(model.config.num_queries), maps=False) for image in images]
    layers = [_layer(seen, number, strides) for number in range(len(seen[0].scores))]
    drawn = sorted({0, len(layers) - 1})
    queries = [np.concatenate(_together(seen[example], number), axis=-1) for number in drawn]
    shown = {"layers": drawn, "queries": _plain(np.stack(queries)), "scores": _plain(seen[example].scores[-1].max(-1))}
    return {"images": len(images), "strides": list(model.config.decoder_strides), "layers": layers, "map": shown}


def _layer(seen: Sequence[Explanation], layer: int, strides: Array) -> dict[str, Any]:
    widths, of_box, weights, spreads = [], [], [], []
    for one in seen:
        assert one.sigmas_xy is not None
        sigma = one.sigmas_xy[layer]  # [Q, h, J, 2] in pixels of the image
        widths.append(np.sqrt((sigma / one.cell_sizes_xy * strides[:, None]).prod(-1)))
        sides = one.boxes_xyxy[layer, :, 2:] - one.boxes_xyxy[layer, :, :2]
        of_box.append(np.sqrt(sigma.prod(-1) / np.maximum(sides.prod(-1), 1e-6)[:, None, None]))
        weight = one.scores[layer].max(-1)[:, None, None] * one.level_weights[layer][:, None]  # [Q, 1, J]
        weights.append(np.broadcast_to(np.maximum(weight, _LEAST_WEIGHT), widths[-1].shape))
        spreads.append(np.sqrt(_together(one, layer)[0].var(axis=0).mean()))
    every, weight = np.concatenate(widths), np.concatenate(weights)
    return {
        "sigma_px": [_plain(_quantiles(every[..., j], weight[..., j])) for j in range(len(strides))],
        "sigma_of_box": _plain(_quantiles(np.concatenate(of_box), weight)),
        "spread": _plain(np.mean(spreads)),
    }


def _together(one: Explanation, layer: int) -> tuple[Array, Array]:
    """All Gaussians of a query as one mixture, of heads alike and of levels as the query weighs them: mean and standard
    deviation, of the image's sides, each [Q, 2]."""
    assert one.centers_xy is not None
    assert one.sigmas_xy is not None
    extent = np.array(one.image_size[::-1])
    centers, sigmas = one.centers_xy[layer] / extent, one.sigmas_xy[layer] / extent  # [Q, h, J, 2]
    shares = (one.level_weights[layer] / centers.shape[1])[:, None, :, None]
    mean = (shares * centers).sum((1, 2))
    variance = (shares * (sigmas**2 + (centers - mean[:, None, None]) ** 2)).sum((1, 2))
    return mean, np.sqrt(variance)


def _quantiles(values: Array, weights: Array) -> Array:
    """At QUANTILES: the least value that, with those below it, has that share of the weights."""
    order = np.argsort(values, axis=None, kind="stable")
    shares = np.cumsum(weights.ravel()[order])
    found: Array = values.ravel()[order][np.searchsorted(shares, np.array(QUANTILES) * shares[-1])]
    return found


def _plain(values: Any) -> Any:
    """As JSON has them, to four digits; None where a value is not finite."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None
