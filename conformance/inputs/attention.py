"""Inputs of attention: recipes of a few numbers, drawn by Hypothesis, and the arrays that follow from them.

Bounds, with their reasons: maps of 1 × 1 to 9 × 9 cells, because a wrong index shows on two cells and shrinks to one,
and a few maps of some hundred cells, past a block of any kernel; 1 to 3 images and heads, because mixing needs two; 33
queries, past two blocks of 16; widths of 1 to 128 channels, at and past the powers of two that a kernel pads to; logits
to 1e4, where a softmax without its maximum overflows even in float64; precisions to 1e3, where a Gaussian is far narrower
than a cell; centres up to one map outside. Every number is drawn from a few values, so that corner cases are frequent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.tolerances import at_least_float32, round_to
from smca.reference.attention import Level
from smca.reference.gaussian import key_minus_center

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class AttentionArrays(NamedTuple):
    """Arguments of smca_attention, and a gradient of its output."""

    q: Array
    level: Level
    grad_out: Array

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As smca_attention takes them."""
        return (self.q, *self.level)


@dataclass(frozen=True)
class AttentionInputs:
    """One map. Arrays are drawn in the order q, k, v, centre, precision, mask, gradient from `seed`."""

    batch: int = 1
    heads: int = 1
    queries: int = 1
    channels: int = 1
    size: tuple[int, int] = (1, 1)
    logit: float = 1.0
    """Largest |q·k|/√d."""
    precision: float = 0.5
    """Largest λ, cells⁻²."""
    spread: str = "even"
    """Of λ: "even", within a factor of 5; "wide", over four orders of magnitude; "one axis", with 0 for the other axis."""
    centers: str = "inside"
    """"inside" the map, "outside" by up to a map, "far" outside by up to fifty, or on a "cell" centre."""
    padding: str = "none"
    """"none", "some" keys at random, "all but one" key of each image, or the "edge": last rows and columns, or
    all that are "near" the first query: most of the map, so that log G of those that are left is large and not far apart."""
    seed: int = 0
    layout: str = "contiguous"
    """Of the arrays in memory: "contiguous"; "transposed", each with its axes in another order; "sliced", every other entry of a
    larger array, along another axis each; "broadcast": all images are the first, with a stride of 0."""

    def arrays(self, dtype: str) -> AttentionArrays:
        """With values that `dtype` represents."""
        rng = np.random.default_rng(self.seed)
        b, h, n, d, (rows, columns) = self.batch, self.heads, self.queries, self.channels, self.size
        keys = rows * columns
        q, k = rng.normal(size=(b, h, n, d)), rng.normal(size=(b, h, keys, d))
        v = rng.normal(size=(b, h, keys, d))
        largest = np.abs(q @ np.swapaxes(k, -1, -2)).max() / d**0.5
        scale = (self.logit / largest) ** 0.5
        center = self._centers(rng)
        precision = self._precisions(rng)
        mask = self._mask(rng, center)
        coarse = at_least_float32(dtype)
        level = Level(
            round_to(k * scale, dtype),
            round_to(v, dtype),
            round_to(center, coarse),
            round_to(precision, coarse),
            self.size,
            mask,
        )
        grad_out = round_to(rng.normal(size=q.shape), dtype)
        return _laid_out(AttentionArrays(round_to(q * scale, dtype), level, grad_out), self.layout)

    def _precisions(self, rng: np.random.Generator) -> Array:
        shape = (self.batch, self.heads, self.queries, 2)
        relative: Array = rng.uniform(0.2, 1.0, shape)
        if self.spread == "wide":
            relative = 10.0 ** rng.uniform(-4, 0, shape)
        elif self.spread == "one axis":
            relative[..., rng.integers(2)] = 0.0
        return relative * self.precision

    def _centers(self, rng: np.random.Generator) -> Array:
        shape, extent = (self.batch, self.heads, self.queries, 2), np.array([self.size[1], self.size[0]])
        inside: Array = rng.uniform(0, 1, shape) * extent
        if self.centers == "outside":
            return np.asarray(inside * 3 - extent)
        if self.centers == "far":
            return np.asarray(inside * 101 - 50 * extent)
        if self.centers == "cell":
            return np.asarray(np.floor(inside) + 0.5)
        return inside

    def _mask(self, rng: np.random.Generator, center: Array) -> Mask | None:
        keys = self.size[0] * self.size[1]
        if self.padding == "none":
            return None
        real = rng.integers(keys, size=self.batch)
        mask = np.ones((self.batch, keys), dtype=np.bool_)
        if self.padding == "near":
            away = np.linalg.norm(key_minus_center(center[:, 0, 0], self.size), axis=-1)  # [B, L]
            return np.asarray(away < 0.8 * away.max(-1, keepdims=True))
        if self.padding == "some":
            mask = rng.random((self.batch, keys)) < 0.5
        elif self.padding == "edge":
            rows = rng.integers(1, self.size[0] + 1, self.batch)[:, None, None]
            columns = rng.integers(1, self.size[1] + 1, self.batch)[:, None, None]
            y, x = np.mgrid[: self.size[0], : self.size[1]]
            return np.asarray((y >= rows) | (x >= columns)).reshape(self.batch, keys)
        mask[np.arange(self.batch), real] = False
        return mask

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        x = self.arrays("float64")
        padded = "no mask" if x.level.key_padding_mask is None else f"{int(x.level.key_padding_mask.sum())} padded"
        layout = "" if self.layout == "contiguous" else f", {self.layout} in memory"
        return (
            f"q {x.q.shape}{layout}, map {self.size[0]} × {self.size[1]} ({padded}), largest logit {self.logit:g}, "
            f"center_xy[0,0,0] = {x.level.center_xy[0, 0, 0].round(4).tolist()}, "
            f"precision_xy[0,0,0] = {x.level.precision_xy[0, 0, 0].round(4).tolist()}"
        )


def _laid_out(x: AttentionArrays, layout: str) -> AttentionArrays:
    """The same numbers (with "broadcast", those of the first image) in another layout; no two of q, k, v and the rest are laid out
    alike."""
    if layout == "contiguous":
        return x

    def laid_out(values: Any, order: tuple[int, ...], axis: int) -> Any:
        if layout == "broadcast":
            return np.broadcast_to(values[:1], values.shape)
        if layout == "transposed":
            return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
        every_other = (slice(None),) * axis + (slice(None, None, 2),)
        return np.repeat(values, 2, axis=axis)[every_other]

    level, mask = x.level, x.level.key_padding_mask
    level = Level(
        laid_out(level.k, (0, 1, 3, 2), 2),
        laid_out(level.v, (3, 2, 0, 1), 1),
        laid_out(level.center_xy, (2, 1, 0, 3), 3),
        laid_out(level.precision_xy, (3, 0, 1, 2), 2),
        level.size,
        None if mask is None else laid_out(mask, (1, 0), 1),
    )
    return AttentionArrays(laid_out(x.q, (0, 2, 1, 3), 3), level, laid_out(x.grad_out, (3, 1, 2, 0), 2))


SIDES = st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, 9))
SIZES = st.one_of(st.tuples(SIDES, SIDES), st.sampled_from([(1, 64), (64, 1), (17, 19)]))
LOGITS = st.sampled_from([1.0, 0.0, 10.0, 100.0, 1e4])
PRECISIONS = st.sampled_from([0.5, 0.0, 0.05, 4.0, 50.0, 1e3])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def attention_inputs(draw: st.DrawFn, /, **fixed: Any) -> AttentionInputs:
    """Inputs of one map; `fixed` pins fields, or gives a strategy in place of the usual one."""
    usual: dict[str, Any] = {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "queries": st.sampled_from([1, 2, 3, 5, 33]),
        "channels": st.sampled_from([1, 2, 4, 8, 5, 33, 40, 128]),
        "size": SIZES,
        "logit": LOGITS,
        "precision": PRECISIONS,
        "spread": st.sampled_from(["even", "wide", "one axis"]),
        "centers": st.sampled_from(["inside", "outside", "cell"]),
        "padding": st.sampled_from(["none", "some", "edge", "all but one"]),
        "seed": SEEDS,
        "layout": st.sampled_from(["contiguous", "contiguous", "transposed", "sliced", "broadcast"]),
    }
    chosen = {**usual, **fixed}
    return AttentionInputs(
        **{name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in chosen.items()}
    )


USUAL = [AttentionInputs(2, 2, 5, 8, (3, 5), 10.0, 0.5, "even", "outside", "some", 1)]
"""A case with nothing simple about it: slow implementations see few others, and Hypothesis begins with the simplest."""

LAYOUTS = [replace(USUAL[0], layout="transposed"), replace(USUAL[0], layout="sliced")]
"""The same, with each array laid out in memory in another way."""

STEEP = AttentionInputs(2, 2, 5, 8, (17, 19), 1.0, 4.0, "even", "inside", "some", 1)
"""Where little but the prior decides, and decides between many keys: what half precision loses of it shows."""

RING = replace(STEEP, queries=1, padding="near")
"""Where only keys far from the centre are left, at much the same distance: what half precision loses of the precision shows."""


class LevelsArrays(NamedTuple):
    """Arguments of multi_scale_smca_attention, and a gradient of its output."""

    q: Array
    levels: list[Level]
    level_weights: Array
    grad_out: Array


@dataclass(frozen=True)
class LevelsInputs:
    """Several maps with one q; level j is drawn as `AttentionInputs` with its size and the seed of the whole plus j."""

    first: AttentionInputs = AttentionInputs()
    sizes: tuple[tuple[int, int], ...] = ((1, 1),)
    weights: str = "softmax"
    """"softmax" of random numbers, "any" real numbers, or "one hot"."""

    def arrays(self, dtype: str) -> LevelsArrays:
        """With values that `dtype` represents."""
        levels = []
        q = grad_out = np.zeros(0)
        for j, size in enumerate(self.sizes):
            x = replace(self.first, size=size, seed=(self.first.seed + j) % 2**32).arrays(dtype)
            if j == 0:
                q, grad_out = x.q, x.grad_out
            levels.append(x.level._replace(k=self._scaled(q, x.level.k, dtype)))
        rng = np.random.default_rng(self.first.seed + 1)
        weights = rng.normal(size=(self.first.batch, self.first.queries, len(self.sizes)))
        if self.weights == "softmax":
            weights = np.exp(2 * weights)
            weights /= weights.sum(-1, keepdims=True)
        elif self.weights == "one hot":
            weights = (weights == weights.max(-1, keepdims=True)) * 1.0
        coarse = at_least_float32(dtype)
        return LevelsArrays(q, levels, round_to(weights, coarse), grad_out)

    def _scaled(self, q: Array, k: Array, dtype: str) -> Array:
        """Keys of a level, scaled so that the largest logit with the common q is as wanted: they were drawn with another q."""
        largest = np.abs(q @ np.swapaxes(k, -1, -2)).max() / q.shape[-1] ** 0.5
        return round_to(k * (self.first.logit / largest), dtype) if largest > 0 else k

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        maps = ", ".join(f"{rows} × {columns}" for rows, columns in self.sizes)
        weights = self.arrays("float64").level_weights[0, 0].round(4).tolist()
        return f"levels {maps}; level_weights[0,0] = {weights}; as for level 0: {self.first.describe()}"


@st.composite
def levels_inputs(draw: st.DrawFn, /, **fixed: Any) -> LevelsInputs:
    """Inputs of one to three maps, whose sizes need not nest."""
    sizes = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
    weights = fixed.pop("weights", st.sampled_from(["softmax", "any", "one hot"]))
    kind = draw(weights) if isinstance(weights, st.SearchStrategy) else weights
    return LevelsInputs(draw(attention_inputs(size=sizes[0], **fixed)), sizes, kind)


USUAL_LEVELS = [LevelsInputs(USUAL[0], ((3, 5), (2, 3)), "softmax")]
"""As USUAL, with maps that do not nest."""
