"""`CocoDetection`: a folder of images and an annotation file in COCO's format, checked once when it is opened.

The constructor finds every fault of the annotation file, every missing image and every file that is no picture of the size it
should have, before a training run has spent an hour; the pixels themselves are checked when they are read. A fault that only the
user can fix raises an error that names file and entry. What has one sane answer (a box without area, a box reaching out of its
image, an id written as text) is handled, counted and shown in `report`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smca.datasets.batch import Category, CocoDict, IntArray, Report, Sample, UInt8Array, coco_annotation
from smca.datasets.cache import ImageCache
from smca.datasets.coco_index import Texts, kept_index
from smca.datasets.images import REDUCTIONS, Frame, read_image
from smca.datasets.open_coco import open_coco
from smca.datasets.options import AnnotationOptions
from smca.datasets.settings import shown
from smca.datasets.table import AnnotationTable


class CocoDetection:
    """Images with boxes from a COCO annotation file.

    Boxes are COCO's [x, y, width, height] in pixels of the image in `frame`: as viewers show it, or as it is stored without its
    EXIF orientation. Images are served, and sizes given, in that frame. Category ids may be any integers or texts; `categories` is
    sorted by id and a label is an index into it.

    images_dir: the folder to which the file's `file_name` entries are relative.
    annotations_file: the JSON file.
    options: how to understand the file where it leaves room; by default, only what is certain.
    cache: keep decoded images in memory as they are read (3 bytes per pixel; 640×480: 0.92 MB per image), as many as fit into a
        third of the memory that is free (`cache_bytes`). Worth it for a few thousand small images on a machine with few cores.

    Raises FileNotFoundError if the folder, the annotation file or images are missing, ValueError for an annotation file
    that is not in COCO's format, for files that are no pictures of the size it says, and for boxes that are probably something else
    than it says (`options` decides then). `dataset[i]` raises ValueError for an image that cannot be decoded.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        annotations_file: str | os.PathLike[str],
        *,
        options: AnnotationOptions | None = None,
        cache: bool = False,
    ) -> None:
        self.images_dir = Path(images_dir)
        self.annotations_file = Path(annotations_file)
        options = options or AnnotationOptions()
        self._index = kept_index(
            self.annotations_file,
            self.images_dir,
            options,
            lambda tell: open_coco(self.images_dir, self.annotations_file, options, tell),
        )
        self._cache = ImageCache(self._index.picture_sizes) if cache else None

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes sorted by id; a label is an index into this tuple."""
        return self._index.categories

    @property
    def frame(self) -> Frame:
        """What boxes refer to in photographs with an EXIF orientation."""
        return self._index.frame

    @property
    def file_names(self) -> Texts:
        """The images' files, relative to the image folder."""
        return self._index.names

    @property
    def sizes(self) -> IntArray:
        """[images, 2] height and width in pixels of every image, as its annotations see it."""
        return self._index.sizes

    @property
    def report(self) -> Report:
        """What was found, corrected, dropped and clipped."""
        left_out = self._cache.left_out if self._cache is not None else 0
        return dataclasses.replace(self._index.report, uncached=left_out)

    @property
    def digest(self) -> str:
        """What tells these data from others."""
        return self._index.digest

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes once every image has been read; 0 without a cache."""
        return self._cache.nbytes if self._cache is not None else 0

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> Sample:
        """The whole image [H, W, 3] uint8 with its boxes in pixels; crowd regions are left out.

        Raises IndexError beyond the end; ValueError if the image cannot be decoded or has changed its size since the data were
        opened; FileNotFoundError if it has been removed since.
        """
        return self.read(index)

    def read(self, index: int, least_short_side: float = math.inf) -> Sample:
        """``self[index]``; of a JPEG a half, a quarter or an eighth in size, if that leaves `least_short_side` pixels.

        A cache keeps whole images.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"expected an image index from 0 to {len(self) - 1}, got {index}")
        image = self._cache.get(index) if self._cache is not None else None
        if image is None:
            image = self._read(index, least_short_side if self._cache is None else math.inf)
            if self._cache is not None:
                image = self._cache.put(index, image)
        rows = self._index.rows_of(index)
        kept = rows[self._index.trained[rows]]
        size, picture_size = self.sizes[index], self._index.picture_sizes[index]
        boxes_xyxy = self._index.clipped_xyxy[kept]
        if (size != picture_size).any():  # resized after it was annotated
            boxes_xyxy = boxes_xyxy * np.tile(picture_size[::-1] / size[::-1], 2)
        boxes_xyxy = boxes_xyxy / (_divisor(image, picture_size) or 1)
        height, width = size.tolist()
        return Sample(
            image=image,
            boxes_xyxy=boxes_xyxy,
            labels=self._index.labels[kept],
            image_id=int(self._index.image_ids[index]),
            original_size=(height, width),
        )

    def _read(self, index: int, least_short_side: float) -> UInt8Array:
        path = self.images_dir / self.file_names[index]
        entry = f"image {shown(self._index.own_image_id(index))} of {self.annotations_file}"
        try:
            image = read_image(path, self.frame, least_short_side)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} ({entry}) existed when the data were opened, but is gone; restore it"
            ) from None
        except ValueError as error:
            raise ValueError(f"{error}, or remove its entry ({entry})") from error
        height, width = size = self._index.picture_sizes[index]
        if (_divisor(image, size) or math.inf) > (1 if least_short_side == math.inf else max(REDUCTIONS)):
            raise ValueError(
                f"{path} ({entry}) is {image.shape[1]}×{image.shape[0]} pixels, but was {width}×{height} when the data were "
                "opened; restore it"
            )
        return image

    def ground_truth(self) -> CocoDict:
        """The annotations as a COCO dictionary for pycocotools: the file's own boxes, so that its AP is that of the file.

        Boxes that reach out of their image are as written, those without area are in it; only boxes with NaN or infinity are not.
        Segmentations are left out. A missing or impossible 'area' is width·height. Annotation ids are shifted to begin at 1 if the
        file's begin lower: pycocotools treats a match with annotation 0 as no match, which would silently cost AP. Images and
        categories whose ids are no whole numbers are numbered (`with_own_ids` leads back).
        """
        index, boxes = self._index, self._index.file_xywh
        shift = max(0, 1 - int(index.annotation_ids.min())) if len(index.annotation_ids) else 0
        with np.errstate(over="ignore", invalid="ignore"):
            areas = np.where(np.isnan(index.areas), boxes[:, 2] * boxes[:, 3], index.areas)
        usable = np.flatnonzero(np.isfinite(np.column_stack([boxes, areas])[index.order]).all(axis=1))
        annotations = [
            coco_annotation(
                int(index.annotation_ids[row]) + shift,
                int(index.image_ids[index.positions[row]]),
                index.categories[index.labels[row]].id,
                boxes[row].tolist(),
                area=float(areas[row]),
                crowd=bool(index.crowd[row]),
            )
            for row in index.order[usable].tolist()
        ]
        return {
            "info": {},
            "licenses": [],
            "images": [
                {"id": image_id, "file_name": name, "width": width, "height": height}
                for image_id, name, (height, width) in zip(
                    index.image_ids.tolist(), self.file_names, self.sizes.tolist(), strict=True
                )
            ],
            "annotations": annotations,
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }

    def annotation_table(self) -> AnnotationTable:
        """All annotations as arrays; boxes are the file's own, as in `ground_truth`."""
        index = self._index
        return AnnotationTable(
            images=index.positions,
            labels=index.labels,
            checked=index.checked,
            crowd=index.crowd,
            ids=index.annotation_ids,
            sizes=index.sizes,
            image_ids=index.image_ids,
            file_names=index.names,
        )

    def with_own_ids(self, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """COCO results (or annotations) with the ids of images and categories as the annotation file writes them."""
        index = self._index
        images = {number: index.own_image_id(place) for place, number in enumerate(index.image_ids.tolist())}
        categories = index.own_category_ids
        return [
            {**result, "image_id": images[result["image_id"]], "category_id": categories[result["category_id"]]}
            for result in results
        ]


def _divisor(image: UInt8Array, size: IntArray) -> int | None:
    """What the sides of a picture of this height and width were divided by, and rounded up, when it was decoded."""
    return next((divisor for divisor in REDUCTIONS if (-(-size // divisor) == image.shape[:2]).all()), None)


def require_same_categories(
    one: tuple[Category, ...], other: tuple[Category, ...], names: tuple[str, str] = ("training", "validation")
) -> None:
    """Raise ValueError unless both data sets have the same categories (ids and names): labels would differ in meaning."""
    if one != other:
        only_one = sorted(f"{c.id}:{c.name}" for c in set(one) - set(other))
        only_other = sorted(f"{c.id}:{c.name}" for c in set(other) - set(one))
        raise ValueError(
            f"the {names[0]} and the {names[1]} annotations must have the same categories (id and name); only in "
            f"{names[0]}: {only_one}, only in {names[1]}: {only_other}; give both files the same 'categories' list"
        )
