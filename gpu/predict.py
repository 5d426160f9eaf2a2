"""Detect objects in images.

    smca predict runs/small/model photo.jpg folder/ --output out

writes one annotated picture per image into out/ and all detections into out/results.json (COCO results, with file names; boxes in
pixels of the image as a viewer shows it). A file that cannot be read is skipped and named; what was found until then is in
results.json even if the command is stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro
from PIL import Image
from rich.progress import track

from smca.datasets.batch import UInt8Array
from smca.datasets.images import read_image
from smca.gpu.evaluation import coco_results, pick_device
from smca.gpu.model import SMCADETR, Detections, draw_thresholds
from smca.gpu.pictures.drawing import draw_detections
from smca.gpu.pictures.files import find_images, report_skipped, save_signed

DRAWN_SIDE = 4096
"""Pictures whose longer side exceeds this many pixels are drawn at this size."""


@dataclass(frozen=True)
class PredictArgs:
    """Detect objects in images: annotated pictures and COCO results JSON."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model (config.json, model.safetensors) or of a run, its checkpoint, or a name on the Hugging Face hub."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE …]")]
    """Image files, or folders of them (searched recursively)."""
    output: Path = Path("predictions")
    """Folder that receives the annotated pictures and results.json."""
    threshold: float | None = None
    """Lowest score that is drawn and written; by default the one of best F1 for each class that is saved with the model, or 0.35
    where none is."""
    max_detections: int = 100
    """Largest number of detections per image."""
    device: str = "auto"
    """"cuda", "cpu" …"""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must be in [0, 1], got {self.threshold}")
        if self.max_detections < 1:
            raise ValueError(f"--max-detections must be at least 1, got {self.max_detections}")


@contextlib.contextmanager
def _results_file(path: Path) -> Iterator[TextIO]:
    """A list of results that is written as they come, and whole whatever happens in between."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write("[")
        try:
            yield file
        finally:
            file.write("\n]\n")
            file.close()
            os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca predict``."""
    args = tyro.cli(PredictArgs, args=argv, prog="smca predict")
    paths = find_images(args.images, args.output)
    model = SMCADETR.from_pretrained(args.model).to(pick_device(args.device))
    args.output.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []
    done = found = 0
    with _results_file(args.output / "results.json") as results:
        try:
            for image_id, path in enumerate(track(paths, "detecting", disable=not sys.stdout.isatty()), start=1):
                try:
                    image = read_image(path)
                except (ValueError, OSError) as error:
                    skipped.append(str(error))
                    continue
                detected = _detect(model, image, args)
                for result in _results(model, detected, image_id, path):
                    results.write(("," if found else "") + "\n" + json.dumps(result))
                    found += 1
                _draw(model, image, detected, args.output / f"{image_id:04d}_{path.stem[:100]}.png")
                done += 1
        finally:
            stopped = "" if done + len(skipped) == len(paths) else f" of {len(paths)}; the others were not looked at"
            print(f"{found} objects in {done} images{stopped} → {args.output}/ (pictures, results.json)", flush=True)
    report_skipped(skipped, len(paths))


def _detect(model: SMCADETR, image: UInt8Array, args: PredictArgs) -> Detections:
    detected = model.predict([image], max_detections=args.max_detections)[0]
    return detected.reaching(draw_thresholds(model.config, args.threshold))


def _results(model: SMCADETR, detected: Detections, image_id: int, path: Path) -> Iterator[dict[str, Any]]:
    for result in coco_results(detected.scores, detected.labels, detected.boxes_xyxy, image_id, model.config.ids):
        yield {**result, "file_name": str(path)}


def _draw(model: SMCADETR, image: UInt8Array, detected: Detections, path: Path) -> None:
    picture, scale = Image.fromarray(image), min(1.0, DRAWN_SIDE / max(image.shape[:2]))
    if scale < 1:
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    drawn = draw_detections(
        picture,
        detected.boxes_xyxy.numpy() * scale,
        detected.labels.numpy(),
        detected.scores.numpy(),
        model.config.names,
    )
    save_signed(drawn, path)


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
