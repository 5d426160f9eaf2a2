"""How far an implementation may be from the oracle, in one table.

The error that is compared is relative to the size of the whole result, max|got − expected| / max(1, max|expected|), so
that single entries near zero do not ask for more digits than the arithmetic has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TOLERANCES: dict[tuple[str, str], tuple[float, str]] = {
    ("attention", "float64"): (1e-10, "rounding 1e-16 times logits to 1e3 (the lifted form cancels x²λ against xλc)"),
    ("attention", "float32"): (2e-4, "rounding 6e-8 times logits to 1e3"),
    ("criterion", "float64"): (1e-10, "a few hundred additions of terms near 1"),
    ("criterion", "float32"): (1e-4, "log and power of probabilities near 0 and 1"),
    ("model", "float64"): (1e-10, "some thirty layers, each near rounding, of weights that amplify little"),
    ("model", "float32"): (1e-4, "as float64, with rounding 6e-8"),
}
"""(operation, dtype) → (bound, reason)."""


def assert_close(got: Any, expected: npt.ArrayLike, operation: str, dtype: str, what: str) -> None:
    """Fail unless `got` agrees with the oracle; the message names the worst index, both values and the bound.

    Args:
        got: array or CPU tensor under test.
        expected: the oracle's array, of the same shape.
        operation: row of ``TOLERANCES``.
        dtype: "float64" or "float32".
        what: the property in words.
    """
    bound, reason = TOLERANCES[operation, dtype]
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape, f"{what}: got shape {got.shape}, expected {expected.shape}"
    if not got.size:
        return
    error = np.abs(got - expected) / max(1.0, float(np.abs(expected).max()))
    error = np.where(np.isfinite(got), error, np.inf)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    assert error[worst] <= bound, (
        f"{what}: at {tuple(map(int, worst))} got {got[worst]!r}, expected {expected[worst]!r}; "
        f"error {error[worst]:.2e} over the bound {bound:.0e} ({operation}, {dtype}: {reason})"
    )
