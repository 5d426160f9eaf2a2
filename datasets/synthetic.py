"""`SyntheticShapes`: pictures drawn by a program, for trying, testing and comparing detectors without a download.

An image has a textured background with distractors that belong to no class (streaks, specks, soft spots), up to six
objects of five classes, turned by up to 30°, with strong variation of scale and aspect, occlusion, and sensor noise.
Colour says nothing about the class. Everything follows from (seed, index).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smca.datasets.batch import (
    Category,
    CocoDict,
    FloatArray,
    IntArray,
    Report,
    Sample,
    UInt8Array,
    coco_annotation,
    digest_of,
)
from smca.datasets.cache import ImageCache
from smca.datasets.layout import Split
from smca.datasets.settings import require
from smca.datasets.shapes import CLASSES, Shape, paint, place_shapes


class SyntheticShapes:
    """`count` images of `image_size` × `image_size` pixels; image i depends on (seed, i) and the size alone.

    Objects are drawn from front to back. If less than `min_visible` of an object would be seen, because it lies behind
    others or beyond the border, it is not drawn at all: there is no object without a label. A box is the tight extent of
    the whole object's pixels inside the image, hidden ones included, in whole pixels.

    count: number of images.  seed: at least 0; different seeds give different images.
    image_size: side in pixels, at least 32; object sizes grow with it.
    max_objects: an image has 1 to `max_objects` objects (as many as fit), or none.
    empty_fraction: fraction of images without an object.
    min_side, max_side: geometric mean of an object's sides as a fraction of the image's side, drawn evenly
        between the two.
    min_visible: see above.
    noise: standard deviation of the sensor noise, of 255.
    cache: keep rendered images in memory (`cache_bytes` when full).

    Raises ValueError for values outside their range.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        *,
        image_size: int = 128,
        max_objects: int = 6,
        empty_fraction: float = 0.04,
        min_side: float = 12 / 128,
        max_side: float = 64 / 128,
        min_visible: float = 0.6,
        noise: float = 10.0,
        cache: bool = False,
    ) -> None:
        require(count >= 1, "SyntheticShapes: count", "at least 1", count)
        require(seed >= 0, "SyntheticShapes: seed", "at least 0", seed)
        require(image_size >= 32, "SyntheticShapes: image_size", "at least 32 px", image_size)
        require(max_objects >= 1, "SyntheticShapes: max_objects", "at least 1", max_objects)
        require(0 <= empty_fraction <= 1, "SyntheticShapes: empty_fraction", "from 0 to 1", empty_fraction)
        require(
            0 < min_side <= max_side <= 1,
            "SyntheticShapes: min_side, max_side",
            "0 < min_side ≤ max_side ≤ 1",
            (min_side, max_side),
        )
        require(0 < min_visible <= 1, "SyntheticShapes: min_visible", "above 0, at most 1", min_visible)
        require(noise >= 0, "SyntheticShapes: noise", "at least 0", noise)
        self.count = count
        self.seed = seed
        self.image_size = image_size
        self.max_objects = max_objects
        self.empty_fraction = empty_fraction
        self.min_side = min_side
        self.max_side = max_side
        self.min_visible = min_visible
        self.noise = noise
        self._cache = ImageCache(np.full((count, 2), image_size)) if cache else None
        self._known_targets: dict[int, tuple[FloatArray, IntArray]] = {}

    @property
    def categories(self) -> tuple[Category, ...]:
        """disc, rectangle, triangle, ring, cross with the ids 1 to 5."""
        return tuple(Category(label + 1, name) for label, name in enumerate(CLASSES))

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes once every image has been rendered; 0 without a cache."""
        return self._cache.nbytes if self._cache is not None else 0

    @property
    def report(self) -> Report:
        """Counts over all images; lays out every image (about 0.5 ms each), but renders none."""
        counts = [len(self._targets(index)[1]) for index in range(self.count)]
        left_out = self._cache.left_out if self._cache is not None else 0
        return Report(self.count, sum(counts), len(CLASSES), counts.count(0), uncached=left_out)

    @property
    def digest(self) -> str:
        """What tells these data from others."""
        boxes, labels = zip(*map(self._targets, range(self.count)), strict=True)
        counts = [len(each) for each in labels]
        return digest_of([self.seed, self.image_size, self.noise, counts, *map(np.concatenate, (boxes, labels))])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """The image [S, S, 3] uint8 with its boxes in pixels; raises IndexError beyond the end."""
        if not 0 <= index < self.count:
            raise IndexError(f"expected an image index from 0 to {self.count - 1}, got {index}")
        image = self._cache.get(index) if self._cache is not None else None
        if image is None:
            image = self._render(index)
            if self._cache is not None:
                image = self._cache.put(index, image)
        boxes_xyxy, labels = self._targets(index)
        size = (self.image_size, self.image_size)
        return Sample(image, boxes_xyxy, labels, image_id=index + 1, original_size=size)

    def read(self, index: int, least_short_side: float) -> Sample:
        """The whole image: it is rendered at one size."""
        return self[index]

    def ground_truth(self) -> CocoDict:
        """The boxes as a COCO dictionary for pycocotools; file names are those of `export_coco`."""
        annotations: list[dict[str, Any]] = []
        for index in range(self.count):
            boxes_xyxy, labels = self._targets(index)
            for (x0, y0, x1, y1), label in zip(boxes_xyxy.tolist(), labels.tolist(), strict=True):
                bbox = [x0, y0, x1 - x0, y1 - y0]
                annotations.append(coco_annotation(len(annotations) + 1, index + 1, label + 1, bbox))
        return {
            "info": {"description": f"synthetic shapes, seed {self.seed}"},
            "licenses": [],
            "images": [
                {"id": index + 1, "file_name": _file_name(index), "width": self.image_size, "height": self.image_size}
                for index in range(self.count)
            ],
            "annotations": annotations,
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }

    def export_coco(self, root: str | os.PathLike[str], split: Split) -> tuple[Path, Path]:
        """Write the images as PNG to root/`split`/ and the boxes to root/annotations/`split`.json.

        `CocoDetection` on the two returned paths (images_dir, annotations_file) gives the same samples. The
        annotation file is written last, so that an interrupted export is not mistaken for a complete one.
        """
        images_dir = Path(root) / split
        annotations_file = Path(root) / "annotations" / f"{split}.json"
        images_dir.mkdir(parents=True, exist_ok=True)
        annotations_file.parent.mkdir(parents=True, exist_ok=True)
        annotations_file.unlink(missing_ok=True)
        for index in range(self.count):
            Image.fromarray(self[index].image).save(images_dir / _file_name(index))
        annotations_file.write_text(json.dumps(self.ground_truth()), encoding="utf-8")
        return images_dir, annotations_file

    def _shapes(self, index: int) -> list[Shape]:
        rng = np.random.default_rng((self.seed, index, 0))
        count = 0 if rng.random() < self.empty_fraction else int(rng.integers(1, self.max_objects + 1))
        sides = self.min_side * self.image_size, self.max_side * self.image_size
        return place_shapes(rng, self.image_size, count, sides, self.min_visible)

    def _targets(self, index: int) -> tuple[FloatArray, IntArray]:
        """Boxes [T, 4] and labels [T]; kept, because the evaluation asks for them repeatedly."""
        if index not in self._known_targets:
            self._remember(index, self._shapes(index))
        return self._known_targets[index]

    def _remember(self, index: int, shapes: list[Shape]) -> None:
        boxes_xyxy = np.array([shape.box_xyxy for shape in shapes], dtype=np.float64).reshape(-1, 4)
        labels = np.array([shape.label for shape in shapes], dtype=np.int64)
        boxes_xyxy.flags.writeable = labels.flags.writeable = False  # every sample of this image shares them
        self._known_targets[index] = boxes_xyxy, labels

    def _render(self, index: int) -> UInt8Array:
        shapes = self._shapes(index)
        self._remember(index, shapes)
        # A stream of its own: what is painted cannot change where objects lie.
        return paint(np.random.default_rng((self.seed, index, 1)), self.image_size, shapes, self.noise)


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.png"
