"""What a failure depends on: tries the smallest failing example again, made simpler in one way at a time."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from hypothesis.errors import HypothesisException

from smca.conformance.inputs.attention import AttentionArrays, AttentionInputs, LevelsArrays, LevelsInputs
from smca.conformance.inputs.matching import LossArrays, LossInputs
from smca.conformance.inputs.model import ModelInputs
from smca.conformance.inputs.softmax import OddsInputs, SoftmaxLossInputs
from smca.conformance.inputs.training import TrainingInputs
from smca.conformance.property import Judge
from smca.conformance.protocol import name_of
from smca.conformance.runner import Outcome
from smca.reference.attention import Level
from smca.reference.losses import Targets


class _Changed:
    """A recipe whose arrays are changed after they are drawn."""

    def __init__(self, recipe: Any, change: Callable[[Any], Any]) -> None:
        self.recipe, self.change = recipe, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    def arrays(self, dtype: str) -> Any:
        return self.change(self.recipe.arrays(dtype))


def describe_simplifications(outcome: Outcome) -> str:
    """Lines that list the simplifications with which the smallest failing example passes or still fails."""
    if outcome.status != "failed" or not outcome.failing:
        return ""
    case, by_result = outcome.case, dict[bool, list[str]]()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for words, recipe in simpler(outcome.failing[-1]):
            judge = Judge(case.prop, name_of(case.implementation), case.dtype, recipe)
            try:
                case.prop.check(case.implementation, recipe, case.dtype, judge)
            except HypothesisException:
                continue  # not an example of this property
            except Exception:  # a mismatch, or an error of the implementation
                by_result.setdefault(False, []).append(words)
            else:
                if judge.worst.ratio >= 0 or outcome.worst.ratio < 0:  # otherwise nothing was left to compare
                    by_result.setdefault(True, []).append(words)
    lines = [("    it passes with: ", by_result.get(True)), ("    it still fails with: ", by_result.get(False))]
    return "\n".join(start + ", ".join(words) for start, words in lines if words)


def simpler(recipe: Any) -> Iterator[tuple[str, Any]]:
    """Recipes that are simpler than this one in one way, each after its description in words."""
    if isinstance(recipe, AttentionInputs):
        yield from _simpler_shapes(recipe)
        x = recipe.arrays("float64")
        for words, of_q, of_level in _CHANGES:
            if of_q(x.q) is not x.q or of_level(x.level) is not x.level:
                yield words, _Changed(recipe, functools.partial(_of_attention, of_q, of_level))
    elif isinstance(recipe, LevelsInputs):
        if len(recipe.sizes) > 1:
            yield "the first level alone", dataclasses.replace(recipe, sizes=recipe.sizes[:1])
        for words, first in _simpler_shapes(recipe.first):
            if words != "a square map":
                yield words, dataclasses.replace(recipe, first=first)
        if any(rows != columns for rows, columns in recipe.sizes):
            yield "square maps", dataclasses.replace(recipe, sizes=tuple((max(size),) * 2 for size in recipe.sizes))
        levels = recipe.arrays("float64")
        for words, of_q, of_level in _CHANGES:
            if of_q(levels.q) is not levels.q or any(of_level(level) is not level for level in levels.levels):
                yield words, _Changed(recipe, functools.partial(_of_levels, of_q, of_level))
    elif isinstance(recipe, LossInputs):
        smaller: list[tuple[str, str, Any]] = [
            ("one layer", "layers", 1),
            ("one image", "batch", 1),
            ("one class", "classes", 1),
            ("no padding among the targets", "filled", 1.0),
            ("no target", "targets", 0),
        ]
        for words, field, value in smaller:
            if getattr(recipe, field) != value:
                yield words, dataclasses.replace(recipe, **{field: value})
        if recipe.targets > recipe.queries:
            yield "as many queries as targets", dataclasses.replace(recipe, queries=recipe.targets)
        valid = recipe.arrays("float64").targets.valid
        if (np.diff(valid.astype(int), axis=1) > 0).any():
            yield "the padding behind the objects", _Changed(recipe, _padding_last)
    elif isinstance(recipe, SoftmaxLossInputs):
        for words, loss in simpler(recipe.loss):
            if isinstance(loss, LossInputs):
                yield words, dataclasses.replace(recipe, loss=loss)
    elif isinstance(recipe, OddsInputs):
        fewer: list[tuple[str, str, Any]] = [
            ("one query", "queries", 1),
            ("one class", "classes", 1),
            ("no shift", "shift", 0.0),
        ]
        for words, field, value in fewer:
            if getattr(recipe, field) != value:
                yield words, dataclasses.replace(recipe, **{field: value})
    elif isinstance(recipe, TrainingInputs):
        plainer: list[tuple[str, str, Any]] = [
            ("one step", "steps", 1),
            ("one process", "processes", 1),
            ("one part", "parts", 1),
            ("one image a part", "images", 1),
            ("one layer", "layers", 1),
            ("no padding among the targets", "filled", 1.0),
            ("AdamW for all", "optimizer", "adamw"),
            ("no decay", "weight_decay", 0.0),
            ("no clipping", "clip_norm", 0.0),
            ("no average", "ema_decay", 0.0),
            ("no stop", "resume_after", 0),
            ("no scale of the loss", "loss_scale", 1.0),
        ]
        for words, field, value in plainer:
            if getattr(recipe, field) != value:
                yield words, dataclasses.replace(recipe, **{field: value})
    elif isinstance(recipe, ModelInputs):
        for name, value in recipe.options:
            rest = tuple(option for option in recipe.options if option[0] != name)
            yield f"another {name} than {value!r}", dataclasses.replace(recipe, options=rest)
        if len(recipe.sizes) > 1:
            yield "the first image alone", dataclasses.replace(recipe, sizes=recipe.sizes[:1])


def _simpler_shapes(recipe: AttentionInputs) -> Iterator[tuple[str, AttentionInputs]]:
    smaller: list[tuple[str, str, Any]] = [
        ("one image", "batch", 1),
        ("one head", "heads", 1),
        ("one query", "queries", 1),
        ("one channel", "channels", 1),
        ("a square map", "size", (max(recipe.size),) * 2 if recipe.size[0] != recipe.size[1] else recipe.size),
    ]
    for words, field, value in smaller:
        if getattr(recipe, field) != value:
            yield words, dataclasses.replace(recipe, **{field: value})


def _without_axis(level: Level, axis: int) -> Level:
    if not level.precision_xy[..., axis].any():
        return level
    precision = level.precision_xy.copy()
    precision[..., axis] = 0.0
    return level._replace(precision_xy=precision)


_CHANGES: list[tuple[str, Callable[[Any], Any], Callable[[Level], Level]]] = [
    ("q = 0", lambda q: q if not q.any() else np.zeros_like(q), lambda level: level),
    (
        "λ = 0",
        lambda q: q,
        lambda level: (
            level._replace(precision_xy=np.zeros_like(level.precision_xy)) if level.precision_xy.any() else level
        ),
    ),
    ("λ_x = 0", lambda q: q, lambda level: _without_axis(level, 0)),
    ("λ_y = 0", lambda q: q, lambda level: _without_axis(level, 1)),
    (
        "no mask",
        lambda q: q,
        lambda level: level if level.key_padding_mask is None else level._replace(key_padding_mask=None),
    ),
]
"""(Description, change of q, change of a level); a change returns its argument itself if it has nothing to do."""


def _of_attention(of_q: Callable[[Any], Any], of_level: Callable[[Level], Level], x: AttentionArrays) -> Any:
    return x._replace(q=of_q(x.q), level=of_level(x.level))


def _of_levels(of_q: Callable[[Any], Any], of_level: Callable[[Level], Level], x: LevelsArrays) -> Any:
    return x._replace(q=of_q(x.q), levels=[of_level(level) for level in x.levels])


def _padding_last(x: LossArrays) -> LossArrays:
    order = np.argsort(~x.targets.valid, axis=1, kind="stable")
    image, targets = np.arange(len(order))[:, None], x.targets
    return x._replace(
        targets=Targets(targets.labels[image, order], targets.boxes[image, order], targets.valid[image, order])
    )
