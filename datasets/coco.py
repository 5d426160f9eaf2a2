"""`CocoDetection`: a folder of images and an annotation file in COCO's format, checked once when it is opened.

The constructor finds every fault of the annotation file, every missing image and every file that is no picture of the size it
should have, before a training run has spent an hour; the pixels themselves are checked when they are read. A fault that only the
user can fix raises an error that names file and entry. What has one sane answer (a box without area, a box reaching out of its
image, an id written as text) is handled, counted and shown in `report`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smca.datasets.batch import BoolArray, Category, CocoDict, FloatArray, Report, Sample, UInt8Array, coco_annotation
from smca.datasets.boxes import CheckedBoxes, boxes_in_pixels, check_boxes, require_xywh
from smca.datasets.cache import ImageCache
from smca.datasets.coco_file import CocoFile, read_coco_file
from smca.datasets.file_names import find_images
from smca.datasets.frame import decide_frame, read_headers
from smca.datasets.images import Frame, Header, read_image
from smca.datasets.options import AnnotationOptions
from smca.datasets.settings import shown
from smca.datasets.table import AnnotationTable

_EXAMPLES = 3


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
        file = read_coco_file(self.annotations_file)
        self.file_names, corrected, links = find_images(self.images_dir, file.file_names, self.annotations_file)
        headers = read_headers(self.images_dir, self.file_names, self.annotations_file)
        crowd = _crowd(file, options, self.annotations_file)
        self.frame, self.sizes, boxes = _boxes(file, headers, options, self.file_names, self.annotations_file)
        self._picture_sizes = [header.size(self.frame) for header in headers]
        self._file, self._boxes, self._crowd = file, boxes, crowd
        self._trained: BoolArray = ~(crowd | boxes.degenerate | boxes.outside)
        turned = sum(header.is_turned for header in headers)
        self._cache = ImageCache(self._picture_sizes) if cache else None
        self._report = self._make_report(corrected, links, turned)

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes sorted by id; a label is an index into this tuple."""
        return self._file.categories

    @property
    def report(self) -> Report:
        """What was found, corrected, dropped and clipped."""
        return self._report

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes once every image has been read; 0 without a cache."""
        return self._cache.nbytes if self._cache is not None else 0

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> Sample:
        """The image [H, W, 3] uint8 with its boxes in pixels; crowd regions are left out.

        Raises IndexError beyond the end; ValueError if the image cannot be decoded or has changed its size since the data were
        opened; FileNotFoundError if it has been removed since.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"expected an image index from 0 to {len(self) - 1}, got {index}")
        image = self._cache.get(index) if self._cache is not None else None
        if image is None:
            image = self._read(index)
            if self._cache is not None:
                image = self._cache.put(index, image)
        rows = self._file.rows_of(index)
        kept = rows[self._trained[rows]]
        boxes_xyxy, (height, width) = self._boxes.clipped_xyxy[kept], self.sizes[index]
        if image.shape[:2] != (height, width):  # resized after it was annotated
            boxes_xyxy = boxes_xyxy * np.tile([image.shape[1] / width, image.shape[0] / height], 2)
        return Sample(
            image=image,
            boxes_xyxy=boxes_xyxy,
            labels=self._file.labels[kept],
            image_id=self._file.image_ids[index],
            original_size=self.sizes[index],
        )

    def _read(self, index: int) -> UInt8Array:
        path = self.images_dir / self.file_names[index]
        entry = f"image {shown(self._file.own_image_ids[index])} of {self.annotations_file}"
        try:
            image = read_image(path, self.frame)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} ({entry}) existed when the data were opened, but is gone; restore it"
            ) from None
        except ValueError as error:
            raise ValueError(f"{error}, or remove its entry ({entry})") from error
        height, width = self._picture_sizes[index]
        if image.shape[:2] != (height, width):
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
        file, boxes = self._file, self._boxes.file_xywh
        shift = max(0, 1 - int(file.annotation_ids.min())) if len(file.annotation_ids) else 0
        with np.errstate(over="ignore", invalid="ignore"):
            areas = np.where(np.isnan(file.areas), boxes[:, 2] * boxes[:, 3], file.areas)
        usable = np.flatnonzero(np.isfinite(np.column_stack([boxes, areas])[file.order]).all(axis=1))
        annotations = [
            coco_annotation(
                int(file.annotation_ids[row]) + shift,
                file.image_ids[file.positions[row]],
                file.categories[file.labels[row]].id,
                boxes[row].tolist(),
                area=float(areas[row]),
                crowd=bool(self._crowd[row]),
            )
            for row in file.order[usable].tolist()
        ]
        return {
            "info": {},
            "licenses": [],
            "images": [
                {"id": image_id, "file_name": name, "width": width, "height": height}
                for image_id, name, (height, width) in zip(file.image_ids, self.file_names, self.sizes, strict=True)
            ],
            "annotations": annotations,
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }

    def annotation_table(self) -> AnnotationTable:
        """All annotations as arrays; boxes are the file's own, as in `ground_truth`."""
        file = self._file
        return AnnotationTable(
            images=file.positions,
            labels=file.labels,
            checked=self._boxes,
            crowd=self._crowd,
            ids=file.annotation_ids,
            sizes=np.array(self.sizes, dtype=np.int64).reshape(-1, 2),
            image_ids=np.array(file.image_ids, dtype=np.int64),
            file_names=self.file_names,
        )

    def with_own_ids(self, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """COCO results (or annotations) with the ids of images and categories as the annotation file writes them."""
        images = dict(zip(self._file.image_ids, self._file.own_image_ids, strict=True))
        categories = self._file.own_category_ids
        return [
            {**result, "image_id": images[result["image_id"]], "category_id": categories[result["category_id"]]}
            for result in results
        ]

    def _make_report(self, corrected: int, links: int, turned: int) -> Report:
        file, boxes, trained = self._file, self._boxes, self._trained
        used = np.bincount(file.labels[trained], minlength=len(file.categories))
        with_boxes = np.unique(file.positions[trained])
        dropped = np.flatnonzero(boxes.degenerate | boxes.outside)
        repairs = [f"{count:,} {what}" for what, count in file.repairs.items()]
        return Report(
            images=len(self),
            boxes=int(trained.sum()),
            classes=len(file.categories),
            empty_images=len(self) - len(with_boxes),
            crowds=int(np.count_nonzero(self._crowd & ~boxes.degenerate & ~boxes.outside)),
            degenerate=int(boxes.degenerate.sum()),
            outside=int(boxes.outside.sum()),
            clipped=int(boxes.clipped.sum()),
            turned=turned,
            frame=self.frame,
            links=links,
            resized=sum(a != b for a, b in zip(self.sizes, self._picture_sizes, strict=True)),
            uncached=self._cache.left_out if self._cache is not None else 0,
            repairs=tuple(repairs + [f"{corrected:,} file names corrected"] * bool(corrected)),
            unused_classes=tuple(c.name for c, n in zip(file.categories, used, strict=True) if n == 0),
            dropped_examples=tuple(
                f"annotation {file.annotation_ids[row]} of {self.file_names[file.positions[row]]}, "
                f"bbox {[float(f'{v:.6g}') for v in file.boxes[row]]}"
                for row in dropped[:_EXAMPLES]
            ),
        )


def require_same_categories(train: tuple[Category, ...], val: tuple[Category, ...]) -> None:
    """Raise ValueError unless both splits have the same categories (ids and names): labels would differ in meaning."""
    if train != val:
        only_train = sorted(f"{c.id}:{c.name}" for c in set(train) - set(val))
        only_val = sorted(f"{c.id}:{c.name}" for c in set(val) - set(train))
        raise ValueError(
            "the training and the validation annotations must have the same categories (id and name); only in "
            f"training: {only_train}, only in validation: {only_val}; give both files the same 'categories' list"
        )


def _boxes(
    file: CocoFile, headers: Sequence[Header], options: AnnotationOptions, names: Sequence[str], path: Path
) -> tuple[Frame, list[tuple[int, int]], CheckedBoxes]:
    """The frame of the boxes, (height, width) of the images in it, and the boxes in it."""
    # A picture's sides are needed to read fractions, and boxes in pixels to decide which side is which.
    written = [size or header.size("upright") for size, header in zip(file.sizes, headers, strict=True)]
    frame = decide_frame(
        options, headers, file, boxes_in_pixels(file.boxes, _sides(written, file), options), names, path
    )
    sizes = _annotated_sizes(file, headers, frame, options)
    sides = _sides(sizes, file)
    if options.box_format == "auto":
        require_xywh(file.boxes, sides, path)
    return frame, sizes, check_boxes(boxes_in_pixels(file.boxes, sides, options), sides)


def _annotated_sizes(
    file: CocoFile, headers: Sequence[Header], frame: Frame, options: AnnotationOptions
) -> list[tuple[int, int]]:
    """(height, width) in pixels that boxes are in: the pictures' own, unless they were resized since."""
    sizes = [header.size(frame) for header in headers]
    if options.sizes != "scaled":
        return sizes
    own = [{header.stored_size, header.size("upright")} for header in headers]
    return [
        size if written is None or written in known else written
        for size, written, known in zip(sizes, file.sizes, own, strict=True)
    ]


def _sides(sizes: Sequence[tuple[int, int]], file: CocoFile) -> FloatArray:
    """(height, width) of images → [rows, 2] width and height for each annotation."""
    return np.array([(width, height) for height, width in sizes], dtype=np.float64)[file.positions]


def _crowd(file: CocoFile, options: AnnotationOptions, path: Path) -> BoolArray:
    """[rows] whether an annotation is a region of many objects."""
    if options.crowd == "objects":
        return np.zeros_like(file.crowd)
    if options.crowd == "auto" and len(file.crowd) and file.crowd.all():
        raise ValueError(
            f'{path}: all {len(file.crowd):,} annotations have "iscrowd": 1, which marks regions of many objects that nobody '
            "annotated one by one, so that there would be nothing to train on or to find. Exports of brushes and masks set it on "
            "every object: if these are objects, --annotations.crowd objects; if they are regions indeed, --annotations.crowd "
            "regions"
        )
    return file.crowd
