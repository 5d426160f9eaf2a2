"""Why a model misses objects and boxes what is none, on data: the cause of every error, and what each cause costs.

    report = find_errors(model, data, thresholds)
    print(report.table())

``smca.gpu.evaluation.image_errors`` finds the causes. What one costs is what TIDE (Bolya et al., ECCV 2020) defines: AP if it were
gone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from smca.datasets import DetectionDataset
from smca.datasets.batch import CocoDict
from smca.gpu.config import ModelConfig
from smca.gpu.evaluation.coco import CocoMetrics, evaluate_detections, none_if_nan, or_dash
from smca.gpu.evaluation.detect import coco_results, decode_counted
from smca.gpu.evaluation.image_errors import CAUSES, CORRECTED, Error, Found, ImageErrors, Objects
from smca.gpu.model import SMCADETR
from smca.gpu.model.encoded import EncodedImage
from smca.gpu.model.layers import CLASS_PRIOR

AT_LEAST = 5
"""Objects of a class of which none is found, from which on the class as a whole is in question."""


@dataclass(frozen=True)
class Cost:
    """AP that would be gained if a cause were gone; NaN if AP is not defined, or would not be: if no object were left."""

    ap: float
    ap50: float


@dataclass(frozen=True)
class ErrorReport:
    """What ``find_errors`` found."""

    class_names: tuple[str, ...]
    thresholds: tuple[float, ...]
    objects: int
    found: int
    ap: float
    ap50: float
    errors: tuple[Error, ...]
    costs: dict[tuple[str, str], Cost]
    """(kind, cause) → what it costs; "class" and "loose" cost the same as a miss and as a false box, for they are one."""
    indices: dict[int, int]
    """Image id → its index in the data."""

    def table(self) -> str:
        """Causes with their numbers, their part and what they cost."""
        counts: Counter[tuple[str, str]] = Counter((error.kind, error.cause) for error in self.errors)
        lines: list[str] = []
        for (kind, causes), title in zip(CAUSES.items(), ("missed objects", "false boxes"), strict=True):
            total = sum(counts[kind, cause] for cause in causes)
            of = f" of {self.objects}" if kind == "missed" else ""
            lines += ["", f"{title + f': {total}{of}':<46}  number   part  costs AP  AP50"]
            for cause in sorted(causes, key=lambda cause: -counts[kind, cause]):
                if number := counts[kind, cause]:
                    cost = self.costs[kind, cause]
                    lines.append(
                        f"  {causes[cause]:<44}  {number:6d}   {number / total:4.0%}    {or_dash(cost.ap)} {or_dash(cost.ap50)}"
                    )
        return "\n".join(lines[1:])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "objects": self.objects,
            "found": self.found,
            "ap": none_if_nan(self.ap),
            "ap50": none_if_nan(self.ap50),
            "thresholds": dict(zip(self.class_names, self.thresholds, strict=True)),
            "costs": {
                f"{kind}: {cause}": {"ap": none_if_nan(cost.ap), "ap50": none_if_nan(cost.ap50)}
                for (kind, cause), cost in self.costs.items()
            },
            "errors": [{**asdict(error), "class": self.class_names[error.label]} for error in self.errors],
        }


def find_errors(
    model: SMCADETR,
    data: DetectionDataset,
    thresholds: Sequence[float],
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> ErrorReport:
    """All errors, their causes and costs.

    Args:
        model: whose categories are those of the data, in the same order.
        data: images with their objects.
        thresholds: of each class, from which score on a detection counts.
        track: shows progress over the numbers of images.
    """
    truth = data.ground_truth()
    ids, least = model.config.ids, np.array(thresholds)
    objects = _objects(truth, ids)
    results: list[dict[str, Any]] = []
    errors: list[Error] = []
    classes = _Classes(model.config)
    found, indices = 0, {}
    for index in track(range(len(data))):
        sample = data[index]
        indices[sample.image_id] = index
        encoded = model.encode(sample.image)
        detected, found_here = _detected(encoded, sample.image_id, ids)
        image = ImageErrors(sample.image_id, encoded, objects(sample.image_id), detected, least)
        classes.add(image)
        errors += [
            error if error.detection is None else replace(error, detection=error.detection + len(results))
            for error in image.errors()
        ]
        results += found_here
        found += len(image.owner)
    errors = [classes.corrected(error) for error in errors]
    measured = evaluate_detections(truth, results)
    names = tuple(map(str, model.config.names))
    costs = _costs(truth, results, errors, measured)
    total = sum(1 for annotation in truth["annotations"] if not annotation.get("iscrowd"))
    return ErrorReport(
        names, tuple(thresholds), total, found, measured.ap, measured.ap50, tuple(errors), costs, indices
    )


class _Classes:
    """What becomes of the objects of each class, over all images."""

    def __init__(self, config: ModelConfig) -> None:
        self.start = CLASS_PRIOR if config.class_scores == "sigmoid" else 1 / config.class_outputs
        self.found: Counter[int] = Counter()
        self.scores: dict[int, list[float]] = defaultdict(list)

    def add(self, image: ImageErrors) -> None:
        """With what the best box on each object scores for its class."""
        for t, label in enumerate(image.objects.labels.tolist()):
            self.found[label] += t in image.owner
            self.scores[label].append(float(image.why.scores[-1, image.overlaps[-1, :, t].argmax(), label]))

    def corrected(self, error: Error) -> Error:
        """With the cause that a class as a whole has, if none of its objects is found.

        Every class starts from one score. Objects with labels raise it where they are; background, and objects without labels,
        lower it; and what is not trained stays.
        """
        number, label = len(self.scores[error.label]), error.label
        if error.kind == "false" or error.cause == "flat" or number < AT_LEAST or self.found[label]:
            return error
        usual = float(np.median(self.scores[label]))
        told = (
            f"none of {number} objects of the class is found, and on them it scores {usual:.3f} (before training "
            f"{self.start:.3f}); this one: {error.evidence}"
        )
        return replace(error, cause="unknown" if usual < self.start else "silent", evidence=told)


def _objects(truth: CocoDict, ids: Sequence[int]) -> Callable[[int], Objects]:
    labels = {category: label for label, category in enumerate(ids)}
    by_image: dict[int, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for number, annotation in enumerate(truth["annotations"]):
        by_image[annotation["image_id"]].append((number, annotation))

    def of(image_id: int) -> Objects:
        parts = []
        for crowd in (False, True):
            own = [(n, a) for n, a in by_image[image_id] if bool(a.get("iscrowd")) == crowd]
            boxes = np.array([a["bbox"] for _, a in own], dtype=np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            numbers = np.array([n for n, _ in own], dtype=np.int64)
            parts.append((numbers, boxes, np.array([labels[a["category_id"]] for _, a in own], dtype=np.int64)))
        (numbers, boxes, own_labels), (_, crowds, crowd_labels) = parts
        return Objects(numbers, boxes, own_labels, crowds, crowd_labels)

    return of


def _detected(encoded: EncodedImage, image_id: int, ids: tuple[int, ...]) -> tuple[Found, list[dict[str, Any]]]:
    """The detections of an image, best first, as arrays and as COCO results."""
    outcome = encoded.outcome
    sizes = outcome.boxes.new_tensor([encoded.image_size])
    (best,) = decode_counted(outcome.logits[:, -1], outcome.boxes[:, -1], sizes, encoded.model.config)
    scores, boxes = (each.double().cpu().numpy() for each in (best.scores, best.boxes_xyxy))
    found = Found(scores, best.labels.cpu().numpy(), boxes, best.queries.cpu().numpy())
    return found, coco_results(best.scores, best.labels, best.boxes_xyxy, image_id, ids)


def _costs(
    truth: CocoDict,
    results: Sequence[Mapping[str, Any]],
    errors: Sequence[Error],
    before: CocoMetrics,
) -> dict[tuple[str, str], Cost]:
    by_cause: dict[tuple[str, ...], list[Error]] = defaultdict(list)
    for error in errors:  # a miss and the false box that corrects it are one
        by_cause[(error.cause,) if error.cause in CORRECTED else (error.kind, error.cause)].append(error)
    costs: dict[tuple[str, str], Cost] = {}
    for own in by_cause.values():
        after = evaluate_detections(*without(own, truth, results))
        cost = Cost(after.ap - before.ap, after.ap50 - before.ap50)
        costs.update({(error.kind, error.cause): cost for error in own})
    return dict(sorted(costs.items()))


def without(
    errors: Sequence[Error], truth: CocoDict, results: Sequence[Mapping[str, Any]]
) -> tuple[CocoDict, list[Mapping[str, Any]]]:
    """Ground truth and results as they would be without some errors, as TIDE has it.

    A box that is about an object is put right, once per object; any other false box is not there; an object that nothing finds does
    not count, nor do boxes on it.
    """
    annotations = list(truth["annotations"])
    mended: dict[int, Mapping[str, Any] | None] = {}
    gone: set[int] = set()
    right: set[int] = set()
    for error in errors:
        if error.cause in CORRECTED and error.annotation is not None:
            if error.kind == "false" and error.detection is not None:
                target = annotations[error.annotation]
                corrected = {**results[error.detection], "category_id": target["category_id"], "bbox": target["bbox"]}
                mended[error.detection] = None if error.annotation in right else corrected
                right.add(error.annotation)
        elif error.kind == "false":
            assert error.detection is not None
            mended[error.detection] = None
        else:
            assert error.annotation is not None
            gone.add(error.annotation)
    counted = [{**a, "iscrowd": 1} if n in gone else a for n, a in enumerate(annotations)]
    kept = [mended.get(n, result) for n, result in enumerate(results)]
    return {**truth, "annotations": counted}, [result for result in kept if result is not None]
