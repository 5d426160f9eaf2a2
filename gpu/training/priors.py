"""What the queries' Gaussians are as a run trains: measured at every evaluation, kept in priors.jsonl, drawn in priors.png.

The same few held-out images are measured each time, with ``SMCADETR.explain``. A run whose model has no prior
(cross_attention="dense") has neither file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smca.gpu.config_json import cut
from smca.gpu.files import write_atomically
from smca.gpu.model.prior_statistics import measure
from smca.gpu.pictures.priors import draw_priors
from smca.gpu.training.setup import Run

PRIORS_FILE = "priors.jsonl"
PRIORS_PICTURE = "priors.png"
IMAGES = 8
"""How many held-out images are measured: the first that have objects."""
MAPS = 16
"""Evaluations whose queries are kept one by one, at most, beside the last; of the others there are the medians and bands."""


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
