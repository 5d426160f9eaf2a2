"""Inputs of what goes beyond the paper: models whose queries have boxes, what such a model puts out, and the objects of a batch.

Bounds as in `model` and `matching`. Objects may be smaller than a cell, and images may have fewer cells than queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import SEEDS
from smca.conformance.inputs.matching import USUAL_WEIGHTING, WEIGHTINGS, Weighting, named, random_boxes
from smca.conformance.inputs.model import (
    LEVELS,
    ODD,
    PADDED,
    PADDING_APART,
    ModelArrays,
    ModelInputs,
    Options,
    Sizes,
    doubling,
)
from smca.conformance.tolerances import round_to
from smca.reference.decoder import FurtherQueries
from smca.reference.denoising import Noise, draw_noise, noised_queries
from smca.reference.losses import Targets

Array = npt.NDArray[np.float64]

OBJECTS = 3
"""T of every batch."""


class AnchoredArrays(NamedTuple):
    """Arguments of anchored_forward, the objects that its further queries are made of, and the weights of a loss's terms."""

    model: ModelArrays
    further: FurtherQueries | None
    targets: Targets
    noise: Noise
    weights: dict[str, float]


@dataclass(frozen=True)
class AnchoredInputs:
    """A model, its images, and objects in them."""

    model: ModelInputs
    filled: float = 0.7
    """Fraction of the padded targets that are objects."""
    weighting: Weighting = USUAL_WEIGHTING

    def arrays(self, dtype: str) -> AnchoredArrays:
        """With values that `dtype` represents."""
        x, rng = self.model.arrays(dtype), np.random.default_rng(self.model.seed + 1)
        shape = (len(x.valid_sizes), OBJECTS)
        labels = rng.integers(0, x.config.num_classes, shape)
        boxes, valid = random_boxes(rng, *shape), rng.random(shape) < self.filled
        if (
            self.model.seed % 2 == 0
        ):  # an object that is smaller than a cell, and nearer to one of padding, if there is any
            boxes[:, 0], valid[:, 0] = [0.998, 0.998, 0.004, 0.004], self.filled > 0
        targets = Targets(labels, round_to(boxes, dtype), valid)
        groups = max(1, x.config.denoising_groups)
        noise = draw_noise(rng, labels, groups, x.config.num_classes)
        noise = noise._replace(corners=round_to(noise.corners, dtype))
        further = noised_queries(targets, noise) if x.config.denoising_groups else None
        if further is not None:
            further = further._replace(box_logits=round_to(further.box_logits, dtype))
        return AnchoredArrays(x, further, targets, noise, named(self.weighting))

    def describe(self) -> str:
        """Configuration, sizes and objects."""
        valid = self.arrays("float64").targets.valid
        return (
            f"{self.model.describe()}; objects per image {valid.sum(1).tolist()} of {OBJECTS}; weights {self.weighting}"
        )


SELECTED: Options = [("query_init", "selected"), ("dense_head", True)]
ANCHORS: Options = [("query_init", "anchors")]
IN_BOXES = ("prior_unit", "box")
_LISTED: list[tuple[Options, Sizes]] = [
    ([*SELECTED, IN_BOXES, ("box_refinement", True), ("pre_norm", True), ("denoising_groups", 2)], PADDED),
    ([*SELECTED, IN_BOXES, LEVELS, ("encoder", "pyramid_conv"), ("denoising_groups", 1)], ODD),
    ([*ANCHORS, IN_BOXES, ("prior_scale", "single"), ("denoising_groups", 1), ("dense_head", True)], ODD),
    ([*ANCHORS, LEVELS, ("prior_heads", "shared"), ("box_refinement", True), ("decoder_layers", 3)], PADDED),
    ([*SELECTED, ("cross_attention", "dense"), ("num_queries", 40)], ((12, 30), (37, 61))),
    ([*SELECTED, IN_BOXES, LEVELS, ("num_queries", 9), ("cross_level_blocks", (0,))], ((8, 8), (64, 24))),
    ([*SELECTED, IN_BOXES, LEVELS, ("halve_finest", True), ("denoising_groups", 1)], ODD),
    ([*SELECTED, LEVELS, ("encoder", "conv"), ("halve_finest", True)], ((33, 47), (33, 47))),
    ([*SELECTED, IN_BOXES, ("strides", (4, 16, 64)), ("box_refinement", True)], ((70, 47),)),
]

_WEIGHTED: list[Weighting] = [USUAL_WEIGHTING, (1.0, 0.25, 5.0), (5.0, 2.0, 0.25)]
CONFIGURATIONS = [
    *(
        AnchoredInputs(ModelInputs(tuple(options), sizes, seed), weighting=_WEIGHTED[seed % len(_WEIGHTED)])
        for seed, (options, sizes) in enumerate(_LISTED)
    ),
    AnchoredInputs(
        ModelInputs((*ANCHORS, IN_BOXES, ("box_refinement", True), ("decoder_layers", 3)), PADDED, 100, extreme=True)
    ),
]
"""Every option with every kind of query, with padding, and with fewer cells than queries."""


@st.composite
def anchored_inputs(draw: st.DrawFn, /, **fixed: Any) -> AnchoredInputs:
    """Any configuration with a box per query; `fixed` pins fields of it."""
    usual: dict[str, Any] = {
        "query_init": st.sampled_from(["selected", "anchors"]),
        "prior_unit": st.sampled_from(["box", "pixels"]),
        "strides": st.sampled_from([(8,), (4, 8, 16), (8, 16), (8, 32)]),
        "encoder": st.sampled_from([*PADDING_APART, "conv"]),
        "halve_finest": st.booleans(),
        "encoder_layers": st.integers(0, 1),
        "cross_attention": st.sampled_from(["smca", "smca", "dense"]),
        "num_queries": st.sampled_from([5, 1, 40]),
        "decoder_layers": st.integers(1, 2),
        "pre_norm": st.booleans(),
        "prior_scale": st.sampled_from(["independent", "single", "fixed"]),
        "box_refinement": st.booleans(),
        "dense_head": st.booleans(),
        "denoising_groups": st.integers(0, 2),
    }
    options: dict[str, Any] = {}
    for name, values in (usual | fixed).items():
        options[name] = draw(values) if isinstance(values, st.SearchStrategy) else values
    doubling(options)
    if options["cross_attention"] == "dense":
        del options["prior_scale"], options["prior_unit"]
    if options["query_init"] == "selected":
        options["dense_head"] = True
    side = st.one_of(st.integers(5, 24), st.sampled_from([33, 47, 64]))
    sizes = tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=3)))
    filled = draw(st.sampled_from([0.7, 1.0, 0.0]))
    return AnchoredInputs(
        ModelInputs(tuple(options.items()), sizes, draw(SEEDS), draw(st.sampled_from([False] * 3 + [True]))),
        filled,
        draw(WEIGHTINGS),
    )
