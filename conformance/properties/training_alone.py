"""What a training run must do by the definitions of optimiser, average and loss: every number here is worked out from
the run itself or from a formula, not from the specification's run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.training import TrainingArrays, TrainingInputs, training_inputs
from smca.conformance.properties.training import WHOLE, expected_and_limits, run
from smca.conformance.property import Judge, Property, assume, property_of
from smca.conformance.tolerances import UNIT_ROUNDOFF

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []


def before_and_after(x: TrainingArrays, params: dict[str, Array], name: str) -> Array:
    """[S + 1, …]: a parameter at the start and after each step."""
    return np.concatenate([x.params[name][None], params[name]])


def adamws_rate(x: TrainingArrays, name: str) -> float:
    return x.settings.backbone_lr if name.startswith("backbone.") else x.settings.lr


def taken_by_muon(x: TrainingArrays, name: str) -> bool:
    inside = name == "backbone.weight" or (name.startswith("layers.") and name.endswith(".weight"))
    return x.settings.optimizer == "muon" and inside and min(x.params[name].shape) >= 16


@property_of(
    "train.average_follows",
    "after each step the average has moved once, by 1 − δ towards the parameters, from the first weights on and across a stop",
    "reference/optimizers.py, (O8): average ← δ_t·average + (1 − δ_t)·θ with δ_t = min(δ, (1 + t)/(10 + t)), once per step",
    training_inputs(
        ema_decay=st.sampled_from([0.9, 0.5, 0.3]), steps=st.sampled_from([6, 3]), resume_after=st.integers(0, 1)
    ),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def average_follows(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    got, u = run(impl, x, dtype), UNIT_ROUNDOFF[dtype]
    judge.holds(
        sorted(got.average) == sorted(x.params), f"averages of {sorted(got.average)}, expected {sorted(x.params)}"
    )
    for name, params in got.params.items():
        last = x.params[name]
        for t, (average, param) in enumerate(zip(got.average[name], params, strict=True)):
            kept = min(x.settings.ema_decay, (1 + t) / (10 + t))
            size = np.abs(last) + np.abs(param)
            judge.close(
                average, kept * last + (1 - kept) * param, 4 * u * size, f"average of {name} after step {t + 1} "
            )
            last = average


@property_of(
    "train.decay_alone",
    "with a loss of weight 0, decayed parameters shrink by 1 − η·λ per step and nothing else moves: norms and biases where only "
    "weights decay, and Muon's matrices",
    "reference/optimizers.py, (O2), and training_step.py, (R8): the decay acts on the parameter, at the rate of its group",
    training_inputs(steps=st.sampled_from([3, 1]), weighting=st.just((0.0, 0.0, 0.0)), weight_decay=0.5),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.5,
)
def decay_alone(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    got, u = run(impl, x, dtype), UNIT_ROUNDOFF[dtype]
    judge.close(got.gradient_norm, np.zeros(recipe.steps), 0.0, "norm of the gradient")
    for name, params in got.params.items():
        spared = x.settings.decayed == "weights" and (name.startswith("norm.") or name.endswith(".bias"))
        decay = 0.0 if spared or taken_by_muon(x, name) else x.settings.weight_decay
        factors = np.cumprod([1 - step.factor * adamws_rate(x, name) * decay for step in x.steps])
        want = x.params[name] * factors.reshape(-1, *[1] * x.params[name].ndim)
        judge.close(params, want, 2 * recipe.steps * u * np.abs(x.params[name]), f"{name}")


@property_of(
    "train.first_step",
    "AdamW's first step moves every entry by the rate of its group, Muon's every matrix by singular values of about its rate",
    "reference/optimizers.py, (O4) at s = 1: η·g/(|g| + ε); (O6) and (O7): η·√max(1, out/in) times singular values of 0.68 to 1.20",
    training_inputs(steps=1, weight_decay=0.0, objects=2, clip_norm=st.sampled_from([0.0, 0.1])),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.5,
)
def first_step(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    got, factor = run(impl, x, dtype), x.steps[0].factor
    for name, params in got.params.items():
        moved = params[0] - x.params[name]
        if taken_by_muon(x, name):
            rate = factor * x.settings.muon_lr * max(1.0, moved.shape[0] / moved.shape[1]) ** 0.5
            rate *= x.settings.backbone_lr / x.settings.lr if name.startswith("backbone.") else 1.0
            largest = float(np.linalg.norm(moved, 2)) / rate
            judge.holds(
                0.68 <= largest <= 1.21, f"{name} moved by a largest singular value of {largest:.3g} times its rate"
            )
            continue
        share = np.abs(moved) / (factor * adamws_rate(x, name))
        slack = 100 * UNIT_ROUNDOFF[dtype] * (1 + np.abs(x.params[name]) / (factor * adamws_rate(x, name)))
        judge.holds(bool((share <= 1 + slack).all()), f"{name} moved by up to {share.max():.4g} of its rate")
        boxes = name.startswith(
            "box_head."
        )  # which GIoU alone leaves without a gradient where one box lies within the other
        if not boxes or (
            recipe.weighting[1] > 0 and any(t.valid.any() for parts in x.steps[0].shards for _, t in parts)
        ):
            most = float(np.median(share))
            judge.holds(most > 0.9, f"{name}: half of its entries moved by less than {most:.4g} of its rate")


@property_of(
    "train.class_loss_in_closed_form",
    "with the same score for every class of every query, the class loss is a formula, whatever is matched",
    "method.md §5: w/boxes · ( T·¼·(1 − p)²·(−ln p) + (B·N·K − T)·¾·p²·(−ln(1 − p)) ) for each layer",
    training_inputs(steps=1, weighting=st.sampled_from([(2.0, 0.0, 0.0), (0.25, 0.0, 0.0)]), classification="focal"),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
    always=[TrainingInputs(steps=1, parts=2, filled=0.5, objects=3, weighting=(2.0, 0.0, 0.0), seed=3)],
)
def class_loss_in_closed_form(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    z = float(x.params["class_head.bias"][0])
    alike = {"class_head.weight": 0 * x.params["class_head.weight"], "class_head.bias": np.full(recipe.classes, z)}
    got, p = run(impl, x._replace(params=x.params | alike), dtype), 1 / (1 + np.exp(-z))
    valid = np.concatenate([t.valid for parts in x.steps[0].shards for _, t in parts])
    matched, number = np.minimum(valid.sum(1), recipe.queries).sum(), max(1, int(valid.sum()))
    scores = len(valid) * recipe.queries * recipe.classes
    total = matched * 0.25 * (1 - p) ** 2 * -np.log(p) + (scores - matched) * 0.75 * p**2 * -np.log1p(-p)
    want = recipe.layers * recipe.weighting[0] * total / number
    judge.close(got.loss, [want], UNIT_ROUNDOFF[dtype] * (1 + abs(z)) * 8 * np.log2(scores + 2) * want, "loss")


SLOPES = training_inputs(
    steps=1, parts=1, images=st.integers(1, 2), queries=2, objects=st.integers(1, 2), layers=1, classes=2,
    weight_decay=0.0, kind=st.just(("adamw", 3, 2)), clip_norm=0.0, classification="focal",
)  # fmt: skip
"""Not "matchability", which takes a weight of its own as given: its gradient is no derivative."""


@property_of(
    "train.gradient_is_the_slope",
    "the norm of the gradient is that of the slopes of the run's own loss, entry by entry, and AdamW's first step goes down each",
    "the definition of a derivative; reference/optimizers.py, (O4) at s = 1",
    SLOPES,
    into=PROPERTIES,
    dtypes=["float64"],
    examples_factor=0.05,
    always=[TrainingInputs(steps=1, images=2, queries=2, channels=3, inputs=2, weight_decay=0.0, weighting=w, seed=s)
            for s, w in ((3, (2.0, 5.0, 2.0)), (5, (0.25, 0.0, 5.0)))],
)  # fmt: skip
def gradient_is_the_slope(impl: Any, recipe: TrainingInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    expected_and_limits(recipe, dtype)  # leaves examples out that lie on a kink
    got, h = run(impl, x, dtype), 2.0**-17
    squares, size = 0.0, float(got.loss[0])
    for name, value in x.params.items():
        for at in np.ndindex(value.shape):

            def loss(change: float, name: str = name, at: Any = at) -> float:
                moved = x.params[name].copy()
                moved[at] += change
                return float(run(impl, x._replace(params={**x.params, name: moved}), dtype).loss[0])

            ahead, behind = loss(h), loss(-h)
            slope, bend = (ahead - behind) / (2 * h), (ahead + behind - 2 * size) / h
            assume(abs(bend) < 0.01 * (1 + abs(slope)))  # an edge or a matching changes in between
            squares += slope**2
            step = got.params[name][(0, *at)] - value[at]
            judge.holds(
                abs(slope) < 1e-4 or step * slope < 0,
                f"{name}{list(at)} moved by {step:.3g}, although the loss has a slope of {slope:.3g} there",
            )
    judge.close(got.gradient_norm, [squares**0.5], 1e-7 * (1 + squares**0.5), "norm of the gradient")
