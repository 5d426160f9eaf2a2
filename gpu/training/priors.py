"""What the queries' Gaussians are as a run trains: measured at every evaluation, kept in priors.jsonl, drawn in priors.png.

The same few held-out images are measured each time, with ``SMCADETR.explain``. A run whose model has no prior
(cross_attention="dense") has neither file.

Shape letters: M decoder layers, Q queries, h heads, J levels.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from smca.datasets.batch import UInt8Array
from smca.gpu.config_json import cut
from smca.gpu.files import write_atomically
from smca.gpu.model import SMCADETR
from smca.gpu.model.explanation import Explanation
from smca.gpu.pictures.priors import draw_priors
from smca.gpu.training.setup import Run

PRIORS_FILE = "priors.jsonl"
PRIORS_PICTURE = "priors.png"
IMAGES = 8
"""How many held-out images are measured: the first that have objects."""
MAPS = 16
"""Evaluations whose queries are kept one by one, at most, beside the last; of the others there are the medians and bands."""
QUANTILES = (0.1, 0.5, 0.9)
_LEAST_WEIGHT = 1e-12
"""Of a Gaussian: where all scores are 0 they count alike."""

Array = npt.NDArray[np.float64]


def note_priors(run: Run, evaluated: Collection[int]) -> None:
    """Measure the Gaussians of ``run.trained``, add them to priors.jsonl, and draw priors.png anew.

    Args:
        run: at an evaluation, on its first process, with all weights at hand.
        evaluated: steps of the evaluations before this one. What priors.jsonl has of others, from a run that was cut off, is
            dropped.

    Raises:
        ValueError: priors.jsonl is damaged.
        OSError: a file could not be written.
    """
    if run.config.model.cross_attention == "dense":
        return
    counts = run.val_table.objects_per_image
    indices = np.flatnonzero(counts)[:IMAGES].tolist() or list(range(min(IMAGES, len(counts))))
    example = indices.index(max(indices, key=lambda index: counts[index]))
    samples = [run.val_data[index] for index in indices]
    # A compiled model would be compiled anew for each of these images, and after some of them for none at all.
    with torch.compiler.set_stance("force_eager") if run.config.compile else nullcontext():
        values = measure(run.trained, [sample.image for sample in samples], example)
    shown = samples[example]
    values["map"]["image_id"] = shown.image_id
    output, epoch = run.config.output, run.epoch + (run.batch > 0)
    lines = [line for line in read_priors(output) if line["step"] in evaluated and line["step"] < run.step]
    lines = _thinned([*lines, {"epoch": epoch, "step": run.step, **values}])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(output / PRIORS_FILE, lambda file: file.write(text.encode()))
    write_atomically(output / PRIORS_PICTURE, lambda file: draw_priors(lines, shown.image, shown.boxes_xyxy, file))


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


def numbers_at(output: Path, step: int) -> dict[str, float]:
    """What trackers are told of the evaluation after `step`: its medians and spreads by name; none if nothing was measured."""
    told: dict[str, float | None] = {}
    for line in read_priors(output):
        for number, layer in enumerate(line["layers"] if line["step"] == step else (), 1):
            for level, (stride, widths) in enumerate(zip(line["strides"], layer["sigma_px"], strict=True), 1):
                of_level = f"/level{level}_stride{stride}" if len(line["strides"]) > 1 else ""
                told[f"priors/sigma_px/layer{number}{of_level}"] = widths[1]
            told[f"priors/sigma_of_box/layer{number}"] = layer["sigma_of_box"][1]
            told[f"priors/spread_of_centers/layer{number}"] = layer["spread"]
    return {name: value for name, value in told.items() if value is not None}


def read_priors(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's priors.jsonl, one per evaluation; none if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = output / PRIORS_FILE
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"epoch", "step", "strides", "layers"} <= line.keys():
            raise ValueError(
                f"{path}, line {number}: expected an object with epoch, step, strides and layers, got {cut(text)}: remove the "
                f"file; {PRIORS_PICTURE} then begins at the next evaluation"
            )
        lines.append(line)
    return lines


def _thinned(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines, of which every n-th and the last keep their map: n is the least power of two that leaves MAPS or fewer, so that
    what was kept before holds all that is to be kept."""
    n = 1
    while -(-len(lines) // n) > MAPS:
        n *= 2
    last = len(lines) - 1
    return [
        {name: value for name, value in line.items() if name != "map" or i % n == 0 or i == last}
        for i, line in enumerate(lines)
    ]


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
