"""Measures what docs/robustness.md says about pictures: a model's answers do not depend on how a picture comes in.

    python docs/robustness.py runs/demo/model

1. Batches: the same picture alone and in a batch, with other pictures beside it and padding around it. The largest change of any
score,
   and of any box whose score exceeds 0.3; as it is, and with a backbone that sees the padding.
2. Files: the built-in held-out images, their lower quarter cut off, written in every EXIF orientation at the sizes that labelling
tools
   write, and with other depths and colours. The AP on each set of files, and on the same pixels without files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from smca.datasets import AnnotationOptions, Category, CocoDetection, Sample, SyntheticShapes, collate
from smca.datasets.batch import DetectionDataset, UInt8Array
from smca.gpu.evaluation import detect, evaluate_detections, evaluation_loader
from smca.gpu.model import SMCADETR

KEPT_ROWS = 96
"""Of 128: a picture that is not square, so that its orientation shows in its size."""
LEAST_SEEN = 0.4
"""Of the height of an object that the cut leaves in the picture."""
CONFIDENT = 0.3
_UNDO = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""Stored pixels of a picture that a viewer, obeying the orientation, shows upright."""


# 1. Batches


@dataclass
class Changes:
    """Largest changes over all pairs."""

    score: float = 0.0
    box_px: float = 0.0


@torch.inference_mode()
def batches(model: SMCADETR, pairs: int, *, backbone_sees_padding: bool) -> Changes:
    """Each pair: a picture of the built-in data cut to a random size; up to three companions; up to 96 pixels of further
    padding."""
    data, rng, changes = SyntheticShapes(300, seed=1), np.random.default_rng(0), Changes()
    alone_in_batch = model.backbone.each_alone
    if backbone_sees_padding:
        model.backbone.each_alone = lambda pixels, _: model.backbone(pixels)  # type: ignore[method-assign]
    for _ in range(pairs):
        samples = [_cut(data[int(rng.integers(len(data)))], rng) for _ in range(1 + int(rng.integers(4)))]
        place = int(rng.integers(len(samples)))
        chosen = samples[place]
        height, width = chosen.image.shape[:2]
        together, alone = collate(samples), collate([chosen])
        rows, columns = (int(n) for n in rng.integers(0, 97, 2))
        images = torch.nn.functional.pad(together.images, (0, columns, 0, rows))
        mask = torch.nn.functional.pad(together.padding_mask, (0, columns, 0, rows), value=True)
        a, b = model(alone.images), model(images, mask)
        scores = a["logits"][-1, 0].sigmoid()
        changes.score = max(changes.score, float((scores - b["logits"][-1, place].sigmoid()).abs().max()))
        scale = torch.tensor([width, height, width, height])
        moved = ((a["boxes"][-1, 0] - b["boxes"][-1, place]).abs() * scale).amax(-1)[scores.amax(-1) > CONFIDENT]
        changes.box_px = max(changes.box_px, float(moved.max()) if len(moved) else 0.0)
    model.backbone.each_alone = alone_in_batch  # type: ignore[method-assign]
    return changes


def _cut(sample: Sample, rng: np.random.Generator) -> Sample:
    height, width = (int(side) for side in rng.integers(48, 129, 2))
    image = np.ascontiguousarray(sample.image[:height, :width])
    return Sample(image, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), sample.image_id, (height, width))


# 2. Files


class Pixels(DetectionDataset):
    """The built-in held-out images without their lower quarter, with what lies in it, as arrays; their pixels converted."""

    def __init__(self, count: int, convert: Callable[[Image.Image], Image.Image] = lambda picture: picture) -> None:
        self._shapes = SyntheticShapes(count, seed=1)
        self._convert = convert

    @property
    def categories(self) -> tuple[Category, ...]:
        return self._shapes.categories

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> Sample:
        sample = self._shapes[index]
        boxes = np.minimum(sample.boxes_xyxy, [np.inf, KEPT_ROWS, np.inf, KEPT_ROWS])
        seen = (boxes[:, 3] - boxes[:, 1]) / (sample.boxes_xyxy[:, 3] - sample.boxes_xyxy[:, 1]) >= LEAST_SEEN
        picture = self._convert(Image.fromarray(np.ascontiguousarray(sample.image[:KEPT_ROWS])))
        image: UInt8Array = np.asarray(picture.convert("RGB"))
        return Sample(image, boxes[seen], sample.labels[seen], sample.image_id, (KEPT_ROWS, image.shape[1]))


@dataclass(frozen=True)
class Variant:
    """A way of storing the pictures."""

    name: str
    save: Callable[[UInt8Array, Path], None]
    suffix: str = "png"
    written: str = "upright"
    """Which size the annotation file has: of the picture as "upright" or as "stored", or "none"."""
    convert: Callable[[Image.Image], Image.Image] = lambda picture: picture
    """What the conversion itself does to the pixels."""


def variants() -> Iterator[Variant]:
    """Every orientation at every size that tools write; then depths and colours."""
    for orientation in range(1, 9):
        for written in ("upright", "stored", "none") if orientation >= 5 else ("upright",):

            def turned(pixels: UInt8Array, path: Path, orientation: int = orientation) -> None:
                exif = Image.Exif()
                exif[0x0112] = orientation
                Image.fromarray(np.ascontiguousarray(_UNDO[orientation](pixels))).save(path, exif=exif)

            yield Variant(f"EXIF orientation {orientation}, size written: {written}", turned, written=written)

    def in_mode(mode: str) -> Callable[[UInt8Array, Path], None]:
        return lambda pixels, path: Image.fromarray(pixels).convert(mode).save(path)

    def grey(scale: Callable[[UInt8Array], Any]) -> Callable[[UInt8Array, Path], None]:
        return lambda pixels, path: Image.fromarray(scale(np.asarray(Image.fromarray(pixels).convert("L")))).save(path)

    def as_grey(picture: Image.Image) -> Image.Image:
        return picture.convert("L")

    yield Variant("grey, 8 bits", grey(lambda g: g), convert=as_grey)
    yield Variant("grey, 16 bits, PNG", grey(lambda g: g.astype(np.uint16) * 257), convert=as_grey)
    yield Variant("grey, 16 bits, TIFF", grey(lambda g: g.astype(np.uint16) * 257), "tiff", convert=as_grey)
    yield Variant("grey, 12 of 16 bits", grey(lambda g: g.astype(np.uint16) << 4), convert=as_grey)
    yield Variant("grey, fractions", grey(lambda g: (g / 255).astype(np.float32)), "tiff", convert=as_grey)
    yield Variant("CMYK", in_mode("CMYK"), "tiff", convert=lambda picture: picture.convert("CMYK"))
    yield Variant("transparent", in_mode("RGBA"))

    def palette(picture: Image.Image) -> Image.Image:
        return picture.quantize(256)

    yield Variant("palette", lambda pixels, path: palette(Image.fromarray(pixels)).save(path), convert=palette)
    yield Variant("WebP, lossless", lambda pixels, path: Image.fromarray(pixels).save(path, lossless=True), "webp")


def write(variant: Variant, root: Path, count: int) -> tuple[Path, Path]:
    """The pictures and an annotation file as a labelling tool might leave them."""
    data = Pixels(count)
    truth = data.ground_truth()
    for index, entry in enumerate(truth["images"]):
        entry["file_name"] = f"{index}.{variant.suffix}"
        variant.save(data[index].image, root / entry["file_name"])
        with Image.open(root / entry["file_name"]) as stored:
            sizes = {"upright": (entry["width"], entry["height"]), "stored": stored.size, "none": (None, None)}
        entry["width"], entry["height"] = sizes[variant.written]
    (root / "val.json").write_text(json.dumps(truth), encoding="utf-8")
    return root, root / "val.json"


def average_precision(model: SMCADETR, data: DetectionDataset) -> float:
    """AP of the model on the data."""
    return evaluate_detections(data.ground_truth(), detect(model, evaluation_loader(data, model.config, 16, 0))).ap


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model trained on the built-in data (make demo: runs/demo/model)")
    parser.add_argument("--pairs", type=int, default=1000, help="pictures in batches (default: 1000)")
    parser.add_argument("--images", type=int, default=300, help="pictures in files (default: 300)")
    parser.add_argument("--keep", type=Path, help="folder that receives the files, to be looked at")
    args = parser.parse_args()
    model = SMCADETR.from_pretrained(args.model)

    print(
        f"| {args.pairs} pictures, alone and in a batch | largest change of a score | of a box, pixels |\n|---|---|---|"
    )
    for name, sees in (("as it is", False), ("with a backbone that sees the padding", True)):
        changes = batches(model, args.pairs, backbone_sees_padding=sees)
        print(f"| {name} | {changes.score:.2g} | {changes.box_px:.2g} |", flush=True)

    print(f"\n| {args.images} pictures in files | frame | AP | AP of the same pixels |\n|---|---|---|---|")
    known: dict[Any, float] = {}
    for variant in variants():
        with tempfile.TemporaryDirectory() as temporary:
            root = args.keep / variant.name.replace(" ", "_") if args.keep else Path(temporary)
            root.mkdir(parents=True, exist_ok=True)
            paths = write(variant, root, args.images)
            try:
                data, frame = CocoDetection(*paths), "found"
            except ValueError as error:
                if "--annotations.frame" not in str(error):
                    raise
                data, frame = CocoDetection(*paths, options=AnnotationOptions(frame="upright")), "asked for"
            ap = average_precision(model, data)
        if variant.convert not in known:
            known[variant.convert] = average_precision(model, Pixels(args.images, variant.convert))
        print(
            f"| {variant.name} | {frame if 'EXIF' in variant.name else ''} | {ap:.4f} | {known[variant.convert]:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
