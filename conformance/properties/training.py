"""What must be true of a training run: equality with the specification, and that what should not matter does not.

`training_alone.py` has what follows from the definitions of optimiser, average and loss, with no other run to compare with.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.matching import LossArrays
from smca.conformance.inputs.training import (
    USUAL_TRAINING,
    TrainingArrays,
    TrainingInputs,
    joined,
    merged,
    training_inputs,
)
from smca.conformance.properties.loss import clear_matching
from smca.conformance.property import Judge, Property, assume, property_of
from smca.conformance.tolerances import UNIT_ROUNDOFF
from smca.reference import losses
from smca.reference.losses import Targets
from smca.reference.small_detector import forward
from smca.reference.training_run import TrainingStepInputs, Trajectory, training_run
from smca.reference.training_step import first_state, gradient_of, training_step

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

WHOLE = ("float64", "float32")
STEP = "reference/training_step.py, equations (R1) to (R8), with those of losses, losses_backward and optimizers"
DEALT = "reference/training_step.py, (R1) to (R4): sums over all images divided by all objects, however the images are dealt out"
NUDGE = {"float64": 2.0**-30, "float32": 2.0**-22}
"""Relative, in measuring how far a run moves; for float32 of the size of its roundings, so that what is not smooth shows."""


def run(impl: Any, x: TrainingArrays, dtype: str) -> Trajectory:
    found = impl.train(x.params, x.steps, x.settings, dtype=dtype)
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}
    params, average = (
        {name.removeprefix(place): value for name, value in arrays.items() if name.startswith(place)}
        for place in ("params.", "average.")
    )
    return Trajectory(arrays["loss"], arrays["gradient_norm"], params, average)


def expected_and_limits(recipe: TrainingInputs, dtype: str) -> tuple[Trajectory, Trajectory]:
    """The oracle's run, and the bound of every entry: u · the condition number, measured. Twice the run is taken again with all
    images, and before every step all parameters, moved by a relative amount of random sign: how far loss, norm and the entry of a
    parameter that moves the farthest have moved after a step, per unit of that amount.

    An example is left out where rounding decides something: which query is matched, on which side of an object's box an edge
    lies, or the sign of an entry of the first gradient, by which alone AdamW takes its first step.
    """
    found = _expected_and_limits(recipe, dtype)
    assume(found is not None)
    assert found is not None
    return found


@functools.lru_cache(maxsize=256)
def _expected_and_limits(recipe: TrainingInputs, dtype: str) -> tuple[Trajectory, Trajectory] | None:
    """The same for every implementation; None for an example that is left out."""
    x, rng = recipe.arrays(dtype), np.random.default_rng(recipe.seed)
    expected, first = training_run(*x), gradient_of(x.params, x.steps[0].shards, x.settings)[1]
    u, size, nudged = UNIT_ROUNDOFF[dtype], NUDGE[dtype], []
    for _ in range(2):
        nudged.append(_nudged(x, rng, size))
        moved = gradient_of(nudged[-1][0][0], x.steps[0].shards, x.settings)[1]
        if not all((np.abs(moved[name] - g) <= 0.05 * np.abs(g)).all() for name, g in first.items()):
            return None
    if not _clear(x, expected, [before for before, _ in nudged], dtype):
        return None

    def limit(of: Any) -> Array:
        value = of(expected)
        axes = tuple(range(1, value.ndim))
        distance = np.max([np.abs(of(other) - value).max(axis=axes, keepdims=True) for _, other in nudged], axis=0)
        rounds = np.arange(2, len(value) + 2).reshape(-1, *[1] * len(axes))
        bound: Array = u * (distance / size + rounds * (np.abs(value) + 1e-3))
        return bound

    limits = Trajectory(
        limit(lambda t: t.loss),
        limit(lambda t: t.gradient_norm),
        {name: limit(lambda t, n=name: t.params[n]) for name in expected.params},
        {name: limit(lambda t, n=name: t.average[n]) for name in expected.average},
    )
    return expected, limits


def _nudged(x: TrainingArrays, rng: np.random.Generator, size: float) -> tuple[list[dict[str, Array]], Trajectory]:
    """The run with everything nudged, after the parameters before each of its steps."""

    def nudge(values: Array) -> Array:
        return values * (1 + size * rng.choice([-1, 1], values.shape))

    state, before, after, numbers = first_state(x.params, x.settings), [], [], []
    for step in x.steps:
        state = state._replace(params={name: nudge(value) for name, value in state.params.items()})
        shards = [[(nudge(images), targets) for images, targets in parts] for parts in step.shards]
        before.append(state.params)
        state, of_step = training_step(state, shards, x.settings, step.factor)
        after.append(state)
        numbers.append(of_step)
    params, average = (
        {name: np.stack([values[name] for values in of]) for name in of[0]}
        for of in ([s.params for s in after], [s.average for s in after])
    )
    loss, norm = np.array([n.loss for n in numbers]), np.array([n.gradient_norm for n in numbers])
    return before, Trajectory(loss, norm, params, average)


def _clear(x: TrainingArrays, expected: Trajectory, nudged: list[list[dict[str, Array]]], dtype: str) -> bool:
    """Whether matchings and the sides of boxes survive rounding at every step."""
    for number, step in enumerate(x.steps):
        before = x.params if number == 0 else {name: value[number - 1] for name, value in expected.params.items()}
        for images, targets in (part for parts in step.shards for part in parts):
            outputs = forward(before, images)
            if not clear_matching(
                LossArrays(outputs["logits"], outputs["boxes"], targets, dict(x.settings.weights)),
                dtype,
                x.settings.classification,
            ):
                return False
            moved = [forward(params[number], images)["boxes"] for params in nudged]
            far = max(float(np.abs(boxes - outputs["boxes"]).max(initial=0.0)) for boxes in moved)
            query = losses.match(
                outputs["logits"], outputs["boxes"], targets, x.settings.weights, x.settings.classification
            )
            layer, image, target = np.nonzero(query >= 0)
            ours = outputs["boxes"][layer, image, query[layer, image, target]]
            apart = _edges(ours) - _edges(targets.boxes[image, target])
            if (
                np.abs(apart).min(initial=np.inf)
                < 8 * far * UNIT_ROUNDOFF[dtype] / NUDGE[dtype] + 8 * UNIT_ROUNDOFF[dtype]
            ):
                return False
    return True


def _edges(boxes: Array) -> Array:
    """[P, 8]: a box as cxcywh and as xyxy."""
    return np.concatenate([boxes, boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=-1)


def compare(got: Trajectory, want: Trajectory, limits: Trajectory, judge: Judge, prefix: str = "") -> None:
    """Loss, norm, parameters and average after every step."""
    judge.close(got.loss, want.loss, limits.loss, f"{prefix}loss")
    judge.close(got.gradient_norm, want.gradient_norm, limits.gradient_norm, f"{prefix}norm of the gradient")
    for of in ("params", "average"):
        found, wanted, bounds = getattr(got, of), getattr(want, of), getattr(limits, of)
        judge.holds(sorted(found) == sorted(wanted), f"{prefix}{of}: got {sorted(found)}, expected {sorted(wanted)}")
        for name in wanted:
            judge.close(found[name], wanted[name], bounds[name], f"{prefix}{of} {name}")


def compare_with(impl: Any, recipe: TrainingInputs, other: TrainingArrays, dtype: str, judge: Judge, how: str) -> None:
    """An implementation's run of `recipe`, against another one of its own that has to be the same."""
    _, limits = expected_and_limits(recipe, dtype)
    twice = Trajectory(
        2 * limits.loss,
        2 * limits.gradient_norm,
        *({name: 2 * value for name, value in of.items()} for of in (limits.params, limits.average)),
    )
    compare(run(impl, recipe.arrays(dtype), dtype), run(impl, other, dtype), twice, judge, how)


@property_of(
    "train.equals_the_oracle",
    "loss, norm of the gradient, parameters and their average after each step equal the oracle's",
    STEP,
    training_inputs(),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.5,
    always=USUAL_TRAINING,
)
def run_equals_the_oracle(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    expected, limits = expected_and_limits(recipe, dtype)
    compare(run(impl, x, dtype), expected, limits, judge)


UNEVEN = TrainingInputs(
    steps=3,
    parts=2,
    images=1,
    filled=0.4,
    objects=3,
    classes=3,
    clip_norm=0.1,
    ema_decay=0.9,
    decayed="weights",
    seed=10,
)
"""Parts with unequally many objects."""


@property_of(
    "train.accumulation",
    "a step in two parts is the step in one: loss, gradient, clipping, average",
    DEALT,
    training_inputs(parts=2, steps=st.sampled_from([3, 1])),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
    always=[UNEVEN],
)
def accumulation(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    whole = x._replace(steps=[merged(step, processes=False) for step in x.steps])
    compare_with(impl, recipe, whole, dtype, judge, "in two parts and in one, ")


@property_of(
    "train.processes",
    "a step in two processes is the step in one, with unequally many objects in them",
    DEALT,
    training_inputs(processes=2, parts=st.integers(1, 2), steps=st.sampled_from([3, 1])),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.1,
    always=[replace(UNEVEN, processes=2)],
)
def processes(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    whole = x._replace(steps=[merged(step, processes=True) for step in x.steps])
    compare_with(impl, recipe, whole, dtype, judge, "in two processes and in one, ")


@property_of(
    "train.resume",
    "a run that is saved and goes on is the run that never stopped, average and momentum included",
    "reference/training_run.py, 1 to 3",
    training_inputs(steps=st.sampled_from([6, 3]), ema_decay=st.sampled_from([0.9, 0.5]), resume_after=1),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def resume(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    other = x._replace(settings=replace(x.settings, resume_after=0))
    compare_with(impl, recipe, other, dtype, judge, "resumed and without stopping, ")


@property_of(
    "train.loss_scale",
    "scaling the loss by a power of two changes nothing: the gradient is divided by it before it is measured and clipped",
    "reference/training_step.py, (R3) to (R5)",
    training_inputs(steps=st.sampled_from([3, 1]), clip_norm=0.1, loss_scale=st.sampled_from([1024.0, 65536.0])),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def loss_scale(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    other = x._replace(settings=replace(x.settings, loss_scale=1.0))
    compare_with(impl, recipe, other, dtype, judge, "scaled and without a scale, ")


@property_of(
    "train.padding_and_order",
    "padding of targets, NaN included, and the order of images and objects change nothing, nor does which part an image is in",
    DEALT + "; method.md §5: the padding of targets is no object",
    training_inputs(steps=st.sampled_from([3, 1]), images=2),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def padding_and_order(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x, rng = recipe.arrays(dtype), np.random.default_rng(recipe.seed)
    other = x._replace(steps=[_dealt_anew(step, rng) for step in x.steps])
    compare_with(impl, recipe, other, dtype, judge, "in this order and another, ")


def _dealt_anew(step: TrainingStepInputs, rng: np.random.Generator) -> TrainingStepInputs:
    images, targets = joined([part for parts in step.shards for part in parts])
    image, target = rng.permutation(len(images)), rng.permutation(targets.valid.shape[1])
    wide = [(0, 0), (1, 2)]
    valid = np.pad(targets.valid[image][:, target], wide)
    labels = np.where(valid, np.pad(targets.labels[image][:, target], wide), 0)
    boxes = np.where(valid[..., None], np.pad(targets.boxes[image][:, target], [*wide, (0, 0)]), np.nan)
    size, shards = len(step.shards[0][0][0]), []
    for start in range(0, len(images), size):
        own = slice(start, start + size)
        shards.append((images[image][own], Targets(labels[own], boxes[own], valid[own])))
    parts = len(step.shards[0])
    return TrainingStepInputs([shards[p : p + parts] for p in range(0, len(shards), parts)], step.factor)


@property_of(
    "train.classes",
    "renaming the classes renames the rows of the class head, and changes nothing else: no class is another one's, or none",
    'method.md §5: every class has a sigmoid of its own; there is none for "no object"',
    training_inputs(steps=st.sampled_from([3, 1]), classes=st.integers(3, 5), kind=st.just(("adamw", 6, 6))),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def classes(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x, rng = recipe.arrays(dtype), np.random.default_rng(recipe.seed)
    # Two classes exchanged: a shift of all of them by one would pass unseen under another shift.
    order = np.arange(recipe.classes)
    one, two = rng.choice(recipe.classes, 2, replace=False)
    order[[one, two]] = order[[two, one]]

    def renamed(values: dict[str, Array], axis: int) -> dict[str, Array]:
        return {n: np.take(v, order, axis) if n.startswith("class_head.") else v for n, v in values.items()}

    steps = []
    for step in x.steps:
        shards = [[(images, replace(t, labels=order[t.labels])) for images, t in parts] for parts in step.shards]
        steps.append(TrainingStepInputs(shards, step.factor))
    _, limits = expected_and_limits(recipe, dtype)
    want, got = run(impl, x, dtype), run(impl, x._replace(params=renamed(x.params, 0), steps=steps), dtype)
    twice = Trajectory(
        2 * limits.loss, 2 * limits.gradient_norm, *({n: 2 * v for n, v in renamed(of, 1).items()} for of in limits[2:])
    )
    renamed_want = want._replace(params=renamed(want.params, 1), average=renamed(want.average, 1))
    compare(got, renamed_want, twice, judge, "with classes renamed, ")
