"""COCO's detection metrics on data in memory, with named numbers: those of pycocotools' COCOeval, by ``faster_coco_eval``.

That package has COCOeval in C++; tests/gpu/test_coco_eval.py holds it to pycocotools.

    AP      mean over classes and IoU thresholds 0.50, 0.55 … 0.95 of the area under the precision-recall curve
    AP50    the same at IoU 0.50 only, AP75 at 0.75 only
    AR      recall reached with at most 1, 10 or 100 detections per image, mean over the same thresholds and classes
    small, medium, large    objects of area below 32², between, and above 96² square pixels of the original image

A number that has nothing to average over (a class or a size without ground truth) is NaN here, "–" in the table and
null in JSON; COCOeval itself writes −1. Detections that fall on a crowd region count neither for nor against.

Where these rules hide something that a reader of the numbers should know, `CocoMetrics.notes` says it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from faster_coco_eval import COCO, COCOeval_faster

_MEANING = {
    "ap": "AP      IoU 0.50:0.95",
    "ap50": "AP50    IoU 0.50",
    "ap75": "AP75    IoU 0.75",
    "ap_small": "AP      small, below 32² px",
    "ap_medium": "AP      medium",
    "ap_large": "AP      large, above 96² px",
    "ar1": "AR      1 detection per image",
    "ar10": "AR      10 detections",
    "ar100": "AR      100 detections",
    "ar_small": "AR      small, 100 detections",
    "ar_medium": "AR      medium, 100 detections",
    "ar_large": "AR      large, 100 detections",
}
"""COCOeval's twelve numbers in its own order, with the words that the table uses."""
COUNTED = 100
"""Detections per image and class that COCO counts, and so the most objects that can be found."""
_ROUNDING_PX = 0.5
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's twelve numbers, each in [0, 1] or NaN where no ground truth defines it, and AP by class."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: dict[str, tuple[float, float]]
    """Class name → (AP, AP50), in the order of category ids; NaN for a class without ground truth."""
    notes: tuple[str, ...] = ()
    """What COCO's rules hide in these data, one sentence each."""

    def table(self) -> str:
        """The twelve numbers, AP by class and the notes as text, one per line."""
        width = max(len(text) for text in (*_MEANING.values(), *self.per_class))
        lines = [f"{text:<{width}}  {or_dash(getattr(self, name))}" for name, text in _MEANING.items()]
        if self.per_class:
            lines += ["", f"{'class':<{width}}     AP   AP50"]
            lines += [f"{name:<{width}}  {or_dash(ap)}  {or_dash(ap50)}" for name, (ap, ap50) in self.per_class.items()]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain values that ``json.dumps`` takes as strict JSON: NaN becomes None."""
        numbers: dict[str, Any] = {
            f.name: none_if_nan(getattr(self, f.name)) for f in fields(self) if f.name not in ("per_class", "notes")
        }
        numbers["per_class"] = {
            name: {"ap": none_if_nan(ap), "ap50": none_if_nan(ap50)} for name, (ap, ap50) in self.per_class.items()
        }
        return numbers


def evaluate_detections(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> CocoMetrics:
    """Compare detections with ground truth as COCO's benchmark does (boxes only).

    Args:
        ground_truth: COCO's structure: ``images`` (each with ``id``), ``categories`` (``id``, ``name``) and
            ``annotations`` (``image_id``, ``category_id``, ``bbox`` = x, y, width, height in pixels of the original
            image, ``iscrowd`` (0 if missing), ``area`` (width × height if missing)). It is not changed.
        detections: COCO's results: ``image_id``, ``category_id``, ``bbox`` as above, ``score``. May be empty. They are
            not changed. The 100 highest scores per image and class count.

    Returns:
        The metrics. Without detections, AP and AR are 0; without ground truth objects they are NaN.

    Raises:
        ValueError: a key of the ground truth or of a detection is missing, a detection names an image or a category
            that the ground truth does not have, or its box or score is not finite.
    """
    indices = indexed(ground_truth, detections)
    truth = list(indices[0].anns.values())
    crowded = _crowded_images(truth)
    evaluation = _evaluate(indices, COUNTED)
    numbers = {name: _defined(value) for name, value in zip(_MEANING, evaluation.stats[:12], strict=True)}
    notes = [*_notes_of_crowded(crowded, indices), *_notes_of_boxes(ground_truth, truth)]
    return CocoMetrics(**numbers, per_class=_per_class(ground_truth, evaluation), notes=tuple(notes))


def indexed(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> tuple[COCO, COCO]:
    """Ground truth and detections, checked, as COCOeval takes them: copies, each numbered from 1 by its ``id``.

    Args and errors: those of ``evaluate_detections``.
    """
    for key in ("images", "categories", "annotations"):
        if key not in ground_truth:
            raise ValueError(f'ground truth needs COCO\'s "images", "categories" and "annotations"; {key!r} is missing')
    _check_detections(ground_truth, detections)
    return _index(ground_truth, _truth_entries(ground_truth)), _index(ground_truth, _result_entries(detections))


def class_keys(ground_truth: Mapping[str, Any]) -> dict[Any, str]:
    """Category id → the class's name, in the order of ids; with its id where several categories have one name."""
    names = {category["id"]: str(category["name"]) for category in ground_truth["categories"]}
    uses = Counter(names.values())
    return {id_: name if uses[name] == 1 else f"{name} (id {id_})" for id_, name in sorted(names.items())}


def _evaluate(indices: tuple[COCO, COCO], counted: int) -> COCOeval_faster:
    """Ground truth and detections compared, with up to so many detections per image and class; summed up."""
    evaluation = COCOeval_faster(*indices, "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = [1, 10, counted]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _crowded_images(truth: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    """Image id → its objects of one class, the most numerous, where they are more than COCO counts."""
    crowded: dict[Any, int] = {}
    for (image_id, _), count in Counter((a["image_id"], a["category_id"]) for a in truth if not a["iscrowd"]).items():
        if count > COUNTED:
            crowded[image_id] = max(count, crowded.get(image_id, 0))
    return crowded


def _notes_of_crowded(crowded: Mapping[Any, int], indices: tuple[COCO, COCO]) -> list[str]:
    if not crowded:
        return []
    most = max(crowded.values())
    every = _defined(_evaluate(indices, most).stats[0])
    return [
        f"{_count(len(crowded), 'image has', 'images have')} more than {COUNTED} objects of a class, {most} at "
        f"most, and COCO counts {COUNTED} detections per image and class: the others are missed by rule. With as many as there "
        f"are objects, AP is {or_dash(every).strip()}"
    ]


def _notes_of_boxes(ground_truth: Mapping[str, Any], truth: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    objects = [annotation for annotation in truth if not annotation["iscrowd"]]
    sizes = {i["id"]: (i["width"], i["height"]) for i in ground_truth["images"] if i.get("width") and i.get("height")}
    beyond = flat = 0
    for annotation in objects:
        x, y, w, h = annotation["bbox"]
        width, height = sizes.get(annotation["image_id"], (math.inf, math.inf))
        if w <= 0 or h <= 0:
            flat += 1
        elif max(-x, -y, x + w - width, y + h - height) > _ROUNDING_PX:
            beyond += 1
    if beyond:
        notes.append(
            f"{_count(beyond, 'box', 'boxes')} of the ground truth reach{'es' * (beyond == 1)} beyond the image; detections end "
            "at its border, so that they overlap less than they could"
        )
    if flat:
        notes.append(
            f"{_count(flat, 'object has', 'objects have')} no area: nobody can find them, and COCO counts them"
        )
    used = {annotation["category_id"] for annotation in objects}
    if used and (absent := [str(c["name"]) for c in ground_truth["categories"] if c["id"] not in used]):
        listed = ", ".join(absent[:_NAMES_SHOWN]) + ", …" * (len(absent) > _NAMES_SHOWN)
        notes.append(
            f"{_count(len(absent), 'class has', 'classes have')} no object in these images and no part in the means: {listed}"
        )
    return notes


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _index(ground_truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": list(ground_truth["images"]),
        "categories": list(ground_truth["categories"]),
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _truth_entries(ground_truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Copies, because COCOeval writes into them; numbered from 1, because it treats a match with annotation id 0 as none."""
    entries = []
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        missing = {"image_id", "category_id", "bbox"} - set(annotation)
        if missing:
            raise ValueError(
                f"annotation {number - 1} of the ground truth has no {', '.join(sorted(missing))}: {annotation}"
            )
        _, _, width, height = annotation["bbox"]
        entries.append({"iscrowd": 0, "area": width * height, **annotation, "id": number})
    return entries


def _result_entries(detections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What ``COCO.loadRes`` would make of them; it fails on an empty list and writes into the caller's entries."""
    entries = []
    for number, detection in enumerate(detections, start=1):
        _, _, width, height = detection["bbox"]
        entries.append({**detection, "id": number, "area": width * height, "iscrowd": 0})
    return entries


def _check_detections(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> None:
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    for number, detection in enumerate(detections):
        missing = {"image_id", "category_id", "bbox", "score"} - set(detection)
        if missing:
            raise ValueError(f"detection {number} has no {', '.join(sorted(missing))}: {dict(detection)}")
        # COCOeval would silently drop both kinds, and the AP would be that of another task.
        for key, known in (("image_id", image_ids), ("category_id", category_ids)):
            if detection[key] not in known:
                some = f"{sorted(known)[:5]}{' …' if len(known) > 5 else ''}"
                raise ValueError(
                    f"detection {number} has {key} {detection[key]!r}, which the ground truth does not have "
                    f"(it has {len(known)}: {some}); were the detections made on other data?"
                )
        box = detection["bbox"]
        if len(box) != 4 or not all(map(math.isfinite, (*box, detection["score"]))):
            raise ValueError(
                f"detection {number}: bbox must be four finite numbers (x, y, width, height) and score one, "
                f"got {list(box)} and {detection['score']!r}"
            )


def _per_class(ground_truth: Mapping[str, Any], evaluation: COCOeval_faster) -> dict[str, tuple[float, float]]:
    keys = class_keys(ground_truth)
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [IoU, recall, K]: all sizes, 100 detections
    per_class = {}
    for k, category_id in enumerate(evaluation.params.catIds):
        per_class[keys[category_id]] = (_defined(precision[:, :, k].mean()), _defined(precision[0, :, k].mean()))
    return per_class


def _defined(value: float) -> float:
    """COCOeval's −1 as NaN. (A class has a precision at every recall or at none, so its mean is never a mixture.)"""
    return math.nan if value < 0 else float(value)


def none_if_nan(value: float) -> float | None:
    """As strict JSON has a number that is not defined."""
    return None if math.isnan(value) else value


def or_dash(value: float) -> str:
    """Three decimals; a dash, as wide, for a number that is not defined."""
    return "    –" if math.isnan(value) else f"{value:.3f}"
