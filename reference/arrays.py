"""Array types of the specification, and the one way in which a wrong shape or mask is reported.

The dtype in a type is what the specification computes in; every function also takes what converts to it. The checks
look at `.shape` alone, so that they hold for any array that speaks NumPy's protocols.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def require_shape(name: str, array: npt.NDArray[Any], expected: tuple[int | None, ...], remedy: str) -> None:
    """Raise a ValueError that names expected and actual shape unless `array` has the expected one.

    `None` stands for any length of that axis. `remedy` is a sentence that tells how to put it right.

    >>> require_shape("boxes", np.zeros((3, 5)), (None, 4), "Give each box as four numbers.")
    Traceback (most recent call last):
    ValueError: boxes: expected shape (any, 4), got (3, 5). Give each box as four numbers.
    """
    actual = tuple(array.shape)
    fits = len(actual) == len(expected) and all(
        want is None or have == want for have, want in zip(actual, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        comma = "," if len(expected) == 1 else ""
        raise ValueError(f"{name}: expected shape ({wanted}{comma}), got {actual}. {remedy}")


def require_padding_mask(key_padding_mask: BoolArray, expected: tuple[int, int], remedy: str) -> None:
    """Raise a ValueError unless it is a mask [B, L], True where padded, that leaves every image at least one key.

    >>> require_padding_mask(np.array([[False, True], [True, True]]), (2, 2), "One row per image.")
    Traceback (most recent call last):
    ValueError: key_padding_mask: expected a key that is not padded in every image, got an image with none. Check that \
valid_sizes are (height, width) in pixels and that padding is True.
    """
    require_shape("key_padding_mask", key_padding_mask, expected, remedy)
    if key_padding_mask.dtype != np.bool_:
        raise ValueError(
            f"key_padding_mask: expected dtype bool (True = padded), got {key_padding_mask.dtype}. "
            "An additive mask is not one; compare it with 0 first."
        )
    if bool(np.any(np.all(key_padding_mask, axis=-1))):
        raise ValueError(
            "key_padding_mask: expected a key that is not padded in every image, got an image with none. "
            "Check that valid_sizes are (height, width) in pixels and that padding is True."
        )
