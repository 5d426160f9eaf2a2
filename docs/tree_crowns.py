"""A small real data set: crowns of trees in aerial photographs, from the Python package DeepForest, cut into tiles for training.

    pip download deepforest --no-deps && unzip deepforest-*.whl 'deepforest/data/*'     20 MB; MIT licence
    python docs/tree_crowns.py deepforest/data data/trees
    smca train small --data data/trees

DeepForest (Weinstein et al., https://github.com/weecology/DeepForest) ships four photographs with a box around each crown: two of
Yellowstone and two plots of 40 m in Florida and California, all at 10 cm per pixel. Training and held-out tiles come from different
photographs. Of version 2.1.0: 140 training tiles with 663 boxes, 30 held-out tiles with 276.
The median crown is 38 pixels across; tiles of 400 pixels (--tile 400) hold up to 61.
"""

from __future__ import annotations

import argparse
import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Boxes = NDArray[np.float64]
"""[n, 4]: left, top, right, bottom in pixels of the photograph."""
HELD_OUT = "2019_YELL_2_541000_4977000_image_crop"
"""The photograph of the held-out tiles: the smaller one of Yellowstone, 13 km from the other."""
LEAST_VISIBLE = 0.5
"""A crown is an object of a tile if this part of its box or more lies in it."""


def boxes_of(annotations: Path) -> Boxes:
    """The boxes in a file of Pascal VOC's format, which counts pixels from 1 and includes the last. All classes ("Tree", "Alive",
    "Dead") are trees."""
    rows = [
        [float(box.findtext(side, "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
        for box in ElementTree.parse(annotations).iter("bndbox")
    ]
    return np.array(rows).reshape(-1, 4) - [1, 1, 0, 0]


def tiles_of(width: int, height: int, side: int) -> list[tuple[int, int, int, int]]:
    """Tiles (left, top, right, bottom) of about `side` pixels that cover a photograph and do not overlap."""
    columns, rows = (
        np.linspace(0, length, max(1, round(length / side)) + 1).round().astype(int).tolist()
        for length in (width, height)
    )
    return [
        (left, top, right, bottom)
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


def boxes_in(tile: tuple[int, int, int, int], boxes: Boxes) -> Boxes:
    """Boxes that lie in a tile to ``LEAST_VISIBLE`` or more, cut to it, in its pixels."""
    cut = boxes.clip([*tile[:2], *tile[:2]], [*tile[2:], *tile[2:]])
    areas, visible = (np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, cut))
    seen: Boxes = cut[visible >= LEAST_VISIBLE * areas]
    return seen - [*tile[:2], *tile[:2]]


def write_split(annotations: list[Path], output: Path, split: str, side: int) -> str:
    """Cut photographs into tiles, written with their annotations in COCO's format; returns what was written, in words.

    Args:
        annotations: the photographs' annotation files, each beside a picture of the same name.
        output: receives annotations/instances_`split`.json and `split`/.
        split: "train" or "val".
        side: of a tile, in pixels.
    """
    (output / "annotations").mkdir(parents=True, exist_ok=True)
    (output / split).mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for file in annotations:
        boxes = boxes_of(file)
        with Image.open(file.with_suffix(".png")) as photograph:
            for tile in tiles_of(*photograph.size, side):
                part = photograph.convert("RGB").crop(tile)
                name = f"{file.stem}_{tile[0]}_{tile[1]}.png"
                part.save(output / split / name)
                images.append({"id": len(images) + 1, "file_name": name, "width": part.width, "height": part.height})
                for x0, y0, x1, y1 in boxes_in(tile, boxes).tolist():
                    one = {"id": len(objects) + 1, "image_id": len(images), "category_id": 1, "iscrowd": 0}
                    objects.append({**one, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "tree"}]}
    (output / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return f"{split}: {len(images)} tiles from {len(annotations)} photographs, {len(objects)} boxes"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut DeepForest's annotated photographs into tiles in COCO's format.")
    parser.add_argument("data", type=Path, help="the package's folder deepforest/data")
    parser.add_argument("output", type=Path, help="receives annotations/, train/ and val/")
    parser.add_argument("--tile", type=int, default=200, help="side of a tile in pixels (default: %(default)s)")
    chosen = parser.parse_args()
    files = sorted(chosen.data.glob("*.xml"))
    held_out = [file for file in files if file.stem == HELD_OUT]
    if not held_out or len(files) < 2:
        parser.error(f"{chosen.data} lacks {HELD_OUT}.xml or any other annotation: give deepforest/data of the package")
    print(write_split([file for file in files if file not in held_out], chosen.output, "train", chosen.tile))
    print(write_split(held_out, chosen.output, "val", chosen.tile))


if __name__ == "__main__":
    main()
