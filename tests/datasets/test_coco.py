"""CocoDetection: what it serves, what it drops and counts, and an error for every kind of bad input."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_folder import HEIGHT, WIDTH, content, open_with, write
from smca.datasets import Category, CocoDetection, find_split, require_same_categories

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"


# What it serves


def test_samples_labels_and_order(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    dataset = CocoDetection(images, annotations)
    assert dataset.categories == (Category(7, "ant"), Category(21, "bee"), Category(90, "zebra"))
    assert len(dataset) == 3
    samples = [dataset[i] for i in range(3)]
    assert [s.image_id for s in samples] == [70, 9, 12]
    assert [s.labels.tolist() for s in samples] == [[0], [2, 1], []]
    assert samples[0].boxes_xyxy.tolist() == [[5.5, 6.5, 12.5, 14.5]]
    assert samples[1].boxes_xyxy.tolist() == [[1, 2, 11, 22], [30, 10, 35, 15]]
    assert samples[2].boxes_xyxy.shape == (0, 4)
    for s, name in zip(samples, ("b.png", "a.png", "sub/c.png"), strict=True):
        np.testing.assert_array_equal(s.image, np.asarray(Image.open(images / name)))
        assert s.original_size == (HEIGHT, WIDTH)
        assert s.labels.dtype == np.int64
        assert s.boxes_xyxy.dtype == np.float64
    assert (dataset.report.images, dataset.report.boxes, dataset.report.crowds) == (3, 3, 1)
    assert (dataset.report.empty_images, dataset.report.degenerate, dataset.report.clipped) == (1, 0, 0)
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"from 0 to 2, got {index}"):
            dataset[index]


def test_ground_truth_has_crowds_areas_and_the_files_own_ids(tmp_path: Path) -> None:
    gt = CocoDetection(*write(tmp_path, content())).ground_truth()
    by_id = {a["id"]: a for a in gt["annotations"]}
    assert sorted(by_id) == [3, 5, 6, 8]
    assert by_id[5] == {"id": 5, "image_id": 9, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0}
    assert by_id[3]["area"] == 30.5
    assert (by_id[8]["iscrowd"], by_id[8]["area"]) == (1, 1000)
    assert gt["categories"] == [{"id": 7, "name": "ant"}, {"id": 21, "name": "bee"}, {"id": 90, "name": "zebra"}]
    assert [i["id"] for i in gt["images"]] == [70, 9, 12]
    assert "info" in gt
    json.dumps(gt)  # plain Python numbers


def evaluate(gt: dict[str, Any], results: list[dict[str, Any]]) -> float:
    truth = COCO()
    truth.dataset = copy.deepcopy(gt)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def as_results(gt: dict[str, Any]) -> list[dict[str, Any]]:
    fields = ("image_id", "category_id", "bbox")
    return [{**{f: a[f] for f in fields}, "score": 0.9} for a in gt["annotations"] if not a["iscrowd"]]


def test_perfect_results_score_one_with_pycocotools(tmp_path: Path) -> None:
    gt = CocoDetection(*write(tmp_path, content())).ground_truth()
    results = as_results(gt)
    # Inside the crowd region of its class a detection is no false one. The box is far from any other.
    results.append({"image_id": 9, "category_id": 7, "bbox": [40, 20, 9, 9], "score": 0.99})
    assert evaluate(gt, results) == pytest.approx(1.0)
    results[-1]["category_id"] = 21
    assert evaluate(gt, results) < 0.9


def test_annotation_ids_from_zero_do_not_cost_ap(tmp_path: Path) -> None:
    """pycocotools takes a match with annotation 0 for none; exports that count from 0 are common."""

    def from_zero(data: dict[str, Any]) -> None:
        for number, annotation in enumerate(data["annotations"]):
            annotation["id"] = number

    dataset = open_with(tmp_path, from_zero)
    gt = dataset.ground_truth()
    assert sorted(a["id"] for a in gt["annotations"]) == [1, 2, 3, 4]
    assert evaluate(gt, as_results(gt)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bbox",
    [
        [5, 5, 0, 0],
        [5, 5, 0, 9],
        [5, 5, 9, 0],
        [5, 5, -3, 4],
        [5, 5, math.nan, 4],
        [math.inf, 5, 3, 4],
        [5, 5, 10**400, 4],
        [5, 5, 1e-7, 4],  # no side left as a float32 fraction of the image
    ],
    ids=lambda bbox: str(bbox)[:30],
)
def test_degenerate_boxes_are_dropped_and_counted(tmp_path: Path, bbox: list[float]) -> None:
    dataset = open_with(tmp_path, lambda d: d["annotations"][0].update(bbox=bbox))
    assert dataset.report.degenerate == 1
    assert dataset.report.boxes == 2
    assert dataset[1].labels.tolist() == [1]
    # pycocotools counts a box without area, as an object that nobody can find; it can do nothing with NaN.
    evaluated = [3, 5, 6, 8] if all(abs(v) < 10**300 for v in bbox) else [3, 6, 8]
    assert sorted(a["id"] for a in dataset.ground_truth()["annotations"]) == evaluated
    assert "dropped 1 degenerate" in str(dataset.report)
    assert "annotation 5 of a.png" in str(dataset.report)
    assert dataset.report.unused_classes == ("zebra",)


@pytest.mark.parametrize(
    ("bbox", "expected", "clipped"),
    [
        ([-5, -6, 20, 20], [0, 0, 15, 14], 1),
        ([50, 30, 20, 20], [50, 30, 60, 40], 1),
        ([-5, -5, 100, 100], [0, 0, 60, 40], 1),
        ([10, 10, 50.3, 30.4], [10, 10, 60, 40], 0),  # within rounding: not worth a word
        ([10, 10, 50, 30], [10, 10, 60, 40], 0),
    ],
)
def test_boxes_reaching_out_are_clipped(tmp_path: Path, bbox: list[float], expected: list[float], clipped: int) -> None:
    dataset = open_with(tmp_path, lambda d: d["annotations"][0].update(bbox=bbox, area=bbox[2] * bbox[3]))
    assert dataset[1].boxes_xyxy[0].tolist() == expected
    assert (dataset.report.clipped, dataset.report.boxes) == (clipped, 3)
    truth = next(a for a in dataset.ground_truth()["annotations"] if a["id"] == 5)
    assert truth["bbox"] == bbox, "the evaluation is that of the file as it is"
    assert truth["area"] == bbox[2] * bbox[3]


@pytest.mark.parametrize("bbox", [[60, 5, 5, 5], [-9, 5, 9, 5], [5, 41, 5, 5], [5, -30, 5, 10]], ids=str)
def test_boxes_wholly_outside_are_dropped(tmp_path: Path, bbox: list[float]) -> None:
    dataset = open_with(tmp_path, lambda d: d["annotations"][0].update(bbox=bbox))
    assert (dataset.report.outside, dataset.report.boxes, dataset.report.clipped) == (1, 2, 0)
    assert "outside the image" in str(dataset.report)
    assert len(dataset.ground_truth()["annotations"]) == 4


def test_a_class_of_crowd_regions_only_is_reported_as_unused(tmp_path: Path) -> None:
    dataset = open_with(tmp_path, lambda d: d["annotations"][0].update(iscrowd=1))
    assert dataset.report.unused_classes == ("zebra",)
    assert "no box of zebra" in str(dataset.report)


@pytest.mark.parametrize("area", [None, 0, -4, math.nan, 10**400, "large", True])
def test_an_impossible_area_becomes_that_of_the_box(tmp_path: Path, area: object) -> None:
    dataset = open_with(tmp_path, lambda d: d["annotations"][1].update(area=area))
    assert next(a for a in dataset.ground_truth()["annotations"] if a["id"] == 3)["area"] == 56


def test_a_data_set_without_any_annotation_opens(tmp_path: Path) -> None:
    dataset = open_with(tmp_path, lambda d: d.update(annotations=[]))
    assert dataset[0].boxes_xyxy.shape == (0, 4)
    assert dataset.report.empty_images == 3
    assert dataset.ground_truth()["annotations"] == []


# Annotation files


def test_a_missing_annotation_file(tmp_path: Path) -> None:
    images, _ = write(tmp_path, content())
    with pytest.raises(FileNotFoundError, match=r"annotation file .*none\.json does not exist"):
        CocoDetection(images, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ('{"images": [', "is not valid JSON: .*; was the download or the export cut short"),
        ("\x00\x01", "is not valid JSON"),
        ("[]", "expected an object with 'images', 'annotations' and 'categories', got a list"),
        ('"x"', "got a str"),
        ('{"images": [], "categories": []}', "the key 'annotations' is missing"),
        ('{"images": [], "annotations": []}', "the key 'categories' is missing"),
        ('{"annotations": [], "categories": []}', "the key 'images' is missing"),
        ('{"images": {}, "annotations": [], "categories": []}', "'images' must be a list, got a dict"),
        ('{"images": [3], "annotations": [], "categories": []}', r"images\[0\] must be an object, got 3"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "'images' is empty"),
        ('{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}', "'categories' is empty"),
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
        ('{"images": [{"id": ' + "9" * 5000 + '}], "annotations": [], "categories": []}', "is not valid JSON"),
        ('{"' + "x" * 5000 + '": 1}', "the key 'images' is missing .{1,120}… *"),
    ],
    ids=lambda text: text[:30],
)
def test_a_file_that_is_no_annotation_file(tmp_path: Path, text: str, message: str) -> None:
    images, annotations = write(tmp_path, text)
    with pytest.raises(ValueError, match=rf"annotations\.json.*{message}"):
        CocoDetection(images, annotations)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    annotations.write_bytes(b"{\xff\xfe")
    with pytest.raises(ValueError, match="is not valid JSON"):
        CocoDetection(images, annotations)


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox"])
def test_an_annotation_lacks_a_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"annotations\.json: annotations\[2\].*the key '{key}' is missing"):
        open_with(tmp_path, lambda d: d["annotations"][2].pop(key))


@pytest.mark.parametrize("key", ["id", "file_name"])
def test_an_image_lacks_a_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"annotations\.json: images\[1\].*the key '{key}' is missing"):
        open_with(tmp_path, lambda d: d["images"][1].pop(key))


@pytest.mark.parametrize("key", ["id", "name"])
def test_a_category_lacks_a_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"annotations\.json: categories\[0\].*the key '{key}' is missing"):
        open_with(tmp_path, lambda d: d["categories"][0].pop(key))


@pytest.mark.parametrize(
    ("table", "entry", "change", "message"),
    [
        ("annotations", 0, {"category_id": 4}, r"\(id 5\): category_id 4 is not in 'categories' \(ids \[7, 21, 90\]\)"),
        ("annotations", 0, {"image_id": 4}, r"\(id 5\): image_id 4 is not in 'images'"),
        ("annotations", 1, {"id": 5}, r"annotations\[1\] \(id 5\): this id was used before"),
        ("images", 1, {"id": 70}, r"images\[1\]: id 70 was used before, by images\[0\]"),
        ("categories", 1, {"id": 90}, r"categories\[1\]: category id 90 was used before, by categories\[0\]"),
        ("annotations", 0, {"category_id": 90.5}, "'category_id' must be an integer or a text, got 90.5"),
        ("annotations", 0, {"category_id": "9O"}, "category_id '9O' is not in 'categories'"),
        ("annotations", 0, {"id": [1]}, r"'id' must be an integer or a text, got \[1\]"),
        ("annotations", 0, {"image_id": True}, "'image_id' must be an integer or a text, got True"),
        ("annotations", 0, {"bbox": [1, 2, 3]}, r"'bbox' must be four numbers .* got \[1, 2, 3\]"),
        ("annotations", 0, {"bbox": None}, "'bbox' must be four numbers"),
        ("annotations", 0, {"bbox": [1, 2, "three", 4]}, "'bbox' must be four numbers"),
        ("annotations", 0, {"bbox": "1 2 3"}, "'bbox' must be four numbers"),
        ("annotations", 0, {"bbox": list(range(5000))}, r"'bbox' must be four numbers .{1,120}…$"),
        ("annotations", 0, {"iscrowd": "no"}, "'iscrowd' must be 0 or 1, got 'no'"),
        ("images", 0, {"file_name": ""}, "'file_name' must be a non-empty string"),
        ("images", 0, {"width": -3}, "'width' must be an integer from 1 to 1,000,000, got -3"),
        ("images", 0, {"width": 10**30}, "'width' must be an integer from 1 to 1,000,000, got 10{30}"),
        ("images", 0, {"height": 40.5}, "'height' must be an integer from 1 to 1,000,000, got 40.5"),
        ("categories", 0, {"name": "half \ud83d"}, "'name' must be a non-empty string of whole characters"),
        ("categories", 0, {"name": [3]}, r"'name' must be a non-empty string of whole characters, got \[3\]"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, table: str, entry: int, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"annotations\.json: {table}\[{entry}\].*") as error:
        open_with(tmp_path, lambda d: d[table][entry].update(change))
    assert error.match(message)


def test_splits_must_agree_in_their_categories() -> None:
    train = (Category(1, "cat"), Category(2, "dog"))
    require_same_categories(train, (Category(1, "cat"), Category(2, "dog")))
    with pytest.raises(ValueError, match=r"only in training: \['2:dog'\], only in validation: \['3:dog'\]"):
        require_same_categories(train, (Category(1, "cat"), Category(3, "dog")))


# Real data


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD blood cells are not at ../shared/data/bccd")
@pytest.mark.parametrize(("split", "images", "boxes"), [("train", 205, 2804), ("val", 87, 1137)])
def test_bccd(split: Any, images: int, boxes: int) -> None:
    dataset = CocoDetection(*find_split(BCCD, split))
    report = dataset.report
    assert (report.images, report.boxes, report.degenerate) == (images, boxes, 1)
    assert [c.name for c in dataset.categories] == ["RBC", "WBC", "Platelets"]
    assert sum(len(dataset[i].labels) for i in range(0, images, 10)) > 0
    assert all(dataset[i].image.shape == (480, 640, 3) for i in range(0, images, 10))
    gt = dataset.ground_truth()
    assert len(gt["annotations"]) == boxes + 1, "the box without area is evaluated, as pycocotools does"
    if split == "val":
        file = json.loads(dataset.annotations_file.read_text())
        shifted = [{**r, "bbox": [r["bbox"][0] + 4, *r["bbox"][1:]]} for r in as_results(gt)]
        assert evaluate(gt, shifted) == evaluate(file, shifted) < 1
