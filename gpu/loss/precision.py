"""The precision of costs and losses."""

from __future__ import annotations

from torch import Tensor


def in_float32(x: Tensor) -> Tensor:
    """At least float32: under autocast the network's outputs may be in half precision; costs and losses never are."""
    return x.float() if x.dtype.itemsize < 4 else x
