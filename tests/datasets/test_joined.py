"""Several folders as one data set."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coco_folder
from smca.datasets import CocoDetection, Joined, SyntheticShapes
from smca.datasets.table import table_of


def test_images_and_annotations_of_all_parts_under_new_ids(tmp_path: Path) -> None:
    first = CocoDetection(*coco_folder.write(tmp_path / "first", coco_folder.content()))
    second = coco_folder.open_with(tmp_path / "second", lambda data: data["images"].pop())  # c.png, which has no box
    joined = Joined([first, second])
    assert len(joined) == 5
    samples = [joined[index] for index in range(5)]
    for sample, of_part in zip(samples, [*(first[i] for i in range(3)), *(second[i] for i in range(2))], strict=True):
        np.testing.assert_array_equal(sample.image, of_part.image)
        np.testing.assert_array_equal(sample.boxes_xyxy, of_part.boxes_xyxy)
        assert (sample.labels.tolist(), sample.original_size) == (of_part.labels.tolist(), of_part.original_size)
    assert [sample.image_id for sample in samples] == [1, 2, 3, 4, 5]
    truth = joined.ground_truth()
    assert [image["id"] for image in truth["images"]] == [1, 2, 3, 4, 5]
    assert sorted(annotation["id"] for annotation in truth["annotations"]) == list(range(1, 9))
    assert truth["categories"] == first.ground_truth()["categories"]
    for sample in samples:
        boxes = [a["bbox"][:2] for a in truth["annotations"] if a["image_id"] == sample.image_id and not a["iscrowd"]]
        assert boxes == sample.boxes_xyxy[:, :2].tolist()
    table = table_of(joined)
    assert table.objects_per_image.tolist() == [1, 2, 0, 1, 2]
    boxes = [
        box
        for image in truth["images"]
        for box in [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]]
    ]
    assert sorted(table.boxes_xywh.tolist()) == sorted(boxes)
    assert (table.crowd.sum(), len(table.ids), len(table.sizes), table.file_names[3]) == (2, 8, 5, "b.png")
    report = joined.report
    assert (report.images, report.boxes, report.classes, report.empty_images, report.crowds) == (5, 6, 3, 1, 2)
    assert report.frame == "upright"
    assert joined.digest != first.digest
    assert joined.digest != Joined([second, first]).digest
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"from 0 to 4, got {index}"):
            joined[index]


def test_a_class_is_unused_if_no_part_uses_it(tmp_path: Path) -> None:
    def without(label: int) -> Any:
        def change(data: dict[str, Any]) -> None:
            data["annotations"] = [a for a in data["annotations"] if a["category_id"] not in (label, 7)]

        return change

    parts = [coco_folder.open_with(tmp_path / str(label), without(label)) for label in (90, 21)]
    assert [part.report.unused_classes for part in parts] == [("ant", "zebra"), ("ant", "bee")]
    assert Joined(parts).report == dataclasses.replace(Joined(parts).report, unused_classes=("ant",))


def test_parts_have_the_same_categories(tmp_path: Path) -> None:
    first = CocoDetection(*coco_folder.write(tmp_path / "first", coco_folder.content()))
    with pytest.raises(ValueError, match=r"first and the further annotations .* only in first: .*'7:ant'"):
        Joined([first, SyntheticShapes(2)])
