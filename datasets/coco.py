"""`CocoDetection`: a folder of images and an annotation file in COCO's format, checked once when it is opened.

The constructor finds every fault of the annotation file and every missing image file, before a training run has spent an
hour; the pixels themselves are checked when they are read. A fault that only the user can fix raises an error that names
file and entry. A fault with one sane answer (a box without area, a box reaching out of its image) is handled, counted and
shown in `report`.
"""

from __future__ import annotations

import os
from pathlib import Path

from smca.datasets.batch import Category, CocoDict, Report, Sample
from smca.datasets.cache import ImageCache
from smca.datasets.coco_file import CocoAnnotations, read_annotations
from smca.datasets.images import read_image


class CocoDetection:
    """Images with boxes from a COCO annotation file.

    Boxes are COCO's [x, y, width, height] in pixels of the image as stored: an EXIF orientation is not applied.
    Category ids may be any integers; `categories` is sorted by id and a label is an index into it.

    images_dir: the folder to which the file's `file_name` entries are relative.
    annotations_file: the JSON file.
    cache: keep decoded images in memory as they are read (`cache_bytes` in all: 3 bytes per pixel; 640×480: 0.92 MB per
        image). Worth it for a few thousand small images on a machine with few cores.

    Raises FileNotFoundError if the folder, the annotation file or images are missing, ValueError for an annotation file
    that is not in COCO's format. `dataset[i]` raises ValueError for an image that cannot be decoded or
    whose size differs from the annotation file's.
    """

    def __init__(
        self, images_dir: str | os.PathLike[str], annotations_file: str | os.PathLike[str], *, cache: bool = False
    ) -> None:
        self.images_dir = Path(images_dir)
        self.annotations_file = Path(annotations_file)
        self._annotations: CocoAnnotations = read_annotations(self.annotations_file)
        _require_images(self.images_dir, self._annotations.file_names, self.annotations_file)
        self._cache = ImageCache(self._annotations.sizes) if cache else None

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes sorted by id; a label is an index into this tuple."""
        return self._annotations.categories

    @property
    def report(self) -> Report:
        """What was found, dropped and clipped."""
        return self._annotations.report

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes once every image has been read; 0 without a cache."""
        return self._cache.nbytes if self._cache is not None else 0

    def __len__(self) -> int:
        return len(self._annotations.file_names)

    def __getitem__(self, index: int) -> Sample:
        """The image [H, W, 3] uint8 with its boxes in pixels; crowd regions are left out.

        Raises IndexError beyond the end; ValueError if the image cannot be decoded or its size is not the one in
        the annotation file; FileNotFoundError if it has been removed since.
        """
        data = self._annotations
        if not 0 <= index < len(self):
            raise IndexError(f"expected an image index from 0 to {len(self) - 1}, got {index}")
        image = self._cache.get(index) if self._cache is not None else None
        if image is None:
            path = self.images_dir / data.file_names[index]
            image = read_image(path, data.sizes[index], data.image_ids[index], self.annotations_file)
            if self._cache is not None:
                image = self._cache.put(index, image)
        rows = slice(data.starts[index], data.starts[index + 1])
        keep = ~data.crowd[rows]
        return Sample(
            image=image,
            boxes_xyxy=data.boxes_xyxy[rows][keep],
            labels=data.labels[rows][keep],
            image_id=data.image_ids[index],
            original_size=data.sizes[index],
        )

    def ground_truth(self) -> CocoDict:
        """The annotations as a COCO dictionary for pycocotools.

        Crowd regions are in it, dropped boxes are not, clipped boxes are clipped, segmentations are left out. A missing
        or impossible 'area' becomes width·height. Annotation ids are shifted to begin at 1 if the file's begin lower:
        pycocotools treats a match with annotation 0 as no match, which would silently cost AP.
        """
        return self._annotations.ground_truth()


def require_same_categories(train: tuple[Category, ...], val: tuple[Category, ...]) -> None:
    """Raise ValueError unless both splits have the same categories (ids and names): labels would differ in meaning."""
    if train != val:
        only_train = sorted(f"{c.id}:{c.name}" for c in set(train) - set(val))
        only_val = sorted(f"{c.id}:{c.name}" for c in set(val) - set(train))
        raise ValueError(
            "the training and the validation annotations must have the same categories (id and name); only in "
            f"training: {only_train}, only in validation: {only_val}; give both files the same 'categories' list"
        )


def _require_images(images_dir: Path, file_names: list[str], annotations_file: Path) -> None:
    """Check that every image file exists, with one listing per folder instead of one system call per image."""
    if not images_dir.is_dir():
        raise FileNotFoundError(
            f"the image folder {images_dir} does not exist; {annotations_file} expects {len(file_names):,} images "
            f"there, such as {file_names[0]!r}; check the path"
        )
    present: dict[Path, set[str]] = {}
    missing: list[str] = []
    for file_name in file_names:
        path = images_dir / file_name
        folder = path.parent
        if folder not in present:
            present[folder] = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        if path.name not in present[folder]:
            missing.append(file_name)
    if not missing:
        return
    expected = images_dir / missing[0]
    alike = [name for name in present[expected.parent] if name.lower() == expected.name.lower()]
    remedy = (
        f"the folder has {alike[0]!r}: correct 'file_name'" if alike else "copy them there, or remove their entries"
    )
    raise FileNotFoundError(
        f"{len(missing):,} of {len(file_names):,} images of {annotations_file} are missing in {images_dir}: "
        f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; {remedy}"
    )
