"""COCO metrics on cases with known answers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from smca.gpu.evaluation.coco import CocoMetrics, evaluate_detections

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def truth(*boxes: tuple[int, int, tuple[float, float, float, float]], images: int = 2, **extra: Any) -> dict[str, Any]:
    """A COCO structure with the annotations (image id, category id, x y w h)."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, images + 1)],
        "categories": CATEGORIES,
        "annotations": [
            {
                "id": n,
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                **extra,
            }
            for n, (image, category, box) in enumerate(boxes)  # ids from 0: COCOeval takes a match with id 0 for none
        ],
    }


def detection(
    image: int, category: int, box: tuple[float, float, float, float], score: float = 0.9, **extra: Any
) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score, **extra}


BOX = (100.0, 100.0, 50.0, 50.0)  # 2,500 px²: COCO's "medium"
OTHER = (300.0, 200.0, 120.0, 120.0)  # 14,400 px²: "large"


def test_perfect_detections_score_one() -> None:
    metrics = evaluate_detections(truth((1, 3, BOX), (2, 7, OTHER)), [detection(1, 3, BOX), detection(2, 7, OTHER)])
    for name in ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_medium", "ar_large"):
        assert getattr(metrics, name) == pytest.approx(1.0), name
    assert math.isnan(metrics.ap_small)
    assert metrics.per_class == {"cat": pytest.approx((1.0, 1.0)), "dog": pytest.approx((1.0, 1.0))}


def test_shifted_detection_passes_only_the_thresholds_that_it_reaches() -> None:
    # Shifted by 10 of 50: IoU = 40/60 = 0.667, which passes 0.50, 0.55, 0.60 and 0.65: 4 of 10 thresholds.
    metrics = evaluate_detections(truth((1, 3, BOX)), [detection(1, 3, (110.0, 100.0, 50.0, 50.0))])
    assert metrics.ap == pytest.approx(0.4)
    assert [metrics.ap50, metrics.ap75] == pytest.approx([1.0, 0.0])


def test_hand_worked_precision_recall() -> None:
    """Two objects, three detections by falling score: right, wrong, right.

    Precision after each: 1, 1/2, 2/3; recall: 1/2, 1/2, 1. Interpolated precision is 1 up to recall ½ (51 of COCO's 101
    recall points, 0.00 … 0.50) and 2/3 beyond (50 points): AP = (51 + 50·2/3) / 101.
    """
    ground_truth = truth((1, 3, BOX), (2, 3, BOX))
    detections = [detection(1, 3, BOX, 0.9), detection(1, 3, OTHER, 0.8), detection(2, 3, BOX, 0.7)]
    expected = (51 + 50 * 2 / 3) / 101
    metrics = evaluate_detections(ground_truth, detections)
    assert metrics.ap == pytest.approx(expected)
    assert metrics.ap50 == pytest.approx(expected)
    assert metrics.ar100 == pytest.approx(1.0)
    assert metrics.per_class["cat"] == pytest.approx((expected, expected))
    assert math.isnan(metrics.per_class["dog"][0])
    assert math.isnan(metrics.per_class["dog"][1])


def test_only_one_detection_an_image_counts_in_ar1() -> None:
    far = (400.0, 50.0, 50.0, 50.0)
    metrics = evaluate_detections(
        truth((1, 3, BOX), (1, 3, far)), [detection(1, 3, BOX, 0.9), detection(1, 3, far, 0.8)]
    )
    assert [metrics.ar1, metrics.ar10] == pytest.approx([0.5, 1.0])


def test_duplicate_detection_is_a_false_positive() -> None:
    ground_truth = truth((1, 3, BOX), (2, 3, BOX))
    detections = [detection(1, 3, BOX, 0.9), detection(1, 3, BOX, 0.8), detection(2, 3, BOX, 0.7)]
    assert evaluate_detections(ground_truth, detections).ap == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_crowd_region_is_not_a_false_positive() -> None:
    ground_truth = truth((1, 3, BOX), (2, 3, BOX))
    inside_crowd = detection(1, 3, (320.0, 220.0, 40.0, 40.0), 0.95)  # the highest score: it would cost most
    detections = [inside_crowd, detection(1, 3, BOX, 0.9), detection(2, 3, BOX, 0.8)]
    assert evaluate_detections(ground_truth, detections).ap < 0.99
    crowd = {"id": 99, "image_id": 1, "category_id": 3, "bbox": list(OTHER), "area": 14400.0, "iscrowd": 1}
    ground_truth["annotations"].append(crowd)
    metrics = evaluate_detections(ground_truth, detections)
    assert (metrics.ap, metrics.ar100) == pytest.approx((1.0, 1.0))


def test_classes_are_scored_apart() -> None:
    metrics = evaluate_detections(
        truth((1, 3, BOX), (1, 7, OTHER)), [detection(1, 3, BOX), detection(1, 3, OTHER, 0.1)]
    )
    assert metrics.per_class == {"cat": pytest.approx((1.0, 1.0)), "dog": (0.0, 0.0)}
    assert metrics.ap == pytest.approx(0.5)


def test_no_detections() -> None:
    metrics = evaluate_detections(truth((1, 3, BOX)), [])
    assert (metrics.ap, metrics.ap50, metrics.ar100) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("detections", [[], [detection(1, 3, BOX)]])
def test_no_ground_truth_objects(detections: list[dict[str, Any]]) -> None:
    metrics = evaluate_detections(truth(), detections)
    assert math.isnan(metrics.ap)
    assert set(metrics.per_class) == {"cat", "dog"}
    assert metrics.as_dict()["ap"] is None


def test_no_images_and_nothing_but_crowds() -> None:
    assert math.isnan(evaluate_detections(truth(images=0), []).ap)
    assert math.isnan(evaluate_detections(truth((1, 3, BOX), iscrowd=1), [detection(1, 3, BOX)]).ap)


def test_area_and_iscrowd_may_be_missing() -> None:
    ground_truth = truth((1, 3, BOX))
    for annotation in ground_truth["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert evaluate_detections(ground_truth, [detection(1, 3, BOX)]).ap_medium == pytest.approx(1.0)


def test_inputs_stay_as_they_were_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, detections = truth((1, 3, BOX)), [detection(1, 3, BOX, extra="kept")]
    before = copy.deepcopy((ground_truth, detections))
    evaluate_detections(ground_truth, detections)
    assert (ground_truth, detections) == before
    assert capsys.readouterr().out == ""


def test_categories_of_one_name_stay_apart() -> None:
    ground_truth = truth((1, 3, BOX)) | {"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}]}
    assert list(evaluate_detections(ground_truth, [detection(1, 3, BOX)]).per_class) == ["cat (id 3)", "cat (id 7)"]


@pytest.mark.parametrize(
    ("detection", "message"),
    [
        (detection(9, 3, BOX), "image_id 9"),
        (detection(1, 1, BOX), "category_id 1"),
        ({"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1]}, "has no score"),
        (detection(1, 3, (0.0, 0.0, math.nan, 1.0)), "finite"),
        (detection(1, 3, BOX, math.inf), "finite"),
        ({"image_id": 1, "category_id": 3, "bbox": [0, 0, 1], "score": 1.0}, "four finite numbers"),
    ],
)
def test_wrong_detections_are_named(detection: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_detections(truth((1, 3, BOX)), [detection])


def test_wrong_ground_truth_is_named() -> None:
    with pytest.raises(ValueError, match="'annotations' is missing"):
        evaluate_detections({"images": [], "categories": []}, [])
    broken = truth((1, 3, BOX))
    del broken["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match=r"annotation 0 .* has no bbox"):
        evaluate_detections(broken, [])


def metrics_example() -> CocoMetrics:
    return evaluate_detections(truth((1, 3, BOX)), [detection(1, 3, (110.0, 100.0, 50.0, 50.0))])


def test_table_names_numbers_and_classes() -> None:
    lines = metrics_example().table().splitlines()
    assert lines[0].split()[0] == "AP"
    assert lines[0].endswith("0.400")
    assert lines[1].endswith("1.000")
    assert lines[14].split() == ["cat", "0.400", "1.000"]
    assert lines[15].split() == ["dog", "–", "–"]
    assert lines[16:] == ["", "note: 1 class has no object in these images and no part in the means: dog"]
    assert len({len(line) for line in lines[13:16]}) == 1  # columns are aligned


def test_dict_is_strict_json() -> None:
    values = json.loads(json.dumps(metrics_example().as_dict(), allow_nan=False))
    assert values["ap"] == pytest.approx(0.4)
    assert values["ap_small"] is None
    assert values["per_class"] == {
        "cat": {"ap": pytest.approx(0.4), "ap50": pytest.approx(1.0)},
        "dog": {"ap": None, "ap50": None},
    }


# What COCO's rules hide


def crowded(count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`count` objects of one class in one image, all found."""
    boxes = [(60.0 * (i % 10), 20.0 * (i // 10), 40.0, 15.0) for i in range(count)]
    return truth(*((1, 3, box) for box in boxes), (2, 7, BOX)), [
        *(detection(1, 3, box) for box in boxes),
        detection(2, 7, BOX),
    ]


def test_more_objects_than_coco_counts() -> None:
    metrics = evaluate_detections(*crowded(150))
    assert metrics.per_class["cat"][0] == pytest.approx(0.663, abs=1e-3), "COCO's own number stays"
    assert metrics.ar100 == pytest.approx((100 / 150 + 1) / 2)
    (note,) = metrics.notes
    assert note == (
        "1 image has more than 100 objects of a class, 150 at most, and COCO counts 100 detections per image and class: the others "
        "are missed by rule. With as many as there are objects, AP is 1.000"
    )
    assert evaluate_detections(*crowded(100)).notes == ()


def test_boxes_beyond_the_border_and_without_area() -> None:
    ground_truth = truth(
        (1, 3, BOX), (1, 3, (-4.0, 10.0, 50.0, 50.0)), (2, 7, (600.0, 10.0, 40.4, 50.0)), (2, 7, (9.0, 9.0, 0.0, 5.0))
    )
    metrics = evaluate_detections(ground_truth, [detection(1, 3, BOX)])
    assert [note.split(";")[0] for note in metrics.notes[:1]] == ["1 box of the ground truth reaches beyond the image"]
    assert metrics.notes[1] == "1 object has no area: nobody can find them, and COCO counts them"


def test_an_image_with_two_such_classes_is_one_image() -> None:
    ground_truth, _ = crowded(110)
    ground_truth["annotations"] += [
        {**a, "id": 500 + a["id"], "category_id": 7} for a in ground_truth["annotations"] if a["category_id"] == 3
    ]
    (note,) = evaluate_detections(ground_truth, []).notes
    assert note.startswith("1 image has more than 100 objects of a class, 110 at most")


def test_regions_of_crowds_are_no_objects() -> None:
    ground_truth = truth((1, 3, BOX), (1, 7, OTHER))
    boxes = [[-40.0, 10.0, 50.0, 50.0], [9.0, 9.0, 0.0, 5.0], *([*BOX] for _ in range(101))]
    ground_truth["annotations"] += [
        {"id": 900 + i, "image_id": 1, "category_id": 3, "bbox": box, "area": 1.0, "iscrowd": 1}
        for i, box in enumerate(boxes)
    ]
    assert evaluate_detections(ground_truth, []).notes == ()


@pytest.mark.parametrize("change", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}])
def test_images_of_unknown_size_end_nowhere(change: dict[str, Any]) -> None:
    ground_truth = truth((1, 3, (620.0, 10.0, 50.0, 50.0)), (2, 7, OTHER))
    assert len(evaluate_detections(ground_truth, []).notes) == 1
    ground_truth["images"] = [{"id": image["id"], **change} for image in ground_truth["images"]]
    assert evaluate_detections(ground_truth, []).notes == ()


def test_classes_without_objects_are_counted_and_some_are_named() -> None:
    ground_truth = truth((1, 3, BOX))
    ground_truth["categories"] = [{"id": i, "name": f"c{i}"} for i in range(1, 10)]
    (note,) = evaluate_detections(ground_truth, []).notes
    assert note == ("8 classes have no object in these images and no part in the means: c1, c2, c4, c5, c6, …")


def test_nothing_hidden_nothing_said() -> None:
    assert evaluate_detections(truth((1, 3, BOX), (2, 7, OTHER)), []).notes == ()
    assert evaluate_detections(truth(), []).notes == ()


def pycocotools_numbers(ground_truth: dict[str, Any], found: list[dict[str, Any]]) -> tuple[list[float], Any]:
    """The twelve, −1 where there is none, and the precision by class."""
    coco = COCO()
    coco.dataset = copy.deepcopy(ground_truth)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist(), evaluation.eval["precision"][:, :, :, 0, 2].mean((0, 1))


@given(
    seed=st.integers(0, 2**32 - 1),
    objects=st.sampled_from([1, 3, 20, 130, 330]),
    images=st.lists(st.integers(-5, 2**40), min_size=1, max_size=4, unique=True),
    scores=st.sampled_from([1, 3, 1_000_000]),
    crowds=st.sampled_from([0.0, 0.1, 0.6]),
    near=st.sampled_from([0.0, 4.0, 30.0]),
    copies=st.sampled_from([0, 1, 2]),
)
@example(seed=5, objects=15, images=[1, 2, 3], scores=1_000_000, crowds=0.1, near=4.0, copies=1)
@example(seed=130, objects=390, images=[1, 2, 3], scores=1_000_000, crowds=0.1, near=4.0, copies=1)
@example(seed=0, objects=330, images=[0], scores=1, crowds=0.0, near=0.0, copies=1)
@settings(max_examples=60, deadline=None)
def test_the_numbers_are_pycocotools_own(
    seed: int, objects: int, images: list[int], scores: int, crowds: float, near: float, copies: int
) -> None:
    """To 1e-12: with crowds, objects beyond the border, without area, or whose area is not their box's, equal scores, and more than
    100 objects and detections of a class in an image."""
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-30, 400, (objects, 4)) * [1, 1, 0.5, 0.5]
    annotations = [
        {
            "id": number,
            "image_id": images[rng.integers(len(images))],
            "category_id": int(rng.choice([3, 7])),
            "bbox": box.tolist(),
            "area": float(box[2] * box[3] * rng.choice([1.0, 1.0, 0.3])),
            "iscrowd": int(rng.random() < crowds),
        }
        for number, box in enumerate(boxes, start=1)
    ]
    sizes = {"width": 640, "height": 480}
    categories = [*CATEGORIES, {"id": 90, "name": "found, and never there"}]
    ground_truth = {
        "images": [{"id": i, **sizes} for i in images],
        "categories": categories,
        "annotations": annotations,
    }
    found = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"] if rng.random() < 0.9 else int(rng.choice([3, 7, 90])),
            "bbox": (np.array(a["bbox"]) + rng.normal(0, near, 4)).tolist(),
            "score": float(rng.integers(1, scores + 1) / scores),
        }
        for a in annotations * copies
    ]
    if not found:  # pycocotools cannot read an empty list
        found = [{"image_id": images[0], "category_id": 90, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5}]
    expected, by_class = pycocotools_numbers(ground_truth, found)
    metrics = evaluate_detections(ground_truth, found)
    ours = [getattr(metrics, field.name) for field in dataclasses.fields(CocoMetrics)[:12]]
    assert [-1.0 if math.isnan(value) else value for value in ours] == pytest.approx(expected, abs=1e-12)
    assert [-1.0 if math.isnan(ap) else ap for ap, _ in metrics.per_class.values()] == pytest.approx(
        by_class, abs=1e-12
    )
