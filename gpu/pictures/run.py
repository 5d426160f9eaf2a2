"""The pictures that a training run writes: detections beside the ground truth, and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smca.datasets import DetectionDataset
from smca.gpu.model import SMCADETR, draw_thresholds
from smca.gpu.pictures.drawing import contact_sheet, draw_detections, training_curves

PICTURES = 12
"""How many held-out images are drawn."""


def draw_run(model: SMCADETR, data: DetectionDataset, metrics: list[dict[str, Any]], output: Path) -> None:
    """Write curves.png, predictions.png and pictures/ into `output`."""
    training_curves(metrics, output / "curves.png")
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    drawn = []
    for index in np.linspace(0, len(data) - 1, min(PICTURES, len(data))).round().astype(int).tolist():
        sample = data[index]
        detected = model.predict([sample.image])[0].reaching(draw_thresholds(model.config))
        picture = draw_detections(
            sample.image,
            detected.boxes_xyxy.numpy(),
            detected.labels.numpy(),
            detected.scores.numpy(),
            model.config.names,
            truth_xyxy=sample.boxes_xyxy,
        )
        picture.save(folder / f"{sample.image_id:06d}.png")
        drawn.append(picture)
    contact_sheet(drawn, columns=4).save(output / "predictions.png")
