"""Thresholds of best F1, precision-recall curves and confusions: on cases with known answers, and as pycocotools has them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from smca.gpu.evaluation.coco import evaluate_detections
from smca.gpu.evaluation.operating_point import (
    OperatingPoint,
    confusion_matrix,
    operating_points,
    operating_report,
    thresholds_of,
)
from smca.gpu.pictures import operating_point as pictures
from smca.gpu.pictures.operating_point import draw_confusion, draw_precision_recall

CATS_AND_DOGS = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]  # not in the order of ids
CAT, DOG = 3, 7
A, B, C = (100.0, 100.0, 50.0, 50.0), (300.0, 200.0, 120.0, 120.0), (10.0, 10.0, 20.0, 20.0)
Box = tuple[float, float, float, float]


def truth(*entries: tuple[int, int, Box], crowds: tuple[tuple[int, int, Box], ...] = ()) -> dict[str, Any]:
    """Two images, with the objects and crowd regions (image id, category id, x y w h)."""
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in (1, 2)],
        "categories": CATS_AND_DOGS,
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": int(n >= len(entries))}
            for n, (image, category, box) in enumerate((*entries, *crowds))
        ],
    }


def detection(image: int, category: int, box: Box, score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def cats(*scored: tuple[float, Box]) -> list[dict[str, Any]]:
    """Detections of cats in image 1."""
    return [detection(1, CAT, box, score) for score, box in scored]


TWO_CATS = truth((1, CAT, A), (1, CAT, B))


def best_of_cats(ground_truth: dict[str, Any], detections: list[dict[str, Any]]) -> OperatingPoint:
    point = operating_points(ground_truth, detections)[CAT]
    assert point is not None
    return point


# Thresholds


def test_the_threshold_of_best_f1_worked_by_hand() -> None:
    """Right, wrong, right, wrong of two objects. F1 from each score on: 2/3, 2/4, 4/5, 4/6."""
    found = cats((0.9, A), (0.8, C), (0.7, B), (0.2, C))
    point = best_of_cats(TWO_CATS, found)
    assert (point.precision, point.recall, point.f1) == pytest.approx((2 / 3, 1.0, 0.8))
    assert point.threshold == pytest.approx(0.45), "midway between the last that is kept and the next"
    assert operating_points(TWO_CATS, found)[DOG] is None


def test_of_equal_f1_the_higher_threshold_is_taken() -> None:
    """One right of one: 2/(1 + 2). Two right of four: 4/(4 + 2), the same."""
    point = best_of_cats(TWO_CATS, cats((0.9, A), (0.8, C), (0.7, C), (0.6, B)))
    assert point.f1 == pytest.approx(2 / 3)
    assert point.threshold == pytest.approx(0.85)


def test_detections_of_one_score_are_kept_together() -> None:
    """The right one alone would give 2/(1 + 1)."""
    point = best_of_cats(truth((1, CAT, A)), cats((0.5, A), (0.5, C), (0.5, B), (0.1, C)))
    assert (point.threshold, point.precision, point.f1) == pytest.approx((0.3, 1 / 3, 0.5))


def test_the_threshold_where_nothing_or_next_to_nothing_is_between() -> None:
    assert best_of_cats(TWO_CATS, cats((0.5, A))).threshold == 0.25, "nothing is below: midway to 0"
    next_above = math.nextafter(0.5, 1)
    assert (0.5 + next_above) / 2 == 0.5, "rounded to the lower one"
    assert best_of_cats(truth((1, CAT, A)), cats((next_above, A), (0.5, C))).threshold == next_above
    assert best_of_cats(truth((1, CAT, A)), cats((0.0, A))).threshold == 0.0


def test_a_class_without_a_threshold() -> None:
    both = truth((1, CAT, A), (1, DOG, B))
    assert operating_points(both, [detection(1, DOG, C, 0.9)]) == {CAT: None, DOG: None}, "no detection; no right one"
    assert operating_points(truth((1, CAT, A)), [detection(1, DOG, A, 0.9)]) == {CAT: None, DOG: None}, "no object"
    assert operating_points(both, []) == {CAT: None, DOG: None}
    assert operating_points({"images": [], "categories": CATS_AND_DOGS, "annotations": []}, []) == {
        CAT: None,
        DOG: None,
    }


def test_detections_on_crowds_and_beyond_a_hundred_do_not_count() -> None:
    on_crowd = detection(1, CAT, (320.0, 220.0, 40.0, 40.0), 0.95)
    crowd = truth((1, CAT, A), crowds=((1, CAT, B),))
    assert best_of_cats(crowd, [on_crowd, *cats((0.9, A))]) == OperatingPoint(0.45, 1.0, 1.0, 1.0)
    assert best_of_cats(truth((1, CAT, A)), [on_crowd, *cats((0.9, A))]).precision == 0.5
    late = cats(*((0.5 + i / 1000, C) for i in range(100)), (0.4, A))
    assert operating_points(truth((1, CAT, A)), late)[CAT] is None, "COCO counts a hundred per image and class"
    point = best_of_cats(truth((1, CAT, A)), [*late[1:], detection(1, CAT, C, 0.3)])
    assert (point.threshold, point.precision) == (0.2, 0.01), "the one of 0.3 does not count"


def test_thresholds_are_in_the_models_order() -> None:
    points = operating_points(truth((1, DOG, A)), [detection(1, DOG, A, 0.5)])
    assert thresholds_of(points, (7, 3)) == (0.25, None)
    assert thresholds_of(points, (3, 7)) == (None, 0.25)


# Confusion


def test_a_confusion_matrix_worked_by_hand() -> None:
    ground_truth = truth((1, CAT, A), (1, DOG, B), (2, CAT, A), (2, DOG, C), crowds=((2, DOG, B),))
    found = [
        detection(1, CAT, A, 0.9),  # right
        detection(1, DOG, A, 0.95),  # takes that cat before: so the one above is on nothing
        detection(1, DOG, B, 0.3),  # below the threshold of dogs: B is missed
        detection(2, CAT, A, 0.6),  # right
        detection(2, CAT, (300.0, 20.0, 50.0, 50.0), 0.6),  # on nothing
        detection(2, CAT, (310.0, 210.0, 40.0, 40.0), 0.6),  # on the crowd, which is one of dogs
    ]
    counts = confusion_matrix(ground_truth, found, {CAT: 0.6, DOG: 0.4})
    #                           cat dog missed
    assert counts.tolist() == [[1, 1, 0], [0, 0, 2], [2, 0, 0]]


def test_confusion_needs_half_an_overlap_and_knows_no_limit_of_detections() -> None:
    half = (100.0, 100.0, 25.0, 50.0)  # IoU ½ with A
    less = (100.0, 100.0, 24.0, 50.0)
    everything = {CAT: 0.0, DOG: 0.0}
    assert confusion_matrix(truth((1, CAT, A)), [detection(1, DOG, half, 0.5)], everything)[0].tolist() == [0, 1, 0]
    assert confusion_matrix(truth((1, CAT, A)), [detection(1, DOG, less, 0.5)], everything)[0].tolist() == [0, 0, 1]
    many = [*(detection(1, DOG, C, 0.9) for _ in range(150)), detection(1, CAT, A, 0.1)]
    assert confusion_matrix(truth((1, CAT, A)), many, everything).tolist() == [[1, 0, 0], [0, 0, 0], [0, 150, 0]]


def test_confusion_of_nothing_and_of_wrong_detections() -> None:
    empty = {"images": [], "categories": [], "annotations": []}
    assert confusion_matrix(empty, [], {}).tolist() == [[0]]
    assert confusion_matrix(TWO_CATS, [], {}).tolist() == [[0, 0, 2], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="category_id 9"):
        confusion_matrix(TWO_CATS, [detection(1, 9, A, 0.5)], {})


# The report


def report_example() -> Any:
    ground_truth = truth((1, CAT, A), (1, CAT, B), (2, CAT, A))
    return operating_report(
        ground_truth, [*cats((0.9, A), (0.2, C)), detection(1, DOG, B, 0.4), detection(2, DOG, B, 0.3)]
    )


def test_the_table_says_which_errors_are_made() -> None:
    lines = report_example().table().splitlines()
    assert " ".join(lines[2].split()) == "class score precision recall F1 objects right missed taken for"
    assert " ".join(lines[3].split()) == "cat 0.550 1.000 0.333 0.500 3 1 1 dog 1"
    assert " ".join(lines[4].split()) == "dog – – – – 0 0 0", (
        "from 0.35 on: one is found where a cat is, none elsewhere"
    )
    assert lines[5] == "background"
    assert lines[7] == "–: no object found, so that its detections count from 0.35 on"
    assert lines[3].index("dog") == lines[2].index("taken for")
    assert lines[3].index("0.550") + 5 == lines[4].index("–") + 1, "columns are aligned"


def test_the_report_is_strict_json() -> None:
    values = json.loads(json.dumps(report_example().as_dict(), allow_nan=False))
    assert values["thresholds"] == {
        "cat": {"threshold": pytest.approx(0.55), "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": 0.5},
        "dog": None,
    }
    curves = values["precision_recall"]
    assert curves["recall"] == pytest.approx(np.linspace(0, 1, 101))
    assert curves["precision"]["0.50"] == {"cat": [1.0] * 34 + [0.0] * 67, "dog": None}
    assert curves["precision"].keys() == {"0.50", "0.75"}
    assert values["confusion"] == {
        "true": ["cat", "dog", "background"],
        "detected": ["cat", "dog", "missed"],
        "counts": [[1, 1, 1], [0, 0, 0], [0, 0, 0]],
    }


@pytest.mark.parametrize("classes", [0, 1, 3, 25])
def test_pictures_of_any_number_of_classes(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_IN_MATRIX", 20)
    names = [f"class {k}" for k in range(classes)]
    names[:2] = ["$кошка_", "a name that is far longer than what fits beside a picture"][:classes]
    ground_truth = truth() | {"categories": [{"id": k, "name": name} for k, name in enumerate(names)]}
    ground_truth["annotations"] = [
        {"id": k, "image_id": 1, "category_id": k, "bbox": [20.0 * (k % 30), 20.0 * (k // 30), 15.0, 15.0]}
        for k in range(classes)
        if k % 5 < 4
    ]
    found = [
        detection(1, (k + (k == 2)) % classes, (20.0 * (k % 30), 20.0 * (k // 30), 15.0, 15.0), 0.3 + 0.5 * k / classes)
        for k in range(classes)
        if k % 7
    ]
    report = operating_report(ground_truth, found)
    for draw in (draw_precision_recall, draw_confusion):
        draw(report, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert min(picture.size) >= 600
            assert max(picture.size) <= 3000
            assert picture.convert("L").getextrema() == (0, 255)
    counts, shown = pictures._confusion_of_most(report)
    assert len(counts) == len(shown) + 1 == min(classes, 21) + 1
    assert counts.sum() == report.confusion.sum()
    if classes == 25:
        assert shown[-2:] == ["class 23", "5 others"], "those without objects"


# As pycocotools has it


def pycocotools(ground_truth: dict[str, Any], found: list[dict[str, Any]], iou: float, **params: Any) -> COCOeval:
    coco = COCO()
    coco.dataset = copy.deepcopy(ground_truth)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def best_by_trying(evaluation: COCOeval, category: int) -> OperatingPoint | None:
    """The best F1 of all scores that occur."""
    objects, counted = 0, []
    for image in (entry for entry in evaluation.evalImgs if entry is not None and entry["category_id"] == category):
        objects += int((~np.array(image["gtIgnore"], bool)).sum())
        matched, ignored = image["dtMatches"][0] > 0, image["dtIgnore"][0].astype(bool)
        counted += [(s, bool(m)) for s, m, i in zip(image["dtScores"], matched, ignored, strict=True) if not i]
    best = None
    scores = sorted({score for score, _ in counted}, reverse=True)
    for score, below in itertools.pairwise([*scores, 0.0]):
        kept = [right for s, right in counted if s >= score]
        precision, recall = sum(kept) / len(kept), sum(kept) / max(1, objects)
        f1 = 2 * precision * recall / (precision + recall) if any(kept) else 0.0
        if f1 > (best.f1 + 1e-12 if best else 0.0):
            best = OperatingPoint((score + below) / 2, precision, recall, f1)
    return best


def random_case(
    seed: int, objects: int, images: list[int], scores: int, crowds: float, near: float, copies: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """With crowds, equal scores, more than 100 objects of a class in an image, one class that is found and never there, and
    one that is neither."""
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(1, 400, (objects, 4)) * [1, 1, 0.5, 0.5]
    ground_truth = {
        "images": [{"id": i, "width": 640, "height": 480} for i in images],
        "categories": [*CATS_AND_DOGS, {"id": 90, "name": "found, and never there"}, {"id": 91, "name": "neither"}],
        "annotations": [
            {
                "id": number,
                "image_id": images[rng.integers(len(images))],
                "category_id": int(rng.choice([CAT, DOG])),
                "bbox": box.tolist(),
                "area": float(box[2] * box[3]),
                "iscrowd": int(rng.random() < crowds),
            }
            for number, box in enumerate(boxes, start=1)
        ],
    }
    found = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"] if rng.random() < 0.8 else int(rng.choice([CAT, DOG, 90])),
            "bbox": (np.array(a["bbox"]) + rng.normal(0, near, 4)).clip(0.5).tolist(),
            "score": float(rng.integers(1, scores + 1) / scores),
        }
        for a in ground_truth["annotations"] * copies
    ]
    # pycocotools cannot read an empty list.
    return ground_truth, found or [detection(images[0], 90, C, 0.5)]


@given(
    seed=st.integers(0, 2**32 - 1),
    objects=st.sampled_from([1, 3, 20, 60]),
    images=st.lists(st.integers(1, 2**40), min_size=1, max_size=3, unique=True),
    scores=st.sampled_from([1, 3, 1_000_000]),
    crowds=st.sampled_from([0.0, 0.1, 0.6]),
    near=st.sampled_from([0.0, 6.0, 30.0]),
    copies=st.sampled_from([0, 1, 2]),
)
@example(seed=5, objects=20, images=[1, 2, 3], scores=1_000_000, crowds=0.1, near=6.0, copies=2)
@example(seed=1, objects=330, images=[1], scores=1_000_000, crowds=0.1, near=1.0, copies=1)
@example(seed=3, objects=60, images=[1, 2], scores=3, crowds=0.6, near=6.0, copies=2)
@settings(max_examples=40, deadline=None)
def test_all_numbers_are_those_of_pycocotools(
    seed: int, objects: int, images: list[int], scores: int, crowds: float, near: float, copies: int
) -> None:
    ground_truth, found = random_case(seed, objects, images, scores, crowds, near, copies)
    report = operating_report(ground_truth, found)
    ids = sorted(c["id"] for c in ground_truth["categories"])
    expected = pycocotools(ground_truth, found, 0.5)
    for category, point in zip(ids, report.points, strict=True):
        best = best_by_trying(expected, category)
        assert (point is None) == (best is None)
        if point is not None and best is not None:
            assert dataclasses.astuple(point) == pytest.approx(dataclasses.astuple(best), abs=1e-12)
    for iou, curves in report.precisions.items():
        ours = np.where(np.isnan(curves), -1, curves)
        assert ours == pytest.approx(
            pycocotools(ground_truth, found, iou).eval["precision"][0, :, :, 0, 0].T, abs=1e-12
        )
    ap50 = evaluate_detections(ground_truth, found).per_class
    assert [curve.mean() for curve in report.precisions[0.5]] == pytest.approx(
        [ap for _, ap in ap50.values()], nan_ok=True
    )

    thresholds = dict.fromkeys(ids, float(np.median([d["score"] for d in found])))
    counts = confusion_matrix(ground_truth, found, thresholds)
    kept = [d for d in found if d["score"] >= thresholds[CAT]]
    matching = pycocotools(ground_truth, kept, 0.5, useCats=0, maxDets=[10_000])
    assert counts.tolist() == confusion_from(matching, ids).tolist()


def confusion_from(evaluation: COCOeval, ids: list[int]) -> Any:
    counts = np.zeros((len(ids) + 1, len(ids) + 1), dtype=np.int64)
    truth_of, found_of = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    for image in (entry for entry in evaluation.evalImgs if entry is not None):
        for number, match, ignored in zip(image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True):
            if not ignored:
                row = ids.index(truth_of[match]["category_id"]) if match else -1
                counts[row, ids.index(found_of[number]["category_id"])] += 1
        for number, match, ignored in zip(image["gtIds"], image["gtMatches"][0], image["gtIgnore"], strict=True):
            if not ignored and not match:
                counts[ids.index(truth_of[number]["category_id"]), -1] += 1
    return counts
