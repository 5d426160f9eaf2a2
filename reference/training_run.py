"""Several training steps, and a checkpoint between them.

    1.  A run takes step after step (`training_step`), each with its images and its factor of the learning rates.
    2.  A checkpoint holds every array of a `TrainingState` under a name of its own, "place/parameter", and the number of steps.
    3.  A run that goes on starts from what a checkpoint holds, and from nothing else.

So a run that was stopped is the run that never stopped, number by number.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smca.reference.arrays import FloatArray
from smca.reference.optimizers import Moments
from smca.reference.small_detector import Params
from smca.reference.training_step import Shards, TrainingSettings, TrainingState, first_state, training_step


class TrainingStepInputs(NamedTuple):
    """What one step is given."""

    shards: Shards
    """The images, [process][part]."""
    factor: float = 1.0
    """Of the schedule."""


class Trajectory(NamedTuple):
    """A run of S steps, as it went."""

    loss: FloatArray
    """[S], of each step, before it moves anything."""
    gradient_norm: FloatArray
    """[S], before clipping."""
    params: dict[str, FloatArray]
    """Name → [S, …], after each step."""
    average: dict[str, FloatArray]
    """Likewise; without an average none."""


def checkpoint_of(state: TrainingState) -> dict[str, FloatArray]:
    """A checkpoint: every array by its name.

    >>> state = first_state({"a.weight": np.array([1.0])}, TrainingSettings(ema_decay=0.5))
    >>> sorted(checkpoint_of(state))
    ['average/a.weight', 'first/a.weight', 'params/a.weight', 'second/a.weight', 'steps']
    """
    arrays = {"steps": np.array(float(state.steps))}
    for place, values in (("params", state.params), ("average", state.average), ("momentum", state.momentum)):
        arrays |= {f"{place}/{name}": value for name, value in values.items()}
    for name, moments in state.moments.items():
        arrays |= {f"first/{name}": moments.first, f"second/{name}": moments.second}
    return arrays


def restored(arrays: Mapping[str, FloatArray]) -> TrainingState:
    """The state that a checkpoint was saved of.

    >>> state = first_state({"a.weight": np.array([1.0])}, TrainingSettings(ema_decay=0.5))
    >>> restored(checkpoint_of(state)) == state
    True
    """
    places: dict[str, dict[str, FloatArray]] = {
        place: {} for place in ("params", "average", "momentum", "first", "second")
    }
    for key, value in arrays.items():
        place, _, name = key.partition("/")
        if name:
            places[place][name] = value
    moments = {name: Moments(places["first"][name], places["second"][name]) for name in places["params"]}
    steps = int(arrays["steps"])
    return TrainingState(places["params"], places["average"], moments, places["momentum"], steps)


def training_run(params: Params, steps: Sequence[TrainingStepInputs], settings: TrainingSettings) -> Trajectory:
    """A run. After `settings.resume_after` steps it is saved, and goes on from what was saved.

    Args:
        params: at its start (`small_detector.parameter_shapes`).
        steps: S of them, at least 1.
        settings: of the run.

    Raises:
        ValueError: as `training_step`.

    Two steps on nothing but background, from weights of 0: the bias of the class head moves by the learning rate each time,
    and the average follows, at first at 0.1 and 2/11 of what it was (`optimizers` (O8)).

    >>> from smca.reference.losses import Targets
    >>> from smca.reference.small_detector import Sizes, parameter_shapes
    >>> zeros = {n: np.zeros(s) for n, s in parameter_shapes(Sizes(inputs=1, channels=2, classes=1, layers=1)).items()}
    >>> nothing = Targets(np.zeros((1, 0), dtype=int), np.zeros((1, 0, 4)), np.zeros((1, 0), dtype=bool))
    >>> step = TrainingStepInputs([[(np.ones((1, 1, 1)), nothing)]])
    >>> trajectory = training_run(zeros, [step, step], TrainingSettings(lr=1e-3, ema_decay=0.9, resume_after=1))
    >>> trajectory.params["class_head.bias"].ravel().round(5).tolist()
    [-0.001, -0.002]
    >>> trajectory.average["class_head.bias"].ravel().round(5).tolist()
    [-0.0009, -0.0018]
    """
    state, states, numbers = first_state(params, settings), [], []
    for inputs in steps:
        state, of_step = training_step(state, inputs.shards, settings, inputs.factor)
        states.append(state)
        numbers.append(of_step)
        if state.steps == settings.resume_after:
            state = restored(checkpoint_of(state))
    return Trajectory(
        np.array([n.loss for n in numbers]),
        np.array([n.gradient_norm for n in numbers]),
        {name: np.stack([s.params[name] for s in states]) for name in state.params},
        {name: np.stack([s.average[name] for s in states]) for name in state.average},
    )
