"""Why AP is zero: each cause is told in the situation that it makes, and not in the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from smca.datasets import SyntheticShapes
from smca.datasets.boxes import check_boxes
from smca.datasets.table import AnnotationTable, table_of, table_of_truth
from smca.gpu.config import RunConfig
from smca.gpu.evaluation import evaluate_detections, why_ap_is_zero
from smca.gpu.presets import PRESETS

TRAIN, VAL = SyntheticShapes(40, 0), SyntheticShapes(20, 1)


@dataclass
class Situation:
    """A run whose detections are noise of every kind: nothing of the known causes."""

    config: RunConfig = field(default_factory=PRESETS["demo"])
    losses: tuple[float, ...] = (20.0, 12.0)
    step: int = 3000
    truth: dict[str, Any] = field(default_factory=VAL.ground_truth)
    train: AnnotationTable = field(default_factory=lambda: table_of(TRAIN))
    detections: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        for image in self.truth["images"]:
            for _ in range(10):
                x, y, w, h = rng.uniform(0, 1, 4) * (100, 100, 6, 6)
                self.detections.append(self.detection(image["id"], [x, y, w, h], int(rng.integers(1, 6)), rng.random()))

    @staticmethod
    def detection(image_id: int, bbox: list[float], category_id: int, score: float) -> dict[str, Any]:
        return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": float(score)}

    def causes(self, ap: float | None = 0.0) -> list[str]:
        steps = np.linspace(0, self.step, len(self.losses) + 1)[1:].astype(int).tolist()
        history = [{"step": step, "loss": loss, "ap": ap} for step, loss in zip(steps, self.losses, strict=True)]
        val = table_of_truth(self.truth)
        return why_ap_is_zero(self.config, history, self.truth, self.detections, self.train, val)


def on_objects(situation: Situation, name_of: Callable[[int], int]) -> None:
    """Perfect boxes, of the classes that `name_of` makes of theirs."""
    situation.detections = [
        situation.detection(a["image_id"], a["bbox"], name_of(a["category_id"]), 0.9)
        for a in situation.truth["annotations"]
    ]


def rate(situation: Situation, losses: tuple[float, ...], **optim: Any) -> None:
    situation.losses = losses
    situation.config = dataclasses.replace(
        situation.config, optim=dataclasses.replace(situation.config.optim, **{"optimizer": "adamw", **optim})
    )


def few_steps(situation: Situation) -> None:
    situation.step = 40


def few_steps_for_detr(situation: Situation) -> None:
    situation.step = 2000
    situation.config = PRESETS["detr_r50"]()


def loss_rises(situation: Situation) -> None:
    rate(situation, (10.0, 12.0), lr=4e-4)


def rate_too_high(situation: Situation) -> None:
    rate(situation, (10.0, 9.9), lr=0.1)


def rate_too_low(situation: Situation) -> None:
    rate(situation, (10.0, 9.9), lr=1e-7)


def rate_usual(situation: Situation) -> None:
    rate(situation, (10.0, 9.9), lr=2e-4)


def tiny_objects(situation: Situation) -> None:
    model = dataclasses.replace(situation.config.model, strides=(64,))
    situation.config = dataclasses.replace(situation.config, model=model)


def untrained_classes(situation: Situation) -> None:
    situation.train = dataclasses.replace(situation.train, crowd=situation.train.labels != 0)


def trained_on_small_ones(situation: Situation) -> None:
    small = check_boxes(situation.train.boxes_xywh * [1, 1, 0.1, 0.1], np.full((len(situation.train.labels), 2), 128.0))
    situation.train = dataclasses.replace(situation.train, checked=small)


def one_class_named(situation: Situation) -> None:
    for detection in situation.detections:
        detection["category_id"] = 3


def permuted_classes(situation: Situation) -> None:
    on_objects(situation, lambda category: category % 5 + 1)


def queries_collapsed(situation: Situation) -> None:
    for number, detection in enumerate(situation.detections):
        detection["bbox"] = [50 + number % 3, 60 + number % 2, 8, 8]


def same_on_every_image(situation: Situation) -> None:
    for number, detection in enumerate(situation.detections):
        x, y = number % 10 % 5 * 20, number % 10 // 5 * 40
        detection.update(bbox=[x, y, 4, 4], score=0.9 - number % 10 / 100)


def low_scores(situation: Situation) -> None:
    for detection in situation.detections:
        detection["score"] /= 10


def nothing_detected(situation: Situation) -> None:
    situation.detections = []


SITUATIONS: dict[Callable[[Situation], None], str] = {
    few_steps: "40 steps are few: the first objects are usually found after 500",
    few_steps_for_detr: "2,000 steps are few: the first objects are usually found after 2,500",
    loss_rises: "the loss does not fall (10.00 up to step 1,500, now 12.00): the learning rate is too high; try --optim.lr 0.00013",
    rate_too_high: "the learning rate is too high; try --optim.lr 0.0004",
    rate_too_low: "the learning rate is too low; try --optim.lr 0.0001",
    rate_usual: "the learning rate is too high or too low; try --optim.lr 6.7e-05, and 0.0006",
    tiny_objects: "less than a cell of 64×64 pixels across after the resize: --model.strides",
    untrained_classes: "held-out objects are of classes of which there is no box to train on: rectangle, triangle, ring, cross",
    trained_on_small_ones: "held-out objects are larger than nearly all that are trained on",
    one_class_named: "the best detections name only triangle, never",
    permuted_classes: "but under other names: ",
    queries_collapsed: "all detections of an image lie in one place",
    same_on_every_image: "the best detection is in the same place on every image",
    low_scores: "no score is above 0.10, where those of real objects usually start about 0.35",
    nothing_detected: "there is not a single detection",
}


@pytest.mark.parametrize("make", SITUATIONS, ids=lambda make: make.__name__)
def test_a_cause_is_told_where_it_is_one(make: Callable[[Situation], None]) -> None:
    situation = Situation()
    make(situation)
    assert evaluate_detections(situation.truth, situation.detections).ap < 0.0005
    causes = situation.causes()
    assert len(causes) == 1, causes
    assert SITUATIONS[make] in causes[0]
    assert situation.causes(ap=0.01) == [], "only where AP is zero"
    assert situation.causes(ap=None) == [], "nothing to find is no AP of zero"


def test_names_that_were_exchanged_are_told() -> None:
    situation = Situation()
    permuted_classes(situation)
    (cause,) = situation.causes()
    assert "AP50 without regard to classes: 1.00" in cause
    assert "disc is called rectangle (100%)" in cause


def test_without_a_known_cause_what_to_try_is_told() -> None:
    (cause,) = Situation().causes()
    assert cause.startswith("after 3,000 steps, and none of the usual causes shows")


def test_losses_that_say_nothing() -> None:
    for losses in ((10.0,), (float("nan"), 10.0)):
        situation = Situation()
        situation.losses = losses
        assert "none of the usual causes" in situation.causes()[0]
