"""All annotations of a data set as arrays: what is counted and compared without a Python object per box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from smca.datasets.batch import BoolArray, CocoDict, DetectionDataset, FloatArray, IntArray, truth_of
from smca.datasets.boxes import CheckedBoxes, check_boxes


@dataclass(frozen=True, eq=False)
class AnnotationTable:
    """One row per annotation, in any order."""

    images: IntArray
    """[rows] index of the image."""
    labels: IntArray
    """[rows] index into the data set's categories."""
    checked: CheckedBoxes
    """[rows] the boxes, and what is wrong with them."""
    crowd: BoolArray
    """[rows] whether it is a region of many objects."""
    ids: IntArray
    """[rows] the annotation's id."""
    sizes: IntArray
    """[images, 2] height and width in pixels that boxes are in."""
    image_ids: IntArray
    """[images] the image's id."""
    file_names: Sequence[str]
    """[images] empty where the data set has no files."""

    @property
    def boxes_xywh(self) -> FloatArray:
        """[rows, 4] x, y, width, height in pixels as written: perhaps beyond the image, without area, or not finite."""
        return self.checked.file_xywh

    @cached_property
    def objects(self) -> IntArray:
        """The rows that are trained on: no crowds, nothing without area or outside its image."""
        return np.flatnonzero(~(self.crowd | self.checked.degenerate | self.checked.outside))

    @cached_property
    def objects_per_image(self) -> IntArray:
        """[images] how many of those rows each image has."""
        return np.bincount(self.images[self.objects], minlength=len(self.sizes))

    def objects_per_class(self, classes: int) -> IntArray:
        """[classes] how many of those rows each class has."""
        return np.bincount(self.labels[self.objects], minlength=classes)


def table_of(dataset: DetectionDataset) -> AnnotationTable:
    """All annotations of `dataset`: from its method ``annotation_table``, or of one that has none, from its ground truth.

    Raises ValueError for a ground truth that names images or categories which it does not list.
    """
    own: Callable[[], AnnotationTable] | None = getattr(dataset, "annotation_table", None)
    return own() if own is not None else table_of_truth(truth_of(dataset))


def table_of_truth(truth: CocoDict) -> AnnotationTable:
    """All annotations of a COCO dictionary, such as ``ground_truth`` gives.

    Raises ValueError for one that names images or categories which it does not list.
    """
    position = {image["id"]: index for index, image in enumerate(truth["images"])}
    label_of = {category["id"]: label for label, category in enumerate(truth["categories"])}
    annotations = truth["annotations"]
    try:
        images = np.array([position[a["image_id"]] for a in annotations], dtype=np.int64)
        labels = np.array([label_of[a["category_id"]] for a in annotations], dtype=np.int64)
    except KeyError as error:
        raise ValueError(
            f"an annotation of the ground truth names {error}, an image or a category that it does not list"
        ) from error
    boxes_xywh = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([(i.get("height") or 0, i.get("width") or 0) for i in truth["images"]], dtype=np.int64)
    if not sizes.all():  # pycocotools needs no sizes: an image is then as large as its boxes reach
        ends = np.nan_to_num(boxes_xywh[:, :2] + boxes_xywh[:, 2:], nan=1.0, posinf=1.0)[:, ::-1]
        reach = np.ones(sizes.shape)
        np.maximum.at(reach, images, ends)
        sizes = np.where(sizes > 0, sizes, np.ceil(reach).astype(np.int64))
    sizes = sizes.reshape(-1, 2)
    return AnnotationTable(
        images=images,
        labels=labels,
        checked=check_boxes(boxes_xywh, sizes[images, ::-1].astype(np.float64)),
        crowd=np.array([bool(a.get("iscrowd")) for a in annotations], dtype=np.bool_),
        ids=np.array([a.get("id", row) for row, a in enumerate(annotations)], dtype=np.int64),
        sizes=sizes,
        image_ids=np.array(list(position), dtype=np.int64),
        file_names=[str(image.get("file_name") or "") for image in truth["images"]],
    )
