"""What moves the parameters: clipping, AdamW, Muon, and the moving average of the weights.

For the gradient g of a parameter θ, at step s = 1, 2, … and with the learning rate η of its group:

    (O1) ‖g‖ = √( Σ over all parameters and entries of g² )        g ← g · min(1, c/(‖g‖ + 10⁻⁶))      c: the largest norm

AdamW (arXiv 1711.05101), entry by entry, with β₁ = 0.9, β₂ = 0.999, ε = 10⁻⁸ and weight decay λ. The decay acts on θ itself;
it is no part of g, and so of no moment:

    (O2) θ ← θ·(1 − η·λ)
    (O3) m ← β₁·m + (1 − β₁)·g          v ← β₂·v + (1 − β₂)·g²                       both 0 at first
    (O4) θ ← θ − η · m/(1 − β₁^s) / ( √(v/(1 − β₂^s)) + ε )

Muon (Keller Jordan 2024; arXiv 2502.16982), for a matrix θ [out, in], with μ = 0.95 and no decay:

    (O5) b ← μ·b + (1 − μ)·g            u = (1 − μ)·g + μ·b                          0 at first; u looks ahead
    (O6) x ← u/‖u‖, then five times     x ← a₁·x + (a₃·x·xᵀ + a₅·(x·xᵀ)²)·x          (a₁, a₃, a₅) = (3.4445, −4.7750, 2.0315)
    (O7) θ ← θ − η·√max(1, out/in)·x

(O6) brings all singular values near 1 (between 0.68 and 1.20, those above 0.0015 to begin with), and is what an orthogonal
matrix nearest to u would be. A matrix with more rows than columns is transposed for it, which changes nothing but the size of
x·xᵀ. For u = 0, x = 0.

And the average of the weights, with t = s − 1 steps done before this one and a decay δ:

    (O8) δ_t = min(δ, (1 + t)/(10 + t))         average ← δ_t·average + (1 − δ_t)·θ         the first weights at first

Early averages so forget the first weights soon. It moves once per step, after the parameters.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smca.reference.arrays import FloatArray

BETAS = (0.9, 0.999)
EPSILON = 1e-8
CLIP_EPSILON = 1e-6
MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

ByName = Mapping[str, FloatArray]
"""Arrays by the names of parameters."""


class Moments(NamedTuple):
    """What AdamW keeps of one parameter, each in its shape; 0 at first."""

    first: FloatArray
    """m."""
    second: FloatArray
    """v."""


def norm_of(gradients: ByName) -> float:
    """The norm of the whole gradient. Equation (O1).

    >>> norm_of({"a": np.array([3.0]), "b": np.array([[0.0, 4.0]])})
    5.0
    """
    return float(np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values())))


def clip(gradients: ByName, largest_norm: float) -> dict[str, FloatArray]:
    """The gradient, scaled down to a norm of `largest_norm` where it is longer. Equation (O1).

    >>> {name: g.round(4).tolist() for name, g in clip({"a": np.array([3.0]), "b": np.array([4.0])}, 1.0).items()}
    {'a': [0.6], 'b': [0.8]}
    """
    factor = min(1.0, largest_norm / (norm_of(gradients) + CLIP_EPSILON))
    return {name: gradient * factor for name, gradient in gradients.items()}


def adamw(
    parameter: FloatArray, gradient: FloatArray, moments: Moments, step: int, rate: float, decay: float
) -> tuple[FloatArray, Moments]:
    """One step of AdamW. Equations (O2) to (O4).

    Args:
        parameter, gradient: of one shape.
        moments: of the steps before.
        step: s, 1 at the first.
        rate: η, > 0.
        decay: λ, ≥ 0.

    Returns:
        The parameter and its moments after the step.

    At the first step m/(1 − β₁) = g and v/(1 − β₂) = g²: every entry moves by η against the sign of its gradient, large or
    small. At the second, with no gradient, m = 0.9·0.1·g and v = 0.999·0.001·g²: by η·(0.09/0.19)/√(0.000999/0.001999).

    >>> nothing = Moments(np.zeros(2), np.zeros(2))
    >>> moved, moments = adamw(np.array([1.0, 1.0]), np.array([0.5, -8.0]), nothing, 1, 0.1, 0.0)
    >>> moved.round(4).tolist()
    [0.9, 1.1]
    >>> adamw(moved, np.zeros(2), moments, 2, 0.1, 0.0)[0].round(4).tolist()
    [0.833, 1.167]

    Without any gradient, decay alone moves it, 1 − 0.1·0.5:

    >>> adamw(np.array([1.0, 1.0]), np.zeros(2), nothing, 1, 0.1, 0.5)[0].tolist()
    [0.95, 0.95]
    """
    decayed = parameter * (1 - rate * decay)  # (O2)
    first = BETAS[0] * moments.first + (1 - BETAS[0]) * gradient  # (O3)
    second = BETAS[1] * moments.second + (1 - BETAS[1]) * gradient**2
    unbiased_first, unbiased_second = first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)
    return decayed - rate * unbiased_first / (np.sqrt(unbiased_second) + EPSILON), Moments(first, second)  # (O4)


def nearest_orthogonal(matrix: FloatArray) -> FloatArray:
    """Nearly the orthogonal matrix nearest to a matrix [m, n]: its singular vectors, singular values of about 1. Equation (O6).

    Of a matrix of zeros, zeros. Two singular values that differ by a factor of 5 end near 1:

    >>> nearest_orthogonal(np.diag([5.0, 1.0])).round(2).tolist()
    [[0.72, 0.0], [0.0, 0.8]]
    """
    if matrix.shape[0] > matrix.shape[1]:
        return nearest_orthogonal(matrix.T).T
    norm = np.sqrt(np.sum(matrix**2))
    x: FloatArray = matrix / norm if norm > 0 else matrix
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = QUINTIC[0] * x + (QUINTIC[1] * gram + QUINTIC[2] * gram @ gram) @ x
    return x


def muon(
    parameter: FloatArray, gradient: FloatArray, momentum: FloatArray, rate: float
) -> tuple[FloatArray, FloatArray]:
    """One step of Muon. Equations (O5) to (O7).

    Args:
        parameter, gradient, momentum: [out, in].
        rate: η, > 0.

    Returns:
        The parameter and its momentum after the step.

    A matrix with four rows for its column moves by about twice the rate, however small the gradient:

    >>> gradient, nothing = np.array([[1e-3], [0.0], [0.0], [0.0]]), np.zeros((4, 1))
    >>> muon(nothing, gradient, nothing, 0.1)[0].ravel().round(3).tolist()
    [-0.139, 0.0, 0.0, 0.0]
    """
    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient  # (O5)
    ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
    rows, columns = parameter.shape
    return parameter - rate * np.sqrt(max(1.0, rows / columns)) * nearest_orthogonal(ahead), momentum  # (O7)


def average_decay(decay: float, steps_before: int) -> float:
    """δ_t. Equation (O8).

    >>> [round(average_decay(0.9, t), 4) for t in (0, 1, 8, 100)]
    [0.1, 0.1818, 0.5, 0.9]
    """
    return min(decay, (1 + steps_before) / (10 + steps_before))


def moved_average(average: ByName, params: ByName, decay: float) -> dict[str, FloatArray]:
    """The average of the weights after a step that led to `params`, with δ_t = `decay`. Equation (O8).

    >>> moved_average({"a": np.array([1.0])}, {"a": np.array([2.0])}, 0.75)["a"].tolist()
    [1.25]
    """
    return {name: decay * average[name] + (1 - decay) * params[name] for name in average}
