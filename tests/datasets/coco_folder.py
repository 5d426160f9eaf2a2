"""A small data set in COCO format on disk, for the tests of CocoDetection."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smca.datasets import CocoDetection

HEIGHT, WIDTH = 40, 60


def content() -> dict[str, Any]:
    """Three images with ids neither contiguous nor sorted; a crowd region on the second, nothing on the third."""
    return {
        "images": [
            {"id": 70, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
            {"id": 9, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 12, "file_name": "sub/c.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {"id": 5, "image_id": 9, "category_id": 90, "bbox": [1, 2, 10, 20]},
            {"id": 3, "image_id": 70, "category_id": 7, "bbox": [5.5, 6.5, 7, 8], "area": 30.5, "iscrowd": 0},
            {"id": 8, "image_id": 9, "category_id": 7, "bbox": [0, 0, 60, 40], "iscrowd": 1, "area": 1000},
            {
                "id": 6,
                "image_id": 9,
                "category_id": 21,
                "bbox": [30, 10, 5, 5],
                "segmentation": [[30, 10, 35, 10, 35, 15]],
            },
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 7, "name": "ant"}, {"id": 21, "name": "bee"}],
    }


def write(root: Path, data: Any) -> tuple[Path, Path]:
    images, annotations = root / "images", root / "annotations.json"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.fromarray(rng.integers(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)).save(images / name)
    annotations.write_text(data if isinstance(data, str) else json.dumps(data))
    return images, annotations


def open_with(root: Path, change: Callable[[dict[str, Any]], object]) -> CocoDetection:
    data = content()
    change(data)
    return CocoDetection(*write(root, data))
