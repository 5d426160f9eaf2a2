"""Detect objects in images.

    smca predict runs/small/model photo.jpg folder/ --output out

writes one annotated picture per image into out/ and all detections into out/results.json (COCO results, with file names).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image, ImageOps
from rich.progress import track

from smca.gpu.evaluation import coco_results, pick_device
from smca.gpu.model import SMCADETR
from smca.gpu.pictures.drawing import draw_detections
from smca.gpu.pictures.run import DRAW_THRESHOLD

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Files that are taken from a folder."""


@dataclass(frozen=True)
class PredictArgs:
    """Detect objects in images: annotated pictures and COCO results JSON."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and model.safetensors (runs/…/model), or a name on the Hugging Face hub."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them (searched recursively)."""
    output: Path = Path("predictions")
    """Folder that receives the annotated pictures and results.json."""
    threshold: float = DRAW_THRESHOLD
    """Lowest score that is drawn and written."""
    max_detections: int = 100
    """Largest number of detections per image."""
    device: str = "auto"
    """"cuda", "cpu" …"""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must be in [0, 1], got {self.threshold}")
        if self.max_detections < 1:
            raise ValueError(f"--max-detections must be at least 1, got {self.max_detections}")


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """The named files, and every image file below the named folders, in order."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}): name another folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no image or folder at {path}: check the path")
    if not files:
        raise ValueError("no images given: name image files or folders after the model")
    return files


def open_upright(path: Path) -> Image.Image:
    """An image as RGB, turned as its EXIF orientation says; ValueError naming the file if it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca predict``."""
    args = tyro.cli(PredictArgs, args=argv, prog="smca predict")
    paths = find_images(args.images)
    model = SMCADETR.from_pretrained(args.model).to(pick_device(args.device))
    args.output.mkdir(parents=True, exist_ok=True)
    category_ids = model.config.category_ids or tuple(range(model.config.num_classes))
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    for image_id, path in enumerate(track(paths, "detecting", disable=not sys.stdout.isatty()), start=1):
        try:
            image = open_upright(path)
        except ValueError as error:
            skipped.append(str(error))
            continue
        detected = model.predict([image], max_detections=args.max_detections)[0]
        keep = detected.scores >= args.threshold
        scores, labels, boxes = (
            detected.scores[keep].cpu(),
            detected.labels[keep].cpu(),
            detected.boxes_xyxy[keep].cpu(),
        )
        for result in coco_results(scores, labels, boxes, image_id, category_ids):
            results.append({**result, "file_name": str(path)})
        picture = draw_detections(
            image, boxes.numpy(), labels.numpy(), scores.numpy(), model.config.names, args.threshold
        )
        picture.save(args.output / f"{image_id:04d}_{path.stem}.png")
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(results)} objects in {len(paths) - len(skipped)} images → {args.output}/ (pictures, results.json)")
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} files:\n  " + "\n  ".join(skipped), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
