"""Where to put the score threshold of a detector, and which errors it makes there.

    precision-recall curve   of each class, at IoU 0.50 and 0.75: COCOeval's, at its 101 recalls
    operating point          of each class: the threshold of best F1 at IoU 0.50, over all scores that occur
    confusion matrix         at these thresholds: which class objects are taken for, what is missed, what is found where nothing is

All three are matched by COCOeval (``faster_coco_eval``); tests/gpu/test_operating_point.py holds them to pycocotools.

F1 = 2·TP / (detections + objects) of the detections from a threshold on, as COCOeval counts them: at most 100 per image and class,
none on crowd regions. The threshold lies midway between the lowest score that is kept and the next lower one of the class (or 0),
so that rounding changes nothing. Of several thresholds with the same F1 the highest is taken.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from smca.datasets.batch import FloatArray
from smca.gpu.evaluation.coco import COUNTED, class_keys, indexed
from smca.gpu.model import DRAW_THRESHOLD

IOU = 0.50
"""Overlap from which on a detection has found an object, for thresholds and the confusion matrix."""
CURVES_AT = (0.50, 0.75)
_TAKEN_FOR = 4
"""Classes that the table names for each class."""


@dataclass(frozen=True)
class OperatingPoint:
    """The score threshold of best F1 of a class, and what the detections from it on are worth; all in [0, 1]."""

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class OperatingReport:
    """Curves, operating points and confusions of K classes, in the order of their category ids."""

    names: tuple[str, ...]
    """Of the classes."""
    points: tuple[OperatingPoint | None, ...]
    """Of each class; None for one without objects, or of which no object is found."""
    recalls: FloatArray
    """[R] at which the curves are known: 0, 0.01 … 1."""
    precisions: Mapping[float, FloatArray]
    """IoU → [K, R]: the best precision at this recall or a higher one, 0 where the recall is not reached; NaN for a class without
    objects."""
    confusion: NDArray[np.int64]
    """[K + 1, K + 1], from ``confusion_matrix``."""

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """As ``thresholds_of`` has them."""
        return thresholds_of(dict(enumerate(self.points)), range(len(self.points)))

    def table(self) -> str:
        """Operating points and confusions as text, a class per line."""
        width = max(len(name) for name in (*self.names, "background"))
        lines = [f"at the score of best F1, IoU {IOU:.2f}:", ""]
        lines += [f"{'class':<{width}}  score  precision  recall     F1  objects  right  missed  taken for"]
        for label, name in enumerate(self.names):
            row, point = self.confusion[label], self.points[label]
            numbers = (
                "    –          –       –      –"
                if point is None
                else f"{point.threshold:.3f}  {point.precision:9.3f}  {point.recall:6.3f}  {point.f1:5.3f}"
            )
            counts = f"{row.sum():7,}  {row[label]:5,}  {row[-1]:6,}"
            lines.append(f"{name:<{width}}  {numbers}  {counts}  {self._taken_for(label)}".rstrip())
        lines.append(f"{'background':<{width}}{'':58}  {self._taken_for(len(self.names))}".rstrip())
        if None in self.points:
            lines += ["", f"–: no object found, so that its detections count from {DRAW_THRESHOLD} on"]
        return "\n".join(lines)

    def _taken_for(self, row: int) -> str:
        """The classes that objects of a row were most often taken for wrongly."""
        counts = {label: int(self.confusion[row, label]) for label in range(len(self.names)) if label != row}
        frequent = sorted((label for label in counts if counts[label]), key=lambda label: -counts[label])
        shown = [f"{self.names[label]} {counts[label]:,}" for label in frequent[:_TAKEN_FOR]]
        return ", ".join(shown) + ", …" * (len(frequent) > _TAKEN_FOR)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that ``json.dumps`` takes as strict JSON; what a class does not have is None."""
        points = zip(self.names, self.points, strict=True)
        curves = {
            f"{iou:.2f}": {
                name: None if math.isnan(curve[0]) else curve.round(6).tolist()
                for name, curve in zip(self.names, precision, strict=True)
            }
            for iou, precision in self.precisions.items()
        }
        return {
            "thresholds": {name: None if point is None else asdict(point) for name, point in points},
            "precision_recall": {"recall": self.recalls.round(2).tolist(), "precision": curves},
            "confusion": {
                "true": [*self.names, "background"],
                "detected": [*self.names, "missed"],
                "counts": self.confusion.tolist(),
            },
        }


def operating_report(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> OperatingReport:
    """Everything of this module. Of a class without an operating point, the confusion matrix has the detections from
    ``DRAW_THRESHOLD`` on, as ``smca predict`` does.

    Args and errors: those of ``evaluate_detections``.
    """
    keys, indices = class_keys(ground_truth), indexed(ground_truth, detections)
    evaluations = {iou: _compare(indices, iou, COUNTED) for iou in CURVES_AT}
    points = _points(keys, indices, evaluations[IOU])
    thresholds = {id_: DRAW_THRESHOLD if point is None else point.threshold for id_, point in points.items()}
    precisions = {
        iou: evaluation.eval["precision"][0, :, :, 0, 0].T for iou, evaluation in evaluations.items()
    }  # [K, R]
    return OperatingReport(
        names=tuple(keys.values()),
        points=tuple(points.values()),
        recalls=evaluations[IOU].params.recThrs,
        precisions={iou: np.where(curves < 0, np.nan, curves) for iou, curves in precisions.items()},
        confusion=_confusion(keys, indices, thresholds),
    )


def operating_points(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]
) -> dict[Any, OperatingPoint | None]:
    """Category id → the threshold of best F1 at IoU 0.50; None for a class without objects, or of which no object is found.

    Args and errors: those of ``evaluate_detections``.
    """
    indices = indexed(ground_truth, detections)
    return _points(class_keys(ground_truth), indices, _compare(indices, IOU, COUNTED))


def thresholds_of(points: Mapping[Any, OperatingPoint | None], category_ids: Iterable[Any]) -> tuple[float | None, ...]:
    """The thresholds as ``ModelConfig.score_thresholds`` has them: of the classes with these category ids, in this order."""
    return tuple(None if (point := points[id_]) is None else point.threshold for id_ in category_ids)


def confusion_matrix(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], thresholds: Mapping[Any, float]
) -> NDArray[np.int64]:
    """Which class objects are taken for.

    Objects and detections of an image are matched regardless of class, by COCOeval's rule with ``useCats = 0``: detections by
    falling score, each with the object that it overlaps most among those still free, at IoU 0.50 or more (of equal overlaps the
    last object). A detection on a crowd region, of whatever class, counts neither way, nor does the region.

    Args:
        ground_truth: as for ``evaluate_detections``; K categories.
        detections: likewise.
        thresholds: category id → lowest score of the detections that count.

    Returns:
        [K + 1, K + 1] counts. Rows: the object's class, then "background", where there is no object. Columns: the detection's
        class, then "missed", where there is no detection. Classes are in the order of category ids; the last number is 0.

    Raises:
        ValueError: as ``evaluate_detections``.
    """
    return _confusion(class_keys(ground_truth), indexed(ground_truth, detections), thresholds)


def _points(
    keys: Iterable[Any], indices: tuple[COCO, COCO], evaluation: COCOeval_faster
) -> dict[Any, OperatingPoint | None]:
    """For the categories `keys`, of what was compared at IoU 0.50."""
    matched, (truth, found) = _matched(evaluation), (index.anns for index in indices)
    objects = Counter(entry["category_id"] for entry in truth.values() if not entry["iscrowd"])
    scored: dict[Any, list[tuple[float, bool]]] = defaultdict(list)  # by falling score
    seen: Counter[Any] = Counter()
    for number, entry in sorted(found.items(), key=lambda item: -item[1]["score"]):
        place = entry["image_id"], entry["category_id"]
        seen[place] += 1
        on_crowd = number in matched and truth[matched[number]]["iscrowd"]
        if seen[place] <= COUNTED and not on_crowd:
            scored[entry["category_id"]].append((entry["score"], number in matched))
    return {id_: _best_f1(scored[id_], objects[id_]) for id_ in keys}


def _confusion(keys: Iterable[Any], indices: tuple[COCO, COCO], thresholds: Mapping[Any, float]) -> NDArray[np.int64]:
    """As ``confusion_matrix``; takes the detections below the thresholds out of their index."""
    dataset = indices[1].dataset
    dataset["annotations"] = [d for d in dataset["annotations"] if d["score"] >= thresholds[d["category_id"]]]
    indices[1].createIndex()
    truth, found = (index.anns for index in indices)
    matched = _matched(_compare(indices, IOU, max(1, len(found)), by_class=False))
    label = {id_: label for label, id_ in enumerate(keys)}
    counts = np.zeros((len(label) + 1, len(label) + 1), dtype=np.int64)
    for number, detection in found.items():
        entry = truth[matched[number]] if number in matched else None
        if entry is None or not entry["iscrowd"]:
            counts[-1 if entry is None else label[entry["category_id"]], label[detection["category_id"]]] += 1
    taken = set(matched.values())
    for number, entry in truth.items():
        if number not in taken and not entry["iscrowd"]:
            counts[label[entry["category_id"]], -1] += 1
    return counts


def _best_f1(scored: Sequence[tuple[float, bool]], objects: int) -> OperatingPoint | None:
    """Of a class: its detections by falling score, each with whether it found an object, and the number of objects."""
    if not objects or not any(right for _, right in scored):
        return None
    scores, right = np.array([score for score, _ in scored]), np.array([right for _, right in scored])
    # Behind the last detection of each score that occurs: those of one score are kept or left out together.
    kept = np.flatnonzero(np.append(scores[1:] < scores[:-1], True)) + 1
    true = right.cumsum()[kept - 1]
    f1 = 2 * true / (kept + objects)
    best = int(f1.argmax())  # the first of equals
    lowest, below = float(scores[kept[best] - 1]), float(scores[kept[best]]) if kept[best] < len(scores) else 0.0
    middle = (lowest + below) / 2
    return OperatingPoint(
        threshold=middle if middle > below else lowest,  # between neighbouring floats there is none
        precision=float(true[best] / kept[best]),
        recall=float(true[best] / objects),
        f1=float(f1[best]),
    )


def _compare(indices: tuple[COCO, COCO], iou: float, counted: int, *, by_class: bool = True) -> COCOeval_faster:
    """Ground truth and detections compared at one IoU, objects of all sizes, with up to so many detections per image and class."""
    evaluation = COCOeval_faster(*indices, "bbox", print_function=lambda *_: None)
    evaluation.params.iouThrs = [iou]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[-math.inf, math.inf]], ["all"]
    evaluation.params.maxDets = [counted]
    evaluation.params.useCats = int(by_class)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _matched(evaluation: COCOeval_faster) -> dict[int, int]:
    """Number of a detection → that of the object or crowd region that it was matched with."""
    pairs = (pair.split("_") for pair in evaluation.eval["matched"])
    return {int(detection): int(entry) for detection, entry in pairs}
