"""Inputs of a training run: recipes of a few numbers, and the arrays that follow from them.

Bounds, with their reasons: the detector of `smca.reference.small_detector` with 6 channels, where every matrix is AdamW's, or
with 16 and 20, where Muon takes those inside, square, wide and tall; up to ten steps, in which what goes wrong once per step
adds up; one or two processes and one or two parts, since two already differ from one; images without objects and steps
without any; the last class among the labels; a largest norm that clips every gradient, some, or none. Learning rates are a hundred
times the usual ones, so that ten steps lead somewhere, and a factor of each step's own stands for any schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import SEEDS
from smca.conformance.inputs.matching import USUAL_WEIGHTING, WITH_CLASS, Weighting, named, random_boxes
from smca.conformance.tolerances import round_to
from smca.reference.losses import Targets
from smca.reference.small_detector import Sizes, parameter_shapes
from smca.reference.training_run import TrainingStepInputs
from smca.reference.training_step import TrainingSettings

Array = npt.NDArray[np.float64]


class TrainingArrays(NamedTuple):
    """What `train` takes."""

    params: dict[str, Array]
    steps: list[TrainingStepInputs]
    settings: TrainingSettings


@dataclass(frozen=True)
class TrainingInputs:
    """A run."""

    steps: int = 1
    processes: int = 1
    parts: int = 1
    images: int = 1
    """Of each part."""
    queries: int = 3
    objects: int = 2
    """T, columns of the padded targets."""
    filled: float = 1.0
    """Fraction of them that are objects."""
    classes: int = 2
    layers: int = 1
    channels: int = 6
    inputs: int = 6
    optimizer: str = "adamw"
    decayed: str = "all"
    weight_decay: float = 0.1
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    weighting: Weighting = USUAL_WEIGHTING
    classification: str = "focal"
    loss_scale: float = 1.0
    resume_after: int = 0
    seed: int = 0

    def arrays(self, dtype: str) -> TrainingArrays:
        """With values that `dtype` represents. Of every step's images the first has an object of the last class, and of those of
        every fourth step (counted from a place of the recipe's own) none has any."""
        rng = np.random.default_rng(self.seed)
        sizes = Sizes(self.inputs, self.channels, self.classes, self.layers)
        params = {}
        for name, shape in parameter_shapes(sizes).items():
            values = rng.normal(size=shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 4)
            params[name] = round_to(values + (name == "norm.weight"), dtype)
        steps = [self._step(number, rng, dtype) for number in range(self.steps)]
        settings = TrainingSettings(
            optimizer=self.optimizer,
            lr=0.01,
            backbone_lr=0.002,
            muon_lr=0.05,
            weight_decay=self.weight_decay,
            decayed=self.decayed,
            clip_norm=self.clip_norm,
            ema_decay=self.ema_decay,
            weights=named(self.weighting),
            classification=self.classification,
            loss_scale=self.loss_scale,
            resume_after=self.resume_after,
        )
        return TrainingArrays(params, steps, settings)

    def _step(self, number: int, rng: np.random.Generator, dtype: str) -> TrainingStepInputs:
        empty = (number + self.seed) % 4 == 3

        def part(first: bool) -> tuple[Array, Targets]:
            x = rng.normal(size=(self.images, self.queries, self.inputs))
            boxes = random_boxes(rng, self.images, self.objects)
            labels = rng.integers(0, self.classes, (self.images, self.objects))
            valid = (rng.random((self.images, self.objects)) < self.filled) & (not empty)
            if first:
                labels[0, :1], valid[0, :1] = self.classes - 1, not empty
            return round_to(x, dtype), Targets(labels, round_to(boxes, dtype), valid)

        shards = [[part(p == a == 0) for a in range(self.parts)] for p in range(self.processes)]
        return TrainingStepInputs(shards, float(rng.choice([1.0, 0.5, 0.25])))

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        x = self.arrays("float64")
        counts = [[[t.valid.sum(1).tolist() for _, t in parts] for parts in step.shards] for step in x.steps[:2]]
        return (
            f"{self.steps} steps of {self.optimizer}, x {x.steps[0].shards[0][0][0].shape}, {self.channels} channels, "
            f"objects [process][part][image] in the first two {counts}, factors {[step.factor for step in x.steps]}, "
            f"largest norm {self.clip_norm or 'none'}, average {self.ema_decay or 'none'}, "
            f"resumed after step {self.resume_after or '–'}, loss × {self.loss_scale:g}"
        )


USUAL_TRAINING = [
    TrainingInputs(
        steps=10, parts=2, images=2, filled=0.6, classes=3, layers=2, decayed="weights", clip_norm=0.1, ema_decay=0.9,
        loss_scale=1024.0, resume_after=4, weighting=(1.0, 5.0, 2.0), seed=1,
    ),
    TrainingInputs(
        steps=10, images=2, classes=3, channels=16, inputs=20, optimizer="muon", clip_norm=0.1, ema_decay=0.5,
        resume_after=3, seed=2,
    ),
    TrainingInputs(
        steps=10, images=2, parts=2, layers=2, channels=20, inputs=16, optimizer="muon", decayed="weights", filled=0.6,
        classification="matchability", seed=4,
    ),
    TrainingInputs(steps=6, processes=2, parts=2, filled=0.5, classes=4, clip_norm=5.0, ema_decay=0.9, seed=6),
]  # fmt: skip
"""Always tried: ten steps with everything that can be set, each optimiser, and two processes with unequally many objects."""


@st.composite
def training_inputs(draw: st.DrawFn, /, **fixed: Any) -> TrainingInputs:
    """One to ten steps; `fixed` pins fields, or gives a strategy in place of the usual one."""
    usual: dict[str, Any] = {
        "steps": st.sampled_from([10, 5, 2, 1]),
        "processes": 1,
        "parts": st.integers(1, 2),
        "images": st.integers(1, 2),
        "queries": st.integers(2, 4),
        "objects": st.integers(0, 3),
        "filled": st.sampled_from([1.0, 0.5, 0.0]),
        "classes": st.integers(1, 4),
        "layers": st.integers(1, 2),
        "decayed": st.sampled_from(["all", "weights"]),
        "weight_decay": st.sampled_from([0.1, 0.0]),
        "clip_norm": st.sampled_from([0.0, 0.1, 5.0, 1000.0]),
        "ema_decay": st.sampled_from([0.0, 0.9, 0.5]),
        "weighting": WITH_CLASS,
        "classification": st.sampled_from(["focal", "focal", "matchability"]),
        "seed": SEEDS,
    }
    kinds = st.sampled_from([("adamw", 6, 6), ("adamw", 4, 7), ("muon", 16, 20), ("muon", 20, 16)])
    optimizer, channels, inputs = draw(fixed.pop("kind", kinds))
    chosen = {**usual, **fixed}
    drawn = {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in chosen.items()}
    recipe = TrainingInputs(optimizer=optimizer, channels=channels, inputs=inputs, **drawn)
    return replace(recipe, resume_after=recipe.steps // 2) if recipe.resume_after else recipe


def merged(step: TrainingStepInputs, *, processes: bool) -> TrainingStepInputs:
    """The same images in one part of each process, or, if `processes`, in one part of one process."""
    groups = [[part for parts in step.shards for part in parts]] if processes else step.shards
    shards = [[joined(parts)] for parts in groups]
    return TrainingStepInputs(shards, step.factor)


def joined(parts: Any) -> tuple[Array, Targets]:
    """The images of several parts in one."""
    fields = [np.concatenate([getattr(t, name) for _, t in parts]) for name in ("labels", "boxes", "valid")]
    return np.concatenate([x for x, _ in parts]), Targets(*fields)
