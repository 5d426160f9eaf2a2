"""Inputs of boxes, matching and loss: recipes of a few numbers, and the arrays that follow from them.

Bounds, with their reasons: up to 7 queries and 9 targets, so that either may outnumber the other and every assignment could
be enumerated by hand; boxes within [0, 1] as in the method, with sides from 0.01 to 0.8, since a width of a
thousandth has three digits fewer; kinds of boxes for the corner cases (no area, the same box twice, apart, nested);
logits to 1e4, where a probability is 0 or 1 and its logarithm must not be; one class, which has no other beside it, and a
hundred, the last one among the labels; weights that differ from each other, so that exchanging them shows, and of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import SEEDS
from smca.conformance.tolerances import UNIT_ROUNDOFF, at_least_float32, round_to
from smca.reference.losses import Targets

Array = npt.NDArray[np.float64]

Weighting = tuple[float, float, float]
"""Of class, L1 and GIoU."""
USUAL_WEIGHTING: Weighting = (2.0, 5.0, 2.0)
"""The method's (docs/method.md §5)."""
WEIGHTINGS: st.SearchStrategy[Weighting] = st.permutations([2.0, 5.0, 1.0, 0.25, 0.0]).map(lambda w: (w[0], w[1], w[2]))
"""All different from each other; one may be 0."""
WITH_CLASS = WEIGHTINGS.filter(lambda weighting: weighting[0] > 0)


def named(weighting: Weighting) -> dict[str, float]:
    """As implementations take weights."""
    return dict(zip(("class", "l1", "giou"), weighting, strict=True))


def random_boxes(rng: np.random.Generator, *shape: int) -> Array:
    """cxcywh inside the image, sides 0.01 to 0.8."""
    sides = rng.uniform(0.01, 0.8, (*shape, 2))
    return np.concatenate([rng.uniform(sides / 2, 1 - sides / 2), sides], axis=-1)


@dataclass(frozen=True)
class BoxInputs:
    """Two sets of boxes as xyxy."""

    first: int = 1
    second: int = 1
    kind: str = "random"
    """"random"; "same": the second set repeats the first; "apart": no overlap; "nested"; "flat": some without width or
    height; "large": coordinates of pixels; "tiny": sides of 1e-6 to 1e-3."""
    seed: int = 0

    def arrays(self, dtype: str) -> tuple[Array, Array]:
        """[n, 4], [m, 4]."""
        rng = np.random.default_rng(self.seed)
        both = random_boxes(rng, self.first + self.second)
        if self.kind == "flat":
            both[rng.random(len(both)) < 0.5, 2 + rng.integers(2)] = 0.0
        if self.kind == "tiny":
            both[:, 2:] = 10.0 ** rng.uniform(-6, -3, (len(both), 2))
            both[:, :2] = 0.5 + rng.normal(size=(len(both), 2)) * 1e-3
        if self.kind == "nested":
            both[:, :2] = 0.5
        corners = np.concatenate([both[:, :2] - both[:, 2:] / 2, both[:, :2] + both[:, 2:] / 2], axis=-1)
        if self.kind == "large":
            corners *= 1333
        one, two = corners[: self.first], corners[self.first :]
        if self.kind == "same":
            two = one[rng.integers(self.first, size=self.second)]
        if self.kind == "apart":
            two = two + 1.5
        return round_to(one, dtype), round_to(two, dtype)

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        one, two = self.arrays("float64")
        first = ", ".join(f"boxes{i} {x.shape}: {x[:1].round(4).tolist()} …" for i, x in ((1, one), (2, two)))
        return f"{self.kind}; {first}"


@st.composite
def box_inputs(draw: st.DrawFn, /, **fixed: Any) -> BoxInputs:
    """Two sets of up to five boxes; one of them may be empty."""
    kinds = st.sampled_from(["random", "same", "apart", "nested", "flat", "large", "tiny"])
    return BoxInputs(draw(st.integers(1, 5)), draw(st.integers(0, 5)), draw(fixed.get("kind", kinds)), draw(SEEDS))


@dataclass(frozen=True)
class CostInputs:
    """A cost matrix."""

    rows: int = 1
    columns: int = 1
    kind: str = "random"
    """"random" of both signs; "ties": small integers; "constant"; "wide": from 1e-3 to 1e6; "huge": from 1e6 to 1e9; "near": a
    large offset plus small differences; "close": small integers plus differences in the last twelve bits of a number, which a
    narrower dtype loses; "permuted": a greedy choice row by row misses the optimum by far; "forbidden": random, and up to
    two thirds of the pairs cost +inf, with one complete assignment left at least."""
    seed: int = 0

    def array(self, dtype: str) -> Array:
        """[rows, columns]; with a half precision, float32's values, as costs are."""
        rng, dtype = np.random.default_rng(self.seed), at_least_float32(dtype)
        shape = (self.rows, self.columns)
        by_kind: dict[str, Callable[[], npt.NDArray[Any]]] = {
            "random": lambda: rng.normal(size=shape),
            "ties": lambda: rng.integers(0, 3, shape) * 1.0,
            "constant": lambda: np.full(shape, 1.25),
            "wide": lambda: 10.0 ** rng.uniform(-3, 6, shape),
            "huge": lambda: rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(6, 9, shape),
            "near": lambda: 1000.0 + rng.normal(size=shape),
            "close": lambda: rng.integers(1, 3, shape) + rng.integers(0, 64, shape) * (64 * 2 * UNIT_ROUNDOFF[dtype]),
            "permuted": lambda: np.outer(np.arange(1, self.rows + 1), np.arange(1, self.columns + 1)) * 1.0,
            "forbidden": lambda: self._with_forbidden(rng.normal(size=shape), rng),
        }
        return round_to(by_kind[self.kind](), dtype)

    def _with_forbidden(self, cost: Array, rng: np.random.Generator) -> Array:
        forbidden = rng.random(cost.shape) < rng.uniform(0, 2 / 3)
        count = min(cost.shape)
        forbidden[rng.permutation(self.rows)[:count], rng.permutation(self.columns)[:count]] = False
        return np.where(forbidden, np.inf, cost)

    def describe(self) -> str:
        """Shape, and the first row."""
        cost = self.array("float64")
        return f"{self.kind}; cost {cost.shape}" + (f", first row {cost[0].round(4).tolist()}" if cost.size else "")


@st.composite
def cost_inputs(draw: st.DrawFn, /, **fixed: Any) -> CostInputs:
    """Zero to nine rows and columns."""
    kinds = st.sampled_from(["random", "ties", "constant", "wide", "huge", "near", "close", "permuted"])
    sides = st.integers(fixed.get("least", 0), 9)
    return CostInputs(draw(sides), draw(sides), draw(fixed.get("kind", kinds)), draw(SEEDS))


CLOSE_COSTS = [CostInputs(6, 6, "close", 1), CostInputs(5, 7, "huge", 2), CostInputs(7, 4, "close", 3)]
"""Always tried: costs whose differences a narrower dtype loses."""


class LossArrays(NamedTuple):
    """Outputs of a model, the padded targets, and the weights of the terms."""

    logits: Array
    boxes: Array
    targets: Targets
    weights: dict[str, float]


@dataclass(frozen=True)
class LossInputs:
    """A batch of outputs and targets."""

    layers: int = 1
    batch: int = 1
    queries: int = 1
    classes: int = 1
    targets: int = 1
    """T, columns of the padded targets."""
    filled: float = 1.0
    """Fraction of them that are objects and not padding."""
    logit: float = 1.0
    """Standard deviation of the logits."""
    weighting: Weighting = USUAL_WEIGHTING
    apart: float = 0.0
    """If not 0, the queries of an image are nearly the same, and only so far apart: many matchings cost nearly the least."""
    seed: int = 0

    def arrays(self, dtype: str) -> LossArrays:
        """With values that `dtype` represents; padding holds a label and a box like any other. The first target of each image is
        of the last class where the seed is even."""
        rng = np.random.default_rng(self.seed)
        shape = (self.layers, self.batch, self.queries)
        logits = rng.normal(size=(*shape, self.classes)) * self.logit
        boxes, truth = random_boxes(rng, *shape), random_boxes(rng, self.batch, self.targets)
        if self.apart:
            boxes = boxes[:, :, :1] + self.apart * (boxes - 0.5)
            logits = logits[:, :, :1] + self.apart * logits
        labels = rng.integers(0, self.classes, (self.batch, self.targets))
        if self.seed % 2 == 0:
            labels[:, :1] = self.classes - 1
        valid = rng.random((self.batch, self.targets)) < self.filled
        targets = Targets(labels, round_to(truth, dtype), valid)
        return LossArrays(round_to(logits, dtype), round_to(boxes, dtype), targets, named(self.weighting))

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        x = self.arrays("float64")
        return (
            f"logits {x.logits.shape} up to {np.abs(x.logits).max():.3g}, objects per image {x.targets.valid.sum(1).tolist()} "
            f"of {self.targets} (the first image's valid: {x.targets.valid[0].astype(int).tolist()}), "
            f"boxes[0,0,0] = {x.boxes[0, 0, 0].round(4).tolist()}, weights of class, L1 and GIoU {self.weighting}"
        )


USUAL_LOSSES = [
    LossInputs(layers=2, batch=2, queries=6, classes=3, targets=5, filled=0.5, seed=0),
    LossInputs(layers=1, batch=2, queries=2, classes=2, targets=4, filled=1.0, weighting=(1.0, 0.25, 5.0), seed=0),
    LossInputs(layers=2, batch=1, queries=5, classes=100, targets=3, filled=1.0, weighting=(5.0, 2.0, 0.25), seed=2),
    LossInputs(
        layers=2, batch=2, queries=6, classes=2, targets=4, filled=1.0, weighting=(1.0, 5.0, 2.0), apart=1e-4, seed=3
    ),
]
"""Always tried: padding before, between and behind the objects; more objects than queries; the last of many classes; queries that
are nearly alike."""


@st.composite
def loss_inputs(draw: st.DrawFn, /, **fixed: Any) -> LossInputs:
    """One to three layers and images; `fixed` pins fields, or gives a strategy in place of the usual one."""
    usual: dict[str, Any] = {
        "layers": st.integers(1, 3),
        "batch": st.integers(1, 3),
        "queries": st.integers(1, 7),
        "classes": st.sampled_from([1, 2, 3, 4, 100]),
        "targets": st.integers(0, 9),
        "filled": st.sampled_from([1.0, 0.5, 0.0]),
        "logit": st.sampled_from([1.0, 0.1, 10.0, 1e4]),
        "weighting": WEIGHTINGS,
        "apart": st.sampled_from([0.0, 0.0, 0.0, 1e-4]),
        "seed": SEEDS,
    }
    chosen = {**usual, **fixed}
    return LossInputs(
        **{name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in chosen.items()}
    )
