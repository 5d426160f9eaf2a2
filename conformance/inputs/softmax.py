"""Inputs of DETR's own scores and loss: outputs z of a class head with a column for "no object", boxes and targets.

Bounds, with their reasons: up to 90 classes for the odds, since errors add up over them, and down to one, which leaves
nothing but "no object" beside it; differences between outputs to 1e4, where a probability is 0 or 1 and its odds must not be;
everything shifted by up to 1e3, which a softmax does not see; ties, because the largest of equal outputs is not the only one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import SEEDS
from smca.conformance.inputs.matching import LossArrays, LossInputs, loss_inputs
from smca.conformance.tolerances import round_to
from smca.reference.losses import Targets
from smca.reference.softmax_scores import log_odds

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OddsInputs:
    """Outputs of some queries, [queries, classes + 1]."""

    queries: int = 1
    classes: int = 1
    kind: str = "random"
    """"random"; "dominant": one output far above the others; "pair": two of them, equal or nearly; "ties": small integers."""
    spread: float = 1.0
    """Standard deviation of the outputs; of a dominant one, fifty times that is how far it is above the others."""
    shift: float = 0.0
    """Added to all of them."""
    seed: int = 0

    def array(self, dtype: str) -> Array:
        """With values that `dtype` represents."""
        rng = np.random.default_rng(self.seed)
        z = rng.normal(size=(self.queries, self.classes + 1))
        if self.kind == "ties":
            z = rng.integers(0, 3, z.shape).astype(np.float64)
        row, columns = np.arange(self.queries), np.argsort(rng.random(z.shape), axis=1)
        if self.kind in ("dominant", "pair"):
            z[row, columns[:, 0]] = 50.0
        if self.kind == "pair":
            z[row, columns[:, 1]] = 50.0 + rng.choice([0.0, 1e-3, -1e-3])
        return round_to(z * self.spread + self.shift, dtype)

    def describe(self) -> str:
        """Shape, and the first row."""
        z = self.array("float64")
        return f"{self.kind}; z {z.shape}, up to {np.abs(z).max():.4g}, first row {z[0, :6].round(4).tolist()}"


USUAL_ODDS = [
    OddsInputs(queries=3, classes=1, kind="dominant", spread=20.0),
    OddsInputs(queries=4, classes=5, kind="dominant", spread=20.0, seed=1),
    OddsInputs(queries=4, classes=5, kind="pair", spread=1.0, shift=-1000.0, seed=2),
    OddsInputs(queries=2, classes=90, kind="random", spread=3.0, seed=3),
]
"""Always tried: one output with all of the probability, a class or "no object"; two with half of it each; many."""


@st.composite
def odds_inputs(draw: st.DrawFn, /, **fixed: Any) -> OddsInputs:
    """One to five queries; `fixed` pins fields, or gives a strategy in place of the usual one."""
    usual: dict[str, Any] = {
        "queries": st.integers(1, 5),
        "classes": st.sampled_from([1, 2, 3, 7, 90]),
        "kind": st.sampled_from(["random", "dominant", "pair", "ties"]),
        "spread": st.sampled_from([1.0, 0.1, 20.0, 200.0]),
        "shift": st.sampled_from([0.0, 1000.0, -1000.0]),
        "seed": SEEDS,
    }
    chosen = {**usual, **fixed}
    return OddsInputs(
        **{name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in chosen.items()}
    )


class SoftmaxArrays(NamedTuple):
    """Outputs of a model, and the padded targets."""

    z: Array
    """[M, B, N, K + 1]."""
    boxes: Array
    targets: Targets
    weights: dict[str, float]

    @property
    def with_odds(self) -> LossArrays:
        """The same, with logits in place of z."""
        return LossArrays(log_odds(self.z), self.boxes, self.targets, self.weights)


@dataclass(frozen=True)
class SoftmaxLossInputs:
    """A batch of outputs and targets."""

    loss: LossInputs = field(default_factory=LossInputs)
    """Its logits are the outputs of the classes."""
    no_object: float = 0.0
    """Added to the outputs for "no object"."""

    def arrays(self, dtype: str) -> SoftmaxArrays:
        """With values that `dtype` represents; padding holds a label and a box like any other."""
        x, rng = self.loss.arrays(dtype), np.random.default_rng(self.loss.seed + 1)
        last = rng.normal(size=(*x.logits.shape[:3], 1)) * self.loss.logit + self.no_object
        return SoftmaxArrays(np.concatenate([x.logits, round_to(last, dtype)], axis=-1), *x[1:])

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        return f'{self.loss.describe()}; one output more, for "no object", {self.no_object:+g}'


@st.composite
def softmax_loss_inputs(draw: st.DrawFn, /, **fixed: Any) -> SoftmaxLossInputs:
    """`fixed` pins fields of the loss's inputs."""
    usual = {"logit": st.sampled_from([1.0, 0.1, 10.0, 1000.0])}
    return SoftmaxLossInputs(draw(loss_inputs(**usual | fixed)), draw(st.sampled_from([0.0, 5.0, -5.0])))


USUAL_SOFTMAX_LOSSES = [
    SoftmaxLossInputs(LossInputs(layers=2, batch=2, queries=6, classes=3, targets=5, filled=0.5, seed=0)),
    SoftmaxLossInputs(LossInputs(batch=2, queries=2, classes=2, targets=4, weighting=(1.0, 0.25, 5.0), seed=0)),
    SoftmaxLossInputs(LossInputs(layers=2, batch=1, queries=5, classes=1, targets=2, filled=1.0, logit=10.0, seed=3)),
    SoftmaxLossInputs(LossInputs(layers=1, batch=2, queries=3, classes=2, targets=2, filled=0.0, seed=4)),
]
"""Always tried: padding between the objects; more objects than queries, other weights; one class; no object at all."""
