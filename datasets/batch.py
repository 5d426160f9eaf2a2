"""What flows through the data pipeline: a `Sample` per image, a `Batch` per step, and `collate` between them.

    dataset[i]  -> Sample   NumPy, boxes as x0 y0 x1 y1 in pixels    (read and augmented by the loader's workers)
    collate     -> Batch    torch, padded to common sizes, boxes as cx cy w h in 0–1 of the unpadded image

Shape letters: B images, T targets (padded), H, W height and width in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

UInt8Array = NDArray[np.uint8]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
CocoDict = dict[str, Any]

_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Category:
    """A class: the dataset's own id (any integer, as in the annotation file) and its name."""

    id: int
    name: str


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with its targets. Treat the arrays as read-only: they may be views of a dataset's cache."""

    image: UInt8Array
    """[H, W, 3] RGB."""
    boxes_xyxy: FloatArray
    """[T, 4] x0, y0, x1, y1 in pixels of `image`; x grows to the right, y downwards; (0, 0) is the corner of the
    first pixel, not its centre, so a box around one pixel has width 1."""
    labels: IntArray
    """[T] index into the dataset's `categories`, 0 to K−1."""
    image_id: int
    """The annotation file's id of this image."""
    original_size: tuple[int, int]
    """(height, width) in pixels before augmentation: of the image as its annotations see it, turned by EXIF or as stored."""
    seed: int = 0
    """Of what a network draws for this image in this epoch; 0 where nothing was drawn for it (`Augmented` gives it one)."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Ground truth of a batch, padded to the largest number of boxes in it (at least 1)."""

    labels: torch.Tensor
    """[B, T] int64; 0 where padded."""
    boxes: torch.Tensor
    """[B, T, 4] float32, cx cy w h in 0–1 of the unpadded image; 0 where padded."""
    valid: torch.Tensor
    """[B, T] bool; False where padded."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return Targets(
            *(t.to(device, non_blocking=non_blocking) for t in (self.labels, self.boxes, self.valid)),
        )

    def pin_memory(self) -> Targets:
        return Targets(self.labels.pin_memory(), self.boxes.pin_memory(), self.valid.pin_memory())


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step, zero-padded at the right and at the bottom to a common size, with their targets."""

    images: torch.Tensor
    """[B, 3, H, W] uint8 RGB, channels-last in memory; the model scales and normalises."""
    padding_mask: torch.Tensor
    """[B, H, W] bool; True where padded."""
    targets: Targets
    image_ids: torch.Tensor
    """[B] int64."""
    original_sizes: torch.Tensor
    """[B, 2] int64 (height, width) before augmentation."""
    seeds: torch.Tensor
    """[B] int64, of what a network draws for each image."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.padding_mask.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.image_ids.to(device, non_blocking=non_blocking),
            self.original_sizes.to(device, non_blocking=non_blocking),
            self.seeds.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Called by `torch.utils.data.DataLoader(pin_memory=True)`."""
        return Batch(
            self.images.pin_memory(),
            self.padding_mask.pin_memory(),
            self.targets.pin_memory(),
            self.image_ids.pin_memory(),
            self.original_sizes.pin_memory(),
            self.seeds.pin_memory(),
        )


@dataclass(frozen=True)
class Report:
    """What a dataset found while it was opened; `str(report)` is one line for the log."""

    images: int
    """Images in the dataset."""
    boxes: int
    """Boxes used for training."""
    classes: int
    """Classes, used or not."""
    empty_images: int = 0
    """Images without a box to train on (kept: they teach the model what background looks like)."""
    crowds: int = 0
    """Crowd regions: ignored in training, honoured by the evaluation."""
    degenerate: int = 0
    """Boxes without area or with a coordinate that is not a finite number: dropped."""
    outside: int = 0
    """Boxes wholly outside their image: dropped."""
    clipped: int = 0
    """Boxes that reached out of their image by more than rounding: cut at the border and kept."""
    turned: int = 0
    """Images whose EXIF orientation turns them for viewing."""
    frame: str = "upright"
    """What boxes refer to in those: the picture as viewers show it ("upright") or as it is stored."""
    resized: int = 0
    """Images of another size than the annotation file says, whose boxes are scaled."""
    links: int = 0
    """Images that are symbolic links."""
    uncached: int = 0
    """Images that the cache has no room for: read from their file whenever they are needed."""
    repairs: tuple[str, ...] = ()
    """What the annotation file writes otherwise than COCO's format has it, with counts, in words."""
    unused_classes: tuple[str, ...] = ()
    """Names of classes without a single box."""
    dropped_examples: tuple[str, ...] = ()
    """The first few dropped annotations, in words."""
    unkept: str = ""
    """Why the index of a large annotation file could not be kept for later starts."""

    def __str__(self) -> str:
        parts = [
            f"{self.images:,} images ({self.empty_images:,} empty)",
            f"{self.boxes:,} boxes of {self.classes} classes",
        ]
        if self.crowds:
            parts.append(f"{self.crowds:,} crowd regions")
        if self.degenerate:
            parts.append(f"dropped {self.degenerate:,} degenerate")
        if self.outside:
            parts.append(f"dropped {self.outside:,} outside the image")
        if self.clipped:
            parts.append(f"clipped {self.clipped:,} at the border")
        if self.turned:
            frame = "the pictures as viewers show them" if self.frame == "upright" else "the pictures as stored"
            parts.append(f"{self.turned:,} with an EXIF orientation: boxes refer to {frame}")
        if self.resized:
            parts.append(f"{self.resized:,} resized since they were annotated: boxes scaled")
        parts += self.repairs
        if self.links:
            parts.append(
                "1 image is a symbolic link" if self.links == 1 else f"{self.links:,} images are symbolic links"
            )
        if self.uncached:
            parts.append(f"no room in the cache for {self.uncached:,} images")
        if self.dropped_examples:
            parts.append("dropped: " + "; ".join(self.dropped_examples))
        if self.unused_classes:
            shown = ", ".join(self.unused_classes[:_CLASSES_SHOWN])
            parts.append(f"no box of {shown}" + ", …" * (len(self.unused_classes) > _CLASSES_SHOWN))
        if self.unkept:
            parts.append(self.unkept)
        return " · ".join(parts)


def digest_of(parts: Sequence[Any]) -> str:
    """Of arrays, texts and plain values."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def coco_annotation(
    annotation_id: int,
    image_id: int,
    category_id: int,
    bbox: Sequence[float],
    *,
    area: float | None = None,
    crowd: bool = False,
) -> dict[str, Any]:
    """An entry of a COCO dictionary's "annotations". bbox: x, y, width, height in pixels; area: theirs unless given, in pixels²."""
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        "area": bbox[2] * bbox[3] if area is None else area,
        "iscrowd": int(crowd),
    }


class DetectionDataset(Protocol):
    """What a trainer and an evaluation need of a dataset; `CocoDetection`, `SyntheticShapes` and `Augmented` provide it.

    A class of your own that inherits from this one needs `categories`, `__len__` and `__getitem__` (docs/extending.md). The others
    are then derived from its samples. Each reads every image once: write your own `ground_truth` where that takes long.
    """

    @property
    def categories(self) -> tuple[Category, ...]:
        """Sorted by id; a label is an index into this tuple."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def read(self, index: int, least_short_side: float) -> Sample:
        """``self[index]``, whose image may be smaller if its shorter side keeps `least_short_side` pixels; for datasets in which
        that is faster."""
        return self[index]

    @property
    def report(self) -> Report:
        """What the dataset found while it was opened."""
        truth = truth_of(self)
        with_boxes = {annotation["image_id"] for annotation in truth["annotations"]}
        return Report(len(self), len(truth["annotations"]), len(self.categories), len(self) - len(with_boxes))

    @property
    def digest(self) -> str:
        """What tells these data from others: of images, classes and boxes."""
        truth = truth_of(self)
        rows = [(a["image_id"], a["category_id"], *a["bbox"], a["iscrowd"]) for a in truth["annotations"]]
        images = [(image["id"], image.get("file_name")) for image in truth["images"]]
        return digest_of([images, [astuple(c) for c in self.categories], np.array(rows, dtype=np.float64)])

    def ground_truth(self) -> CocoDict:
        """A COCO dictionary (info, images, annotations, categories) that pycocotools takes as it is.

        Raises:
            ValueError: a label that is no index into `categories`, or an image id that occurs twice.
        """
        images: dict[int, dict[str, Any]] = {}
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            sample = self[index]
            height, width = sample.original_size
            if sample.image_id in images:
                raise ValueError(f"sample {index}: image_id {sample.image_id} occurs twice; every image needs its own")
            images[sample.image_id] = {"id": sample.image_id, "width": width, "height": height}
            rows, columns = sample.image.shape[:2]
            boxes = sample.boxes_xyxy * [width / columns, height / rows, width / columns, height / rows]
            for (x0, y0, x1, y1), label in zip(boxes.tolist(), sample.labels.tolist(), strict=True):
                if not 0 <= label < len(self.categories):
                    raise ValueError(
                        f"sample {index}: label {label} is not an index into the {len(self.categories)} categories"
                    )
                category_id = self.categories[label].id
                bbox = [x0, y0, x1 - x0, y1 - y0]
                annotations.append(coco_annotation(len(annotations) + 1, sample.image_id, category_id, bbox))
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"info": {}, "images": list(images.values()), "annotations": annotations, "categories": categories}


def truth_of(dataset: DetectionDataset) -> CocoDict:
    """Its ground truth, for which it may have to read every image: once."""
    known = vars(dataset)
    if "_ground_truth" not in known:
        known["_ground_truth"] = dataset.ground_truth()
    truth: CocoDict = known["_ground_truth"]
    return truth


def collate(samples: Sequence[Sample], size_divisor: int = 1, target_divisor: int = 1) -> Batch:
    """Pad images and targets of `samples` to common sizes.

    Height and width become the largest in the batch, rounded up to a multiple of `size_divisor`; the number of targets
    becomes the largest in the batch, at least 1, rounded up to a multiple of `target_divisor`. Divisors above 1 give
    fewer different shapes.

    Raises ValueError for an empty list and for a divisor below 1.
    """
    if not samples:
        raise ValueError("collate: expected at least one sample, got an empty list; check the sampler's batches")
    for name, divisor in (("size_divisor", size_divisor), ("target_divisor", target_divisor)):
        if divisor < 1:
            raise ValueError(f"collate: expected {name} ≥ 1, got {divisor}; 1 rounds nothing up")
    count = len(samples)
    sizes_B2 = [sample.image.shape[:2] for sample in samples]
    height, width = (-(-max(sides) // size_divisor) * size_divisor for sides in zip(*sizes_B2, strict=True))
    max_targets = max(1, *(len(sample.labels) for sample in samples))
    max_targets = -(-max_targets // target_divisor) * target_divisor

    # Written as [B, H, W, 3] and handed on as a permuted view: the rows are copied once, and the result is
    # channels-last, which convolutions on CPUs and tensor cores prefer.
    images_BHWC = np.zeros((count, height, width, 3), dtype=np.uint8)
    padding_mask_BHW = np.ones((count, height, width), dtype=np.bool_)
    labels_BT = np.zeros((count, max_targets), dtype=np.int64)
    boxes_BT4 = np.zeros((count, max_targets, 4), dtype=np.float32)
    valid_BT = np.zeros((count, max_targets), dtype=np.bool_)
    for b, sample in enumerate(samples):
        h, w = sample.image.shape[:2]
        images_BHWC[b, :h, :w] = sample.image
        padding_mask_BHW[b, :h, :w] = False
        t = len(sample.labels)
        labels_BT[b, :t] = sample.labels
        x0, y0, x1, y1 = sample.boxes_xyxy.reshape(-1, 4).T
        boxes_BT4[b, :t] = np.stack([(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h], axis=-1)
        valid_BT[b, :t] = True

    return Batch(
        images=torch.from_numpy(images_BHWC).permute(0, 3, 1, 2),
        padding_mask=torch.from_numpy(padding_mask_BHW),
        targets=Targets(torch.from_numpy(labels_BT), torch.from_numpy(boxes_BT4), torch.from_numpy(valid_BT)),
        image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
        seeds=torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
    )
