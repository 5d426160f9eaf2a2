"""Why an object of an image was missed and why a box is false: the cause, and what was changed in the model to find it out.

An error is one at the score thresholds at which the model is used, at IoU 0.5, matched as COCO does. Causes are found by
intervention where one can be made: the decoder runs again on the same image with a query placed on the missed object, with other
widths, with the levels weighed otherwise, without the other queries (``smca.gpu.model.intervention``).

Shape letters: M decoder layers, N queries, h heads, J levels, K classes, T objects, D detections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from smca.datasets.batch import FloatArray
from smca.gpu.evaluation.boxes import coverage, ious
from smca.gpu.evaluation.operating_point import IOU
from smca.gpu.model.encoded import EncodedImage, Outcome
from smca.gpu.model.explanation import Explanation
from smca.gpu.model.intervention import Change

TOUCHING = 0.1
"""Least overlap of a loose box with its object, as in TIDE (Bolya et al., ECCV 2020)."""
COVERED = 0.4
"""Least value in the middle of an object (``coverage``) of Gaussians that look at it. The first layer's decide: later ones follow
what those saw."""
USUAL_WIDTHS = (0.03, 0.6)
"""Standard deviations of Gaussians, as a fraction of their object's side, that are neither too narrow nor too wide. Models that
train well have about 0.1."""
WIDTHS = {"narrow": (4.0, 8.0, 16.0), "wide": (1 / 4, 1 / 8, 1 / 16)}
"""How many times as wide Gaussians that are too narrow or too wide are tried."""
_FLAT = 1e9
"""Standard deviation in pixels that stands for that of a flat Gaussian."""
UNREAD = 0.02
"""Largest weight of a level that a query does not read."""

SEVERAL = 2
"""Layers in which a query must see an object where none is labelled, and queries besides its own."""
WITNESSES = 3
"""Queries that are asked."""
ALONE = 0.7
"""Of the threshold, what they must score: a query that looks alone scores less than it would among others."""

MISSED = {
    "width": "Gaussians far too narrow or too wide",
    "level": "the level that shows it is not read",
    "uncovered": "no query looked there",
    "class": "found under another class",
    "loose": "found with a loose box",
    "lost": "found by an earlier layer, then lost",
    "score": "boxed, but scored too low",
    "unboxed": "looked at, but not boxed",
    "silent": "its class output is as before training",
    "unknown": "its class was learned as background",
    "flat": "its annotated box has no area",
}
"""Why an object is missed, in the order in which it is asked; "silent" and "unknown" of a class as a whole, by ``find_errors``."""
FALSE = {
    "class": "on an object of another class",
    "loose": "a loose box on an object",
    "duplicate": "a second box on a found object",
    "unlabelled": "probably an object without a label",
    "background": "background taken for an object",
}
"""What a false box is, likewise."""
CAUSES = {"missed": MISSED, "false": FALSE}
CORRECTED = ("class", "loose")
"""Causes that are a miss and a false box in one: the box is about the object."""


@dataclass(frozen=True)
class Error:
    """A missed object or a false box."""

    kind: Literal["missed", "false"]
    cause: str
    """Of ``MISSED`` or ``FALSE``."""
    evidence: str
    image_id: int
    label: int
    box_xyxy: tuple[float, ...]
    """In pixels of the image."""
    score: float | None = None
    """Of a false box."""
    query: int | None = None
    """Which made the false box, or should have found the object."""
    query_box_xyxy: tuple[float, ...] | None = None
    """Of a missed object: the box of that query in the end."""
    query_label: int | None = None
    """Its best class."""
    query_score: float | None = None
    """The score of that class."""
    annotation: int | None = None
    """The object that it is about, as numbered in ``Objects``."""
    detection: int | None = None
    """Number of the false box, or of the one that corrects the miss, among the results of the image."""


@dataclass(frozen=True)
class Objects:
    """What the ground truth has in an image, crowds beside."""

    numbers: npt.NDArray[np.int64]
    """[T] places among the annotations."""
    boxes_xyxy: FloatArray
    labels: npt.NDArray[np.int64]
    crowds_xyxy: FloatArray
    crowd_labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """Detections of an image, best first."""

    scores: FloatArray
    labels: npt.NDArray[np.int64]
    boxes_xyxy: FloatArray
    queries: npt.NDArray[np.int64]


class ImageErrors:
    """The errors of one image, and the questions that find their causes."""

    def __init__(
        self, image_id: int, encoded: EncodedImage, objects: Objects, found: Found, thresholds: FloatArray
    ) -> None:
        """thresholds [K]: from which score on a detection counts; `found` has those below them too."""
        self.image_id, self.encoded, self.objects, self.thresholds = image_id, encoded, objects, thresholds
        self.found = found
        self.kept = np.flatnonzero(found.scores >= thresholds[found.labels])
        self.why: Explanation = encoded.explain(queries=range(encoded.model.config.num_queries), maps=False)
        self.overlaps = ious(self.why.boxes_xyxy, objects.boxes_xyxy)  # [M, N, T]
        self.owner, self.ignored = self._match()
        holders = [int(found.queries[d]) for d in self.owner.values()]
        self.free = np.setdiff1d(np.arange(len(self.why.queries)), holders)

    def _match(self) -> tuple[dict[int, int], set[int]]:
        """Which detection finds each object, as COCO decides; and detections on crowds, which count neither way."""
        owner: dict[int, int] = {}
        ignored: set[int] = set()
        overlaps = ious(self.found.boxes_xyxy, self.objects.boxes_xyxy)
        for d in self.kept.tolist():
            own_class = np.flatnonzero(self.objects.labels == self.found.labels[d]).tolist()
            if same := [t for t in own_class if t not in owner and overlaps[d, t] >= IOU]:
                owner[max(same, key=lambda t: overlaps[d, t])] = d
            elif self._in_crowd(d):
                ignored.add(d)
        return owner, ignored

    def _in_crowd(self, d: int) -> bool:
        x0, y0, x1, y1 = self.found.boxes_xyxy[d]
        crowds = self.objects.crowds_xyxy[self.objects.crowd_labels == self.found.labels[d]]
        common = np.minimum(crowds[:, 2:], [x1, y1]) - np.maximum(crowds[:, :2], [x0, y0])
        return bool((common.clip(0).prod(axis=1) >= IOU * (x1 - x0) * (y1 - y0)).any())

    def errors(self) -> list[Error]:
        """False boxes, best score first, then missed objects."""
        false = [
            self._false_box(d) for d in self.kept.tolist() if d not in self.owner.values() and d not in self.ignored
        ]
        corrected = {error.annotation: error for error in reversed(false) if error.cause in CORRECTED}
        missed = [
            self._missed(t, corrected.get(int(self.objects.numbers[t])))
            for t in range(len(self.objects.labels))
            if t not in self.owner
        ]
        return [*false, *missed]

    # Missed objects

    def _missed(self, t: int, corrected: Error | None) -> Error:
        label, box = int(self.objects.labels[t]), self.objects.boxes_xyxy[t]
        error = Error(
            "missed", "", "", self.image_id, label, tuple(box.tolist()), annotation=int(self.objects.numbers[t])
        )
        if min(box[2:] - box[:2]) <= 0:
            return replace(error, cause="flat", evidence="nobody can find it")
        query = self._nearest(t)
        for cause, evidence, named in self._causes(t, query, corrected):
            detection = corrected.detection if corrected is not None and cause in CORRECTED else None
            scores = self.why.scores[-1, named]
            return replace(
                error,
                cause=cause,
                evidence=evidence,
                query=named,
                query_box_xyxy=tuple(self.why.boxes_xyxy[-1, named].tolist()),
                query_label=int(scores.argmax()),
                query_score=float(scores.max()),
                detection=detection,
            )
        raise AssertionError("the last cause is always given")

    def _nearest(self, t: int) -> int:
        """The query that should have found an object: of those that found no other, the one with the best box, or the nearest."""
        free = self.free if len(self.free) else np.arange(len(self.why.queries))
        overlaps = self.overlaps[-1, free, t]
        if overlaps.max() > 0:
            return int(free[overlaps.argmax()])
        boxes, box = self.why.boxes_xyxy[-1, free], self.objects.boxes_xyxy[t]
        distance = boxes[:, :2] + boxes[:, 2:] - box[:2] - box[2:]
        return int(free[np.square(distance).sum(axis=1).argmin()])

    def _causes(self, t: int, query: int, corrected: Error | None) -> Iterator[tuple[str, str, int]]:
        """The causes that hold, the one that explains most first: cause, evidence, query."""
        label, box, why = int(self.objects.labels[t]), self.objects.boxes_xyxy[t], self.why
        placed = self._ask([self.encoded.placed(_circle(box, why.image_size))], t) if self.encoded.can_place else []
        seen = f"a query placed on it {self._says(placed[0], label)}" if placed else "its queries cannot be placed"
        yield from self._widths(t, query)
        yield from self._levels(t, query)
        if why.centers_xy is not None and why.sigmas_xy is not None:
            worth = coverage(why.centers_xy[0], why.sigmas_xy[0], why.level_weights[0], box)  # [N]
            if worth.max() < COVERED:
                told = f"in the first layer no query's Gaussians are worth more than {worth.max():.2f} in its middle"
                yield "uncovered", f"{told}; {seen}", int(worth.argmax())
        if corrected is not None:
            assert corrected.query is not None
            yield corrected.cause, corrected.evidence, corrected.query
        earlier = (self.overlaps[:-1, :, t] >= IOU) & (why.scores[:-1, :, label] >= self.thresholds[label])
        if earlier.any():
            m, n = (int(index[-1]) for index in np.nonzero(earlier))
            score = why.scores[m, n, label]
            yield (
                "lost",
                f"after layer {m + 1} query {n} scores {score:.2f}, in the end {why.scores[-1, n, label]:.2f}",
                n,
            )
        if self.overlaps[-1, query, t] >= IOU:
            others = tuple(n for n in range(len(why.queries)) if n != query)
            alone = self._ask([Change(query, without=others)], t)[0]
            scored = (
                f"the class scores {why.scores[-1, query, label]:.2f}, the threshold is {self.thresholds[label]:.2f}"
            )
            yield "score", f"{scored}; without the other queries it {self._says(alone, label)}", query
        yield "unboxed", f"its best box overlaps it by {self.overlaps[-1, query, t]:.2f}; {seen}", query

    def _widths(self, t: int, query: int) -> Iterator[tuple[str, str, int]]:
        if self.why.sigmas_xy is None:
            return
        label, box = int(self.objects.labels[t]), self.objects.boxes_xyxy[t]
        sigmas, weights = self.why.sigmas_xy[-1, query], self.why.level_weights[-1, query]  # [h, J, 2], [J]
        share = float(
            np.exp(np.log(np.minimum(sigmas, _FLAT)).mean(axis=(0, 2)) @ weights) / np.sqrt((box[2:] - box[:2]).prod())
        )
        least, most = USUAL_WIDTHS
        if least <= share <= most:
            return
        factors = WIDTHS["narrow" if share < least else "wide"]
        for change, answer in self._first_that_finds(
            [Change(n, sigma_factor=f) for n in (query, None) for f in factors], t
        ):
            factor, whose = change.sigma_factor, "it" if change.query is not None else "in all queries, one"
            told = f"{factor:g} times as wide" if factor > 1 else f"{1 / factor:g} times as narrow"
            measured = f"its Gaussians are {share:.3f} of the object's side wide"
            yield "width", f"{measured}; {told}, {whose} {self._says(answer, label)}", query

    def _levels(self, t: int, query: int) -> Iterator[tuple[str, str, int]]:
        weights = self.why.level_weights[:, query]  # [M, J]
        levels = weights.shape[1]
        unread = np.flatnonzero(weights.max(axis=0) <= UNREAD)
        if levels == 1 or not len(unread):
            return
        tried = [(1 / levels,) * levels, *(tuple(np.eye(levels)[j].tolist()) for j in unread)]
        for change, answer in self._first_that_finds(
            [Change(n, level_weights=w) for n in (query, None) for w in tried], t
        ):
            told = ", ".join(f"{weight:.2f}" for weight in change.level_weights or ())
            whose = "it" if change.query is not None else "in all queries, one"
            yield (
                "level",
                f"with levels weighed {told}, {whose} {self._says(answer, int(self.objects.labels[t]))}",
                query,
            )

    # Asking the model

    def _first_that_finds(self, changes: Sequence[Change], t: int) -> Iterator[tuple[Change, tuple[float, FloatArray]]]:
        """The first change under which object t is found, by the changed query or, if all are, by any; or none."""
        for change, answer in zip(changes, self._ask(changes, t), strict=True):
            if self._finds(answer, int(self.objects.labels[t])):
                yield change, answer
                return

    def _ask(self, changes: Sequence[Change], t: int) -> list[tuple[float, FloatArray]]:
        """What the changed query says in the end, or of all the one that finds object t best: how its box overlaps the object, and
        the scores of the classes."""
        label, found = int(self.objects.labels[t]), []
        for change, (scores, boxes) in zip(changes, self._answers(changes), strict=True):
            overlaps = ious(boxes, self.objects.boxes_xyxy[t][None])[:, 0]  # [N]
            n = int(((overlaps >= IOU) * scores[:, label]).argmax()) if change.query is None else change.query
            found.append((float(overlaps[n]), scores[n]))
        return found

    def _answers(self, changes: Sequence[Change]) -> list[tuple[FloatArray, FloatArray]]:
        """For each change the scores [N, K] and the boxes [N, 4] of all queries after the last layer."""
        outcome: Outcome = self.encoded.decode(changes)
        scores, boxes = (values[:, -1].double().cpu().numpy() for values in (outcome.scores, outcome.boxes_xyxy))
        return list(zip(scores, boxes, strict=True))

    def _finds(self, answer: tuple[float, FloatArray], label: int) -> bool:
        return bool(answer[0] >= IOU and answer[1][label] >= self.thresholds[label])

    def _says(self, answer: tuple[float, FloatArray], label: int) -> str:
        verb = "finds it" if self._finds(answer, label) else "does not find it"
        return f"{verb} (score {answer[1][label]:.2f}, overlap {answer[0]:.2f})"

    # False boxes

    def _false_box(self, d: int) -> Error:
        query, label = int(self.found.queries[d]), int(self.found.labels[d])
        box, score = self.found.boxes_xyxy[d], float(self.found.scores[d])
        error = Error("false", "", "", self.image_id, label, tuple(box.tolist()), score=score, query=query, detection=d)
        overlaps = ious(box[None], self.objects.boxes_xyxy)[0]  # [T]
        same = self.objects.labels == label
        missed = np.array([t not in self.owner for t in range(len(overlaps))], dtype=bool)

        def about(cause: str, t: int, evidence: str) -> Error:
            return replace(error, cause=cause, evidence=evidence, annotation=int(self.objects.numbers[t]))

        if len(t := np.flatnonzero(~same & missed & (overlaps >= IOU))):
            best = int(t[overlaps[t].argmax()])
            right = self.why.scores[-1, query, self.objects.labels[best]]
            return about("class", best, f"overlaps it by {overlaps[best]:.2f}; its own class scores {right:.2f}")
        if len(t := np.flatnonzero(~missed & (overlaps >= IOU))):
            best = int(t[overlaps[t].argmax()])
            finder = int(self.found.queries[self.owner[best]])
            who = "the same query" if finder == query else f"query {finder}"
            return about("duplicate", best, f"overlaps it by {overlaps[best]:.2f}; {who} found it already")
        if len(t := np.flatnonzero(same & missed & (overlaps >= TOUCHING))):
            best = int(t[overlaps[t].argmax()])
            return about("loose", best, f"overlaps it by {overlaps[best]:.2f}")
        if len(t := np.flatnonzero(~missed & (overlaps >= TOUCHING))):
            best = int(t[overlaps[t].argmax()])
            finder = int(self.found.queries[self.owner[best]])
            ((_, boxes),) = self._answers([Change(query, without=(finder,))])
            fits = float(ious(boxes[query][None], self.objects.boxes_xyxy[best][None])[0, 0])
            if finder != query and fits >= IOU:
                told = f"without query {finder}, which found it, this one does (overlap {fits:.2f})"
                return about("duplicate", best, told)
        return self._on_nothing(error, overlaps)

    def _on_nothing(self, error: Error, overlaps: FloatArray) -> Error:
        """Background, unless the box touches no object and several queries see one there over several layers: this one, and others
        that are placed there, each alone."""
        query, label, box = error.query, error.label, np.array(error.box_xyxy)
        assert query is not None
        layers, touches = len(self.why.scores), float(overlaps.max(initial=0))
        several = min(SEVERAL, layers)

        def agreeing(scores: FloatArray, boxes_xyxy: FloatArray, least: float) -> int:
            """In how many layers a query, [M, K] and [M, 4], sees the object; 0 if not in the last."""
            sees = (scores[:, label] >= least) & (ious(boxes_xyxy, box[None])[:, 0] >= IOU)
            return int(sees.sum()) if sees[-1] else 0

        threshold = float(self.thresholds[label])
        own = agreeing(self.why.scores[:, query], self.why.boxes_xyxy[:, query], threshold)
        told = (
            f"it overlaps no object by more than {touches:.2f}; {own} of {layers} layers score it above the threshold"
        )
        enough = len(self.why.queries) > WITNESSES and self.encoded.can_place
        if touches >= TOUCHING or own < several or not enough:
            return replace(error, cause="background", evidence=told)
        asked: list[Change] = []
        for _ in range(WITNESSES):
            known = [query, *(change.query for change in asked if change.query is not None)]
            asked.append(self.encoded.placed(_circle(box, self.why.image_size), known))
        outcome = self.encoded.decode(asked)
        witnesses = 0
        for row, change in enumerate(asked):
            scores, boxes = (
                x[row, :, change.query].double().cpu().numpy() for x in (outcome.scores, outcome.boxes_xyxy)
            )
            witnesses += agreeing(scores, boxes, ALONE * threshold) >= several
        told += f"; of {WITNESSES} other queries that are placed there {witnesses} see it too"
        return replace(error, cause="unlabelled" if witnesses >= SEVERAL else "background", evidence=told)


def _circle(box_xyxy: FloatArray, image_size: tuple[int, int]) -> tuple[float, float, float]:
    """An object's centre, and half the side of a square of its area; within the image."""
    height, width = image_size
    (x, y), sides = (box_xyxy[:2] + box_xyxy[2:]) / 2, box_xyxy[2:] - box_xyxy[:2]
    return float(np.clip(x, 0, width)), float(np.clip(y, 0, height)), float(np.sqrt(sides.prod()) / 2)
