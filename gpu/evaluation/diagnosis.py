"""Why AP is still zero: those of the known causes that show in the loss, the detections and the annotations.

too few steps          the first objects are found after some hundred steps (DETR: some thousand)
learning rate          the loss does not fall
size, stride           most held-out objects are smaller than a cell
other data             held-out objects of classes or sizes that training has not
classes                classes that no detection names; boxes that are right under names that are not
collapse               all detections in one place, or in the same place on every image
scores                 none is high
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smca.datasets.batch import Category, CocoDict, FloatArray
from smca.datasets.findings import named
from smca.datasets.table import AnnotationTable
from smca.gpu.config import OptimConfig, RunConfig
from smca.gpu.evaluation.boxes import ious
from smca.gpu.evaluation.coco import evaluate_detections
from smca.gpu.evaluation.fit import Resize, find_in_settings
from smca.gpu.model import DRAW_THRESHOLD

ZERO = 0.0005
"""Lower values of AP are shown as 0.000."""
_FIRST_STEPS = {"smca": 500, "dense": 2500}
"""Steps after which objects are found, by the cross-attention (docs/convergence.md)."""
_FALLEN = 0.95
"""Of the first loss: one that is still higher has not fallen."""
_USUAL_RATES = {"adamw": (1e-4, 4e-4), "muon": (0.02, 0.02)}
"""The least and the largest of the presets."""
_IMAGES, _DETECTIONS = 300, 100
"""What is looked at: the first images that have objects, and the best detections of each."""
_MOST = 0.5
"""Of the held-out objects: what holds of so many explains an AP of zero."""
_ONE_PLACE = 0.25
"""Of the spread of the objects: detections that lie closer together are in one place."""
_RIGHT_BOXES = 0.1
"""AP50 without regard to classes from which on the boxes are right."""


def why_ap_is_zero(
    config: RunConfig,
    history: Sequence[Mapping[str, Any]],
    truth: CocoDict,
    results: Sequence[Mapping[str, Any]],
    train: AnnotationTable,
    val: AnnotationTable,
) -> list[str]:
    """The causes that show, a sentence each; none if AP is not zero.

    Args:
        config: of the run.
        history: lines of metrics.jsonl up to this evaluation: "step", "loss" and "ap" of each.
        truth: held-out images in COCO's structure.
        results: the detections on them in COCO's.
        train: annotations of the training images.
        val: of the held-out images.
    """
    now = history[-1]
    if now["ap"] is None or now["ap"] >= ZERO:
        return []
    usual = _FIRST_STEPS[config.model.cross_attention]
    if now["step"] < usual:
        return [
            f"{now['step']:,} steps are few: the first objects are usually found after {usual:,} or so; if the run has fewer in "
            "all, give it more --epochs"
        ]
    images = _images(truth, results)
    categories = [Category(category["id"], str(category["name"])) for category in truth["categories"]]
    names = {category.id: category.name for category in categories}
    causes = [
        *_learning_rate(history, config.optim),
        *_under_a_cell(config, val, categories),
        *_other_data(config, train, val, categories),
        *_classes(images, names),
        *_wrong_names(truth, images, names),
        *_one_place(images),
        *_low_scores(images),
    ]
    return causes or [
        f"after {now['step']:,} steps, and none of the usual causes shows: look at the boxes that `smca check-data` draws, and try "
        "a third of the learning rate, and three times it"
    ]


@dataclass(frozen=True, eq=False)
class _Image:
    """The objects of a held-out image, and its best detections, no two of one box. Boxes are in fractions of its sides."""

    id: Any
    truth_xyxy: FloatArray
    truth_classes: list[Any]
    boxes_xyxy: FloatArray
    classes: list[Any]
    scores: list[float]


def _images(truth: CocoDict, results: Sequence[Mapping[str, Any]]) -> list[_Image]:
    objects: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in truth["annotations"]:
        if not annotation.get("iscrowd"):
            objects[annotation["image_id"]].append(annotation)
    chosen = dict.fromkeys([image["id"] for image in truth["images"] if image["id"] in objects][:_IMAGES])
    found: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        if result["image_id"] in chosen:
            found[result["image_id"]].append(result)
    sizes = {image["id"]: (image.get("width") or 1, image.get("height") or 1) for image in truth["images"]}
    images = []
    for image_id in chosen:
        best: dict[tuple[float, ...], Mapping[str, Any]] = {}
        for result in sorted(found[image_id], key=lambda result: -result["score"]):
            best.setdefault(tuple(result["bbox"]), result)
        kept, there = list(best.values())[:_DETECTIONS], objects[image_id]
        images.append(
            _Image(
                image_id,
                _fractions(there, sizes[image_id]),
                [annotation["category_id"] for annotation in there],
                _fractions(kept, sizes[image_id]),
                [result["category_id"] for result in kept],
                [result["score"] for result in kept],
            )
        )
    return images


def _fractions(entries: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> FloatArray:
    """[entries, 4] corners."""
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scaled: FloatArray = boxes / np.tile(size, 2)
    return scaled


def _learning_rate(history: Sequence[Mapping[str, Any]], optim: OptimConfig) -> Iterator[str]:
    lines = [line for line in history if line["loss"] is not None and math.isfinite(line["loss"])]
    if len(lines) < 2 or lines[-1]["loss"] < _FALLEN * lines[0]["loss"]:
        return
    first, last = lines[0], lines[-1]
    flag, rate = ("--optim.muon-lr", optim.muon_lr) if optim.optimizer == "muon" else ("--optim.lr", optim.lr)
    least, largest = _USUAL_RATES[optim.optimizer]
    fell = f"the loss does not fall ({first['loss']:.2f} up to step {first['step']:,}, now {last['loss']:.2f})"
    if last["loss"] * _FALLEN > first["loss"] or rate > 2 * largest:
        yield f"{fell}: the learning rate is too high; try {flag} {min(rate / 3, largest):.2g}"
    elif rate < least / 2:
        yield f"{fell}: the learning rate is too low; try {flag} {least:g}"
    else:
        yield f"{fell}: the learning rate is too high or too low; try {flag} {rate / 3:.2g}, and {rate * 3:.2g}"


def _under_a_cell(config: RunConfig, val: AnnotationTable, categories: Sequence[Category]) -> Iterator[str]:
    sides = Resize.of(config.model).sides(val)
    if len(sides) and np.mean(sides < config.model.decoder_strides[0]) >= _MOST:
        found = find_in_settings(val, categories, config.model, config.augmentation)
        yield from (f"of the held-out images, {each.text}" for each in found if each.kind == "objects-under-a-cell")


def _other_data(
    config: RunConfig, train: AnnotationTable, val: AnnotationTable, categories: Sequence[Category]
) -> Iterator[str]:
    """Held-out objects that are not of the classes, or of the sizes, that training shows."""
    trained, held_out = train.objects_per_class(len(categories)), val.objects_per_class(len(categories))
    unknown = (trained == 0) & (held_out > 0)
    if held_out.sum() and held_out[unknown].sum() >= _MOST * held_out.sum():
        share = held_out[unknown].sum() / held_out.sum()
        which = named([categories[label].name for label in np.flatnonzero(unknown).tolist()])
        yield f"{share:.0%} of the held-out objects are of classes of which there is no box to train on: {which}"
    resize = Resize.of(config.model)
    sides, seen = resize.sides(val), resize.sides(train)
    if not len(sides) or not len(seen):
        return
    least, largest = np.quantile(seen, [0.01, 0.99])
    for share, how in ((np.mean(sides < least), "smaller"), (np.mean(sides > largest), "larger")):
        if share >= _MOST:
            yield (
                f"{share:.0%} of the held-out objects are {how} than nearly all that are trained on (half are below "
                f"{np.median(sides):.0f} pixels after the resize, of those in training below {np.median(seen):.0f}): are both "
                "splits of one kind, and their boxes in one format?"
            )


def _classes(images: Sequence[_Image], names: Mapping[Any, str]) -> Iterator[str]:
    """Classes of objects that are none of the best detections', of which there are as many as objects."""
    there = Counter(each for image in images for each in image.truth_classes)
    named_classes = {each for image in images for each in image.classes[: len(image.truth_classes)]}
    never = [each for each in there if each not in named_classes]
    share = sum(there[each] for each in never) / max(1, there.total())
    if named_classes and share >= _MOST:
        yield (
            f"the best detections name only {named([names[each] for each in sorted(named_classes)])}, never "
            f"{named([names[each] for each in never])}, which {share:.0%} of the objects are: do the training "
            "annotations name them?"
        )


def _wrong_names(truth: CocoDict, images: Sequence[_Image], names: Mapping[Any, str]) -> Iterator[str]:
    """Boxes that lie on objects of other classes."""
    if len(names) < 2 or not any(image.scores for image in images):
        return
    one = {
        "images": [{"id": image.id} for image in images],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [_entry(image.id, box) for image in images for box in image.truth_xyxy],
    }
    found = [
        {**_entry(image.id, box), "score": score}
        for image in images
        for box, score in zip(image.boxes_xyxy, image.scores, strict=True)
    ]
    ap50 = evaluate_detections(one, found).ap50
    if ap50 < _RIGHT_BOXES:
        return
    called: dict[Any, Counter[Any]] = defaultdict(Counter)
    for image in images:
        overlaps = ious(image.truth_xyxy, image.boxes_xyxy)
        for row, category in zip(overlaps, image.truth_classes, strict=True):
            if row.max(initial=0) >= 0.5:
                called[category][image.classes[int(row.argmax())]] += 1
    told = [
        f"{names[category]} is called {names[name]} ({count / counts.total():.0%})"
        for category, counts in called.items()
        for name, count in counts.most_common(1)
        if name != category
    ]
    yield (
        f"boxes are found (AP50 without regard to classes: {ap50:.2f}), but under other names: {named(told)}: do the category ids "
        "of both annotation files mean the same classes?"
    )


def _entry(image_id: Any, box_xyxy: FloatArray) -> dict[str, Any]:
    x0, y0, x1, y1 = (1000 * box_xyxy).tolist()  # of fractions, COCO's limits of sizes would make nothing of
    return {"image_id": image_id, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}


def _one_place(images: Sequence[_Image]) -> Iterator[str]:
    """How far the centres of an image's best detections lie apart, and those of the best detection from image to image."""

    def spread(boxes_xyxy: FloatArray) -> float:
        """Of the centres, in fractions of the image's sides: the mean standard deviation of x and y."""
        return float((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]).std(axis=0).mean() / 2)

    several = [image for image in images if len(image.scores) > 1]
    if not several:
        return
    objects = spread(np.concatenate([image.truth_xyxy for image in images]))
    within = float(np.median([spread(image.boxes_xyxy) for image in several]))
    if within < _ONE_PLACE * objects:
        yield (
            f"all detections of an image lie in one place (their centres vary by {within:.1%} of its sides, those of the objects "
            f"by {objects:.1%}): the queries have collapsed into one; start anew with a lower learning rate, or another "
            "--model.query-init"
        )
    elif len(several) > 1:
        across = spread(np.stack([image.boxes_xyxy[0] for image in several]))
        if across < _ONE_PLACE * objects:
            yield (
                f"the best detection is in the same place on every image (its centre varies by {across:.1%} of the sides, those of "
                f"the objects by {objects:.1%}): the network does not see yet what is on them; if that lasts, raise "
                "--optim.backbone-lr, or take --model.backbone.weights"
            )


def _low_scores(images: Sequence[_Image]) -> Iterator[str]:
    if not any(image.scores for image in images):
        yield "there is not a single detection on images that have objects"
        return
    best = max(score for image in images for score in image.scores)
    if best < DRAW_THRESHOLD:
        yield (
            f"no score is above {best:.2f}, where those of real objects usually start about {DRAW_THRESHOLD}: the network is sure "
            "of no object; if that lasts, many training images may lack their annotations"
        )
