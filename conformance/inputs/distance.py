"""More inputs of attention: distant keys that matter, and weights that are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from smca.conformance.inputs.attention import AttentionArrays, AttentionInputs, attention_inputs
from smca.conformance.tolerances import UNIT_ROUNDOFF, round_to
from smca.reference.attention import Level
from smca.reference.gaussian import key_minus_center


@dataclass(frozen=True)
class DistantInputs:
    """One map with a key that is as far from a query as possible, but that q·k favours."""

    first: AttentionInputs
    gap: float = 100.0
    """By how much log G of the farthest key falls behind that of the nearest."""
    behind: int = 0
    """The favoured key's weight is 2^−behind of the largest."""

    def arrays(self, dtype: str) -> AttentionArrays:
        """With values that `dtype` represents."""
        x, rng = self.first.arrays(dtype), np.random.default_rng(self.first.seed)
        q, level = x.q, x.level
        padded = np.zeros((len(q), level.k.shape[2]), dtype=np.bool_)
        padded = padded if level.key_padding_mask is None else level.key_padding_mask
        squared = key_minus_center(level.center_xy, level.size) ** 2
        behind = 0.5 * np.einsum("bhna,bhnla->bhnl", level.precision_xy, squared)
        behind = np.where(padded[:, None, None], np.nan, behind - np.nanmin(behind, axis=-1, keepdims=True))
        farthest = np.nanmax(behind, axis=-1, keepdims=True)
        factor = self.gap / np.where(farthest > 0, farthest, self.gap)
        precision = round_to(level.precision_xy * factor, "float64" if dtype == "float64" else "float32")
        log_g = -0.5 * np.einsum("bhna,bhnla->bhnl", precision, squared)
        k, root_d = level.k.copy(), q.shape[-1] ** 0.5
        for b, h in np.ndindex(q.shape[:2]):
            query = q[b, h, n := int(rng.integers(q.shape[2]))]
            key = int(np.nanargmax(behind[b, h, n]))
            largest = np.where(padded[b], -np.inf, k[b, h] @ query / root_d + log_g[b, h, n]).max()
            wanted = largest - self.behind * np.log(2) - log_g[b, h, n, key]
            k[b, h, key] = round_to(query * wanted * root_d / (query @ query), dtype)
        return x._replace(level=level._replace(k=k, precision_xy=precision))

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        return (
            f"log G falls by {self.gap:g} to the farthest key, whose weight q·k makes 2^{-self.behind} of the largest; "
            f"else as {self.first.describe()}"
        )


BEHIND = st.one_of(st.integers(4, 20), st.integers(-4, 48))
"""Mostly weights that are visible in float32, down to ones far too light for it."""


@st.composite
def distant_inputs(draw: st.DrawFn, /) -> DistantInputs:
    """Maps of several blocks of keys, narrow priors, favoured keys from the heaviest to ones too light to be visible."""
    maps = attention_inputs(
        size=st.sampled_from([(9, 17), (1, 64), (64, 1), (17, 9), (3, 40), (40, 3)]),
        queries=st.sampled_from([1, 3]),
        channels=st.sampled_from([8, 2, 33]),
        heads=st.integers(1, 2),
        batch=1,
        logit=1.0,
        precision=1.0,
        spread=st.sampled_from(["even", "wide", "one axis"]),
        centers=st.sampled_from(["inside", "outside", "cell", "far"]),
    )
    return DistantInputs(draw(maps), draw(st.sampled_from([100.0, 30.0, 400.0])), draw(BEHIND))


def _tight(size: tuple[int, int], gap: float, behind: int, seed: int, **others: Any) -> DistantInputs:
    return DistantInputs(AttentionInputs(channels=8, size=size, precision=1.0, seed=seed, **others), gap, behind)


TIGHT = [
    _tight((40, 3), 400.0, 12, 1),
    _tight((3, 40), 400.0, 12, 2),
    _tight((9, 17), 400.0, 12, 3),
    _tight((40, 3), 400.0, 14, 5),
    _tight((1, 16), 100.0, 45, 8),
    _tight((17, 9), 400.0, 13, 8, spread="one axis"),
    _tight((40, 3), 100.0, 13, 10, queries=3, centers="outside"),
    _tight((3, 40), 400.0, 12, 15, spread="one axis"),
]
"""Cases that just meet a bound on what is skipped, each in another way: blocks within a row and over several rows, either axis,
several queries in one block, a key on the edge of being visible. Random examples too seldom come near these."""


@dataclass(frozen=True)
class ManyInputs:
    """Many keys, each of whose weights is just less than what a sum in this dtype still takes up, behind a first few that are
    large."""

    size: tuple[int, int] = (40, 64)
    first: int = 32
    """Keys with the largest weight, 1."""
    channels: int = 8
    seed: int = 0

    def arrays(self, dtype: str) -> AttentionArrays:
        """With values that `dtype` represents; no prior, and of all keys the same value, which is then what comes out."""
        rng, keys = np.random.default_rng(self.seed), self.size[0] * self.size[1]
        q, k = np.zeros((1, 1, 1, self.channels)), np.zeros((1, 1, keys, self.channels))
        q[..., 0] = 1.0
        k[0, 0, self.first :, 0] = np.log(0.8 * UNIT_ROUNDOFF[dtype]) * self.channels**0.5
        v = np.broadcast_to(round_to(rng.uniform(0.5, 2.0, self.channels), dtype), k.shape).copy()
        level = Level(round_to(k, dtype), v, np.full((1, 1, 1, 2), 0.5), np.zeros((1, 1, 1, 2)), self.size, None)
        return AttentionArrays(q, level, np.ones_like(q))

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        return f"map {self.size[0]} × {self.size[1]}, the first {self.first} keys' weights 1, all others just below what 1 resolves"


@dataclass(frozen=True)
class DropoutInputs:
    """One map, and the dropout of its weights."""

    first: AttentionInputs
    rate: float = 0.3
    seed: int = 0
    """Seed of the dropout, a signed 64-bit integer."""

    def arrays(self, dtype: str) -> AttentionArrays:
        """With values that `dtype` represents."""
        return self.first.arrays(dtype)

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        return f"dropout {self.rate:g} with seed {self.seed}; {self.first.describe()}"


@st.composite
def dropout_inputs(draw: st.DrawFn, /) -> DropoutInputs:
    """Small maps, whose weights are all read off one by one, with logits at which none of the weights underflows."""
    sides = st.integers(1, 6)
    maps = attention_inputs(
        size=st.tuples(sides, sides),
        queries=st.sampled_from([3, 1, 17]),
        channels=st.sampled_from([8, 16]),
        heads=st.integers(1, 2),
        batch=st.integers(1, 2),
        logit=st.sampled_from([1.0, 0.0, 10.0]),
        precision=st.sampled_from([0.5, 0.0, 0.05]),
        centers=st.sampled_from(["inside", "cell"]),
    )
    return DropoutInputs(
        draw(maps), draw(st.sampled_from([0.3, 0.0, 0.1, 0.5])), draw(st.integers(-(2**63), 2**63 - 1))
    )


MANY_WEIGHTS = [DropoutInputs(AttentionInputs(batch=2, heads=2, queries=17, channels=32, size=(4, 5)), 0.3, 5)]
"""Enough weights in every image, head and query to tell chance agreement from equal dropout; 32 channels read all off at once."""
