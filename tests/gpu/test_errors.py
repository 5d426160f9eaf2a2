"""The cause that the report names is the one that was made, and what it costs is what AP gains without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from explained_photo import PHOTO, model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from smca.datasets import Category, DetectionDataset, Sample
from smca.gpu.evaluation import evaluate_detections
from smca.gpu.evaluation.boxes import coverage, ious
from smca.gpu.evaluation.errors import _Classes, find_errors, without
from smca.gpu.evaluation.image_errors import FALSE, MISSED, Error, Found, ImageErrors, Objects
from smca.gpu.model.encoded import EncodedImage
from smca.gpu.model.explanation import Explanation
from smca.gpu.model.intervention import Change
from smca.gpu.pictures.errors import draw_errors

OBJECT = (40.0, 40.0, 60.0, 60.0)
"""A missed object of class 0 in an image of 100 × 100 pixels."""
AWAY = (5.0, 5.0, 15.0, 15.0)
LOW = (0.1, 0.05)
SURE = (0.9, 0.05)


@dataclass
class Query:
    """What one query says and where it looks, from the first layer to the last."""

    boxes: Sequence[tuple[float, ...]] = (OBJECT, OBJECT)
    scores: Sequence[tuple[float, ...]] = (LOW, LOW)
    center: tuple[float, float] = (50.0, 50.0)
    sigma: float = 4.0
    level_weights: tuple[float, ...] = (0.5, 0.5)


@dataclass
class Photograph:
    """Stands for an ``EncodedImage``: queries as they are told, and answers to changes as they are told."""

    queries: Sequence[Query]
    answers: Callable[[Change], tuple[tuple[float, ...], tuple[float, ...]] | None] = lambda change: None
    asked: list[Change] = field(default_factory=list)
    can_place: bool = True
    image_size: tuple[int, int] = (100, 100)

    @property
    def model(self) -> Any:
        return SimpleNamespace(config=SimpleNamespace(num_queries=len(self.queries)))

    def explain(self, *, queries: Any, maps: bool) -> Explanation:
        layers, count = len(self.queries[0].boxes), len(self.queries)
        shape = (layers, count, 1, 2, 2)
        centers = np.array([query.center for query in self.queries])[None, :, None, None]
        sigmas = np.array([query.sigma for query in self.queries])[None, :, None, None, None]
        weights = np.array([query.level_weights for query in self.queries])
        return Explanation(
            image_size=self.image_size,
            cell_sizes_xy=np.array([[8.0, 8.0], [16.0, 16.0]]),
            queries=np.arange(count),
            scores=np.array([query.scores for query in self.queries]).swapaxes(0, 1),
            boxes_xyxy=np.array([query.boxes for query in self.queries]).swapaxes(0, 1),
            level_weights=np.broadcast_to(weights, (layers, count, 2)),
            attention=[],
            attention_without_prior=[],
            references_xy=np.broadcast_to(centers[:, :, 0, 0], (layers, count, 2)),
            centers_xy=np.broadcast_to(centers, shape),
            sigmas_xy=np.broadcast_to(sigmas, shape),
        )

    def placed(self, where: tuple[float, float, float], skip: Sequence[int] = ()) -> Change:
        x, y, radius = where
        first = min(n for n in range(len(self.queries)) if n not in skip)
        return Change(first, box_cxcywh=(x / 100, y / 100, radius / 50, radius / 50))

    def decode(self, changes: Sequence[Change]) -> Any:
        self.asked += changes
        why = self.explain(queries=None, maps=False)
        scores = torch.from_numpy(np.stack([why.scores] * len(changes)))
        boxes = torch.from_numpy(np.stack([why.boxes_xyxy] * len(changes)))
        for row, change in enumerate(changes):
            answer = self.answers(change)
            if answer is not None:
                boxes[row, -1, change.query] = torch.tensor(answer[0], dtype=boxes.dtype)
                scores[row, -1, change.query] = torch.tensor(answer[1], dtype=scores.dtype)
        return SimpleNamespace(scores=scores, boxes_xyxy=boxes)


def errors_of(*of: Any) -> list[Error]:
    """Those of ``image_of``."""
    return image_of(*of).errors()


def image_of(
    photograph: Photograph,
    objects: Sequence[tuple[tuple[float, ...], int]] = ((OBJECT, 0),),
    crowds: Sequence[tuple[float, ...]] = (),
) -> ImageErrors:
    """With thresholds of 0.5, all pairs of query and class being detections."""
    why = photograph.explain(queries=None, maps=False)
    scores, boxes = why.scores[-1], why.boxes_xyxy[-1]
    order = np.argsort(-scores.ravel(), kind="stable")
    query, label = np.divmod(order, scores.shape[1])
    found = Found(scores.ravel()[order], label, boxes[query], query)
    truth = Objects(
        np.arange(len(objects)) + 7,
        np.array([box for box, _ in objects]).reshape(-1, 4),
        np.array([label for _, label in objects], dtype=np.int64),
        np.array(crowds).reshape(-1, 4),
        np.zeros(len(crowds), dtype=np.int64),
    )
    return ImageErrors(3, cast(EncodedImage, photograph), truth, found, np.array([0.5, 0.5]))


def only(errors: list[Error]) -> Error:
    assert len(errors) == 1, errors
    return errors[0]


def test_nothing_is_said_of_what_is_right() -> None:
    assert errors_of(Photograph([Query(scores=(LOW, SURE)), Query((AWAY, AWAY))])) == []
    on_crowd = Query((AWAY, AWAY), (SURE, SURE))
    assert errors_of(Photograph([on_crowd]), [], [(0.0, 0.0, 30.0, 30.0)]) == []


MISSES: dict[str, tuple[Photograph, str]] = {
    "uncovered": (
        Photograph([Query((AWAY, AWAY), center=(10, 10))], lambda c: (OBJECT, SURE) if c.box_cxcywh else None),
        "in the first layer no query's Gaussians are worth more than 0.00 in its middle; "
        "a query placed on it finds it (score 0.90, overlap 1.00)",
    ),
    "width": (
        Photograph([Query(sigma=0.1)], lambda c: (OBJECT, SURE) if c.sigma_factor == 8 else None),
        "its Gaussians are 0.005 of the object's side wide; 8 times as wide, it finds it (score 0.90, overlap 1.00)",
    ),
    "level": (
        Photograph(
            [Query(level_weights=(1.0, 0.0))], lambda c: (OBJECT, SURE) if c.level_weights == (0.0, 1.0) else None
        ),
        "with levels weighed 0.00, 1.00, it finds it (score 0.90, overlap 1.00)",
    ),
    "lost": (Photograph([Query(scores=(SURE, LOW))]), "after layer 1 query 0 scores 0.90, in the end 0.10"),
    "score": (
        Photograph([Query(), Query((AWAY, AWAY))], lambda c: (OBJECT, SURE) if c.without == (1,) else None),
        "the class scores 0.10, the threshold is 0.50; without the other queries it finds it (score 0.90, overlap 1.00)",
    ),
    "unboxed": (
        Photograph([Query(((40.0, 40.0, 60.0, 48.0),) * 2)]),
        "its best box overlaps it by 0.40; a query placed on it does not find it (score 0.10, overlap 0.40)",
    ),
}


@pytest.mark.parametrize("cause", MISSES)
def test_the_cause_of_a_miss(cause: str) -> None:
    photograph, evidence = MISSES[cause]
    error = only(errors_of(photograph))
    assert (error.kind, error.cause, error.evidence) == ("missed", cause, evidence)
    assert (error.image_id, error.label, error.box_xyxy, error.annotation, error.query) == (3, 0, OBJECT, 7, 0)
    assert error.query_box_xyxy == photograph.queries[0].boxes[-1]
    assert (error.query_label, error.query_score) == (0, pytest.approx(0.1))
    assert cause in MISSED


def test_what_an_intervention_does_not_mend_is_not_its_cause() -> None:
    for query in (Query(sigma=0.1), Query(level_weights=(1.0, 0.0))):
        photograph = Photograph([query], lambda c: (OBJECT, (0.4, 0.0)))
        assert only(errors_of(photograph)).cause == "score"
        assert any(change.sigma_factor != 1 or change.level_weights for change in photograph.asked)
    usual = Photograph([Query()], lambda c: (OBJECT, SURE) if c.sigma_factor != 1 or c.level_weights else None)
    assert only(errors_of(usual)).cause == "score", "usual widths, and levels that are read, are not to blame"


def test_an_object_without_area_is_nobodys_miss() -> None:
    error = only(errors_of(Photograph([Query((AWAY, AWAY))]), [((40.0, 40.0, 40.0, 60.0), 0)]))
    assert (error.cause, error.query) == ("flat", None)


def test_another_class_and_a_loose_box_are_a_miss_and_a_false_box() -> None:
    false, missed = errors_of(Photograph([Query(scores=(LOW, (0.2, 0.8)))]))
    assert (false.kind, false.cause, false.label, false.score, false.annotation) == ("false", "class", 1, 0.8, 7)
    assert false.evidence == "overlaps it by 1.00; its own class scores 0.20"
    assert (missed.cause, missed.label, missed.detection) == ("class", 0, false.detection)
    loose = (40.0, 40.0, 60.0, 48.0)
    false, missed = errors_of(Photograph([Query((loose, loose), (LOW, SURE))]))
    assert (false.cause, missed.cause, false.evidence) == ("loose", "loose", "overlaps it by 0.40")


def test_duplicates() -> None:
    best, second = Query(scores=(LOW, SURE)), Query(scores=(LOW, (0.6, 0.0)))
    error = only(errors_of(Photograph([best, second])))
    assert (error.cause, error.query, error.annotation) == ("duplicate", 1, 7)
    assert error.evidence == "overlaps it by 1.00; query 0 found it already"
    error = only(errors_of(Photograph([Query(scores=(LOW, (0.9, 0.6)))])))
    assert error.evidence == "overlaps it by 1.00; the same query found it already"
    beside = Query(((55.0, 40.0, 75.0, 60.0),) * 2, (LOW, (0.6, 0.0)))  # overlaps it by 0.14
    moved = Photograph([best, beside], lambda c: (OBJECT, SURE) if c.without == (0,) else None)
    error = only(errors_of(moved))
    assert (error.cause, error.evidence) == (
        "duplicate",
        "without query 0, which found it, this one does (overlap 1.00)",
    )
    assert only(errors_of(Photograph([best, beside]))).cause == "background"


def test_an_unlabelled_object_is_what_several_queries_see_over_several_layers() -> None:
    found, steady, other = (
        Query(scores=(LOW, SURE)),
        Query((AWAY, AWAY), (SURE, SURE)),
        Query((OBJECT, AWAY), (SURE, LOW)),
    )
    queries, placed = [found, steady, other, other, other], (AWAY, (0.36, 0.0))  # over 0.7 of the threshold

    def seen_by(*witnesses: int) -> Callable[[Change], Any]:
        return lambda change: placed if change.box_cxcywh and change.query in witnesses else None

    def with_layers(photograph: Photograph) -> Photograph:
        """What a witness says is the same in both layers."""
        decode = photograph.decode

        def same(changes: Sequence[Change]) -> Any:
            outcome = decode(changes)
            for row, change in enumerate(changes):
                for values in (outcome.scores, outcome.boxes_xyxy):
                    values[row, 0, change.query] = values[row, -1, change.query]
            return outcome

        photograph.decode = same  # type: ignore[method-assign]
        return photograph

    error = only(errors_of(with_layers(Photograph(queries, seen_by(2, 3)))))
    assert (error.cause, error.query) == ("unlabelled", 1)
    assert error.evidence == (
        "it overlaps no object by more than 0.00; 2 of 2 layers score it above the threshold; of 3 other queries that are placed "
        "there 2 see it too"
    )
    asked = with_layers(Photograph(queries, seen_by(2)))
    assert only(errors_of(asked)).cause == "background", "one witness is not several"
    assert [change.query for change in asked.asked] == [0, 2, 3], "not itself, and each once"
    assert only(errors_of(Photograph(queries, seen_by(2, 3)))).cause == "background", "they see it in one layer alone"
    late = replace(steady, scores=(LOW, SURE))
    assert only(errors_of(with_layers(Photograph([found, late, *queries[2:]], seen_by(2, 3))))).cause == "background"
    beside = replace(steady, boxes=((50.0, 50.0, 70.0, 70.0),) * 2)  # touches the object that was found
    photograph = with_layers(Photograph([found, beside, *queries[2:]], seen_by(2, 3)))
    assert only(errors_of(photograph)).cause == "background"
    assert not any(change.box_cxcywh for change in photograph.asked)


def test_matching_is_cocos() -> None:
    """On random boxes of one class, what is found and what is false are pycocotools' matches."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = np.concatenate([xy := rng.integers(0, 40, (12, 2)), xy + rng.integers(8, 30, (12, 2))], 1).astype(
            float
        )
        scores = rng.permutation(np.linspace(0.55, 0.95, 12))
        objects, crowds = corners[:5] + rng.integers(-3, 4, (5, 4)), corners[5:7]
        queries = [Query((tuple(box),) * 2, ((s, 0.0),) * 2) for box, s in zip(corners, scores, strict=True)]
        errors = errors_of(Photograph(queries), [(tuple(box), 0) for box in objects], [tuple(box) for box in crowds])
        truth, results = COCO(), []
        boxes = [*objects, *crowds]
        truth.dataset = {
            "images": [{"id": 1}],
            "categories": [{"id": 1}],
            "annotations": [
                {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": xywh(b), "area": 400, "iscrowd": int(n >= 5)}
                for n, b in enumerate(boxes)
            ],
        }
        truth.createIndex()
        results = [
            {"image_id": 1, "category_id": 1, "bbox": xywh(b), "score": s} for b, s in zip(corners, scores, strict=True)
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        image = next(e for e in evaluation.evalImgs if e is not None and e["aRng"] == evaluation.params.areaRng[0])
        wrong = (image["dtMatches"][0] == 0) & (image["dtIgnore"][0] == 0)
        assert {e.query for e in errors if e.kind == "false"} == {image["dtIds"][n] - 1 for n in np.flatnonzero(wrong)}
        missed = (image["gtMatches"][0] == 0) & (np.array(image["gtIgnore"]) == 0)
        assert {e.annotation - 7 for e in errors if e.kind == "missed" and e.annotation is not None} == {
            image["gtIds"][n] - 1 for n in np.flatnonzero(missed)
        }


def xywh(box: Any) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]


def test_a_cause_costs_what_ap_gains_without_it() -> None:
    """Two objects of a class: one is found by the second best box, the best box is background, and one is missed."""
    annotations = [
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]},
        {"image_id": 1, "category_id": 1, "bbox": [60, 60, 20, 20]},
    ]
    truth = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": annotations,
    }
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [40, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.8},
        {"image_id": 1, "category_id": 2, "bbox": [60, 60, 20, 30], "score": 0.7},
    ]
    base = Error("false", "background", "", 1, 0, (40, 0, 50, 10), detection=0)
    miss = Error("missed", "score", "", 1, 0, (60, 60, 80, 80), annotation=1)
    named = replace(base, cause="class", label=1, detection=2, annotation=1)
    again = replace(named, detection=0)

    def ap(*errors: Error) -> float:
        return evaluate_detections(*without(errors, truth, results)).ap

    assert ap() == pytest.approx(0.5 * 51 / 101)
    assert ap(base) == pytest.approx(51 / 101)  # precision 1 up to a recall of one half
    assert ap(miss) == pytest.approx(0.5)  # one object, found with a precision of one half
    assert ap(base, miss) == pytest.approx(1.0)
    assert ap(base, named) == pytest.approx(1.0)  # put right, class and box
    assert len(without([named, again], truth, results)[1]) == 2, "an object is not found twice"
    assert ap(replace(named, cause="loose")) == ap(named)
    assert results[2]["category_id"] == 2, "results are not changed"
    assert "iscrowd" not in annotations[1]


def test_gaussians_cover_the_middle_of_a_box() -> None:
    centers, sigmas = np.array([[[10.0, 20.0]] * 2] * 2), np.array([[[2.0, 3.0]] * 2] * 2)  # [h, J, 2]
    alike = np.array([0.5, 0.5])
    for box in ([8.0, 17.0, 12.0, 23.0], [9.5, 19.9, 10.5, 20.1], [8.25, 18.25, 12.25, 22.25]):
        assert coverage(centers, sigmas, alike, np.array(box)) == pytest.approx(1), box
    beyond = np.array([10.5, 18.0, 14.5, 22.0])  # a quarter of it begins at x = 12, 1σ away
    assert coverage(centers, sigmas, alike, beyond) == pytest.approx(np.exp(-0.5))
    above = np.array([9.0, 11.0, 11.0, 19.0])  # and ends at y = 16, 4/3 σ away
    assert coverage(centers, sigmas, alike, above) == pytest.approx(np.exp(-16 / 18))
    centers[0] += 1000  # the best head counts
    assert coverage(centers, sigmas, alike, above) == pytest.approx(np.exp(-16 / 18))
    centers[1, 0] += 1000  # on each level
    assert coverage(centers, sigmas, np.array([0.75, 0.25]), above) == pytest.approx(0.25 * np.exp(-16 / 18))
    flat = coverage(centers, np.full_like(sigmas, np.inf), alike, above)
    assert flat == pytest.approx(1), "a flat prior is everywhere"


def test_ious() -> None:
    assert ious(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [5, 5, 5, 5]])).tolist() == [
        [pytest.approx(1 / 3), 0]
    ]


@pytest.mark.parametrize(
    ("score", "objects", "found", "kind", "cause"),
    [
        (0.02, 5, False, "sigmoid", "silent"),
        (0.003, 5, False, "sigmoid", "unknown"),
        (0.02, 5, False, "softmax", "unknown"),  # of two classes and none, each starts from a third
        (0.4, 5, False, "softmax", "silent"),
        (0.003, 4, False, "sigmoid", "score"),
        (0.003, 5, True, "sigmoid", "score"),
    ],
)
def test_a_class_as_a_whole(score: float, objects: int, found: bool, kind: Any, cause: str) -> None:
    """None of its objects is found: then its scores tell an output that was not trained from one that was trained to say no."""
    made, _ = model({"num_classes": 2})
    classes = _Classes(replace(made.config, class_scores=kind))
    error = only(errors_of(Photograph([Query(scores=(LOW, (score, 0.0)))])))
    assert error.cause == "score"
    for number in range(objects):
        scores = SURE if found and number == 0 else (score, 0.0)
        classes.add(image_of(Photograph([Query(scores=(LOW, scores))])))
    got = classes.corrected(error)
    assert got.cause == cause
    if cause != "score":
        assert got.evidence.startswith(
            f"none of {objects} objects of the class is found, and on them it scores {score:.3f} ("
        )
        assert got.evidence.endswith(f"; this one: {error.evidence}")


class Photographs(DetectionDataset):
    """Two photographs with six objects of a class that is never found, and two of another; or without objects."""

    def __init__(self, *, empty: bool = False) -> None:
        self.kept = slice(0, 0) if empty else slice(None)

    @property
    def categories(self) -> tuple[Category, ...]:
        return (Category(3, "a"), Category(5, "日本 $x$"), Category(9, "c"))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        boxes = np.array([[5.0, 5, 30, 30], [30, 10, 70, 45], [2, 20, 20, 49], [40, 0, 60, 20]])
        labels = np.array([0, 1, 1, 1] if index == 0 else [1, 1, 1, 0])
        return Sample(PHOTO, boxes[self.kept], labels[self.kept], image_id=11 + index, original_size=PHOTO.shape[:2])


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": (4, 8), "num_classes": 3},
        {
            "query_init": "anchors",
            "box_refinement": True,
            "prior_unit": "box",
            "num_classes": 3,
            "class_scores": "softmax",
        },
        {"cross_attention": "dense", "num_classes": 3},
    ],
    ids=["published", "boxes", "DETR"],
)
def test_every_error_has_a_cause(changes: dict[str, Any], tmp_path: Path) -> None:
    made, _ = model(changes)
    made.config = replace(made.config, class_names=("a", "日本 $x$", "c"), category_ids=(3, 5, 9))
    data = Photographs()
    report = find_errors(made, data, [0.0, 1.0, 1.0])
    missed, false = ([e for e in report.errors if e.kind == kind] for kind in ("missed", "false"))
    assert report.objects == 8 == report.found + len(missed)
    assert {e.cause for e in missed} <= MISSED.keys()
    assert {e.cause for e in false} <= FALSE.keys()
    assert {e.cause for e in missed if e.label == 1} <= {"silent", "unknown"}, "a class of which nothing is found"
    assert sum(e.label == 1 for e in missed) == 6
    assert {e.image_id for e in report.errors} == {11, 12}
    assert report.indices == {11: 0, 12: 1}
    assert {e.image_id for e in false} == {11, 12}
    assert len({e.detection for e in false}) == len(false), "each is a result of its own"
    truth = data.ground_truth()
    for error in missed:
        assert error.annotation is not None
        annotation = truth["annotations"][error.annotation]
        assert (annotation["image_id"], annotation["category_id"]) == (
            error.image_id,
            made.config.category_ids[error.label],
        )
        assert np.allclose(xywh(error.box_xyxy), annotation["bbox"])
    assert report.costs.keys() == {(e.kind, e.cause) for e in report.errors}
    written = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert len(written["errors"]) == len(report.errors)
    for kind, cause in report.costs:
        assert (MISSED if kind == "missed" else FALSE)[cause] in report.table()
    sheets = draw_errors(
        report.errors, lambda image_id: data[report.indices[image_id]].image, made.config.names, tmp_path
    )
    assert sorted(path.name for path in sheets) == sorted(f"{kind}-{cause}.png" for kind, cause in report.costs)


@pytest.mark.parametrize(("empty", "threshold"), [(True, 0.0), (True, 1.0), (False, 1.0)])
def test_where_ap_is_not_defined(empty: bool, threshold: float) -> None:
    """Without objects; and if nothing is found, and every miss has one cause, none is left without it."""
    made, _ = model({"num_classes": 3})
    made.config = replace(made.config, class_names=("a", "b", "c"), category_ids=(3, 5, 9))
    report = find_errors(made, Photographs(empty=empty), [threshold] * 3)
    assert (report.objects, report.found) == (0 if empty else 8, 0)
    json.dumps(report.as_dict(), allow_nan=False)
    assert ("–" in report.table()) == bool(empty and report.errors)
    assert "nan" not in report.table()
