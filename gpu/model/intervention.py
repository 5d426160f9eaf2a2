"""What the decoder makes of an image if something in it is changed: a query moved, its Gaussians set by hand, other queries gone.

    encoded = model.encode(PIL.Image.open("photo.jpg"))
    outcome = encoded.decode([Change(query=7, box_cxcywh=(0.4, 0.5, 0.1, 0.1))])
    outcome.scores[0, -1, 7]      # what query 7 says when it starts there: [K]

A change reaches the decoder by hooks: the modules compute what they compute in training, with other inputs.

Shape letters: R changes, M decoder layers, N queries, h heads, J levels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smca.gpu.model.layers import Grid

if TYPE_CHECKING:
    from smca.gpu.model.decoder import Decoder, DecoderLayer

_EDGE = 1e-4
"""Boxes are set no closer to 0 and 1 than this: the logit there is infinite."""


@dataclass(frozen=True)
class Change:
    """What is done to a query. Lengths are in 0–1 of the image's sides, as of boxes."""

    query: int | None
    """Which of the model's queries; None = all of them, whose widths and level weights can be changed."""
    box_cxcywh: tuple[float, float, float, float] | None = None
    """The box that it starts on, before the first layer; where queries have learned positions, its reference centre alone."""
    gaussian: tuple[float, float, float, float] | None = None
    """Centre and standard deviations (x, y, σx, σy) of all its Gaussians in every layer."""
    sigma_factor: float = 1.0
    """Its Gaussians are so many times as wide."""
    sigma: tuple[float, float] | None = None
    """Standard deviations of all its Gaussians, around the centres that they have."""
    level_weights: tuple[float, ...] | None = None
    """[J]: how much it takes from each level in every layer; they add up to 1. Where a model learns none, it has no effect."""
    without: tuple[int, ...] = ()
    """Queries that the others do not see, as if they were not there."""

    def __post_init__(self) -> None:
        if self.query is None and (self.box_cxcywh is not None or self.gaussian is not None):
            raise ValueError("one query can be put in a place, not all of them: expected a query's number, got None")

    @property
    def rows(self) -> int | slice:
        """Which queries are meant, as an index."""
        return slice(None) if self.query is None else self.query

    @property
    def sets_gaussians(self) -> bool:
        """Whether its priors are other than the layers make them."""
        return self.gaussian is not None or self.sigma is not None or self.sigma_factor != 1.0


@contextmanager
def changed(decoder: Decoder, grids: Sequence[Grid], changes: Sequence[Change]) -> Iterator[None]:
    """While it is open, row r of what `decoder` computes is under changes[r]; other hooks see what is changed.

    Args:
        grids: those that it is called with.
    """
    modules: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
    hooks = []
    if decoder.center_head is not None and any(change.box_cxcywh for change in changes):
        hooks.append(decoder.center_head.register_forward_hook(_placed_center(decoder, changes), prepend=True))
    for module in modules:
        if module.prior is not None and any(change.sets_gaussians for change in changes):
            hooks.append(module.prior.register_forward_hook(_set_gaussians(grids, changes), prepend=True))
        if module.level_head is not None and any(change.level_weights for change in changes):
            hooks.append(module.level_head.register_forward_hook(_set_levels(changes), prepend=True))
        if any(change.without for change in changes):
            hooks.append(module.self_attn.register_forward_pre_hook(_hidden(changes), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def start_boxes(anchors: Tensor, changes: Sequence[Change]) -> Tensor:
    """Logits of the boxes that queries start on, [1 or R, N, 4] → [R, N, 4], with those that are placed."""
    placed = anchors.expand(len(changes), -1, -1).clone()
    for row, change in enumerate(changes):
        if change.box_cxcywh is not None:
            placed[row, change.query] = _logits(change.box_cxcywh, placed)
    return placed


def _logits(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).clamp(_EDGE, 1 - _EDGE).logit()


def _placed_center(decoder: Decoder, changes: Sequence[Change]) -> Any:
    """Of a head that predicts reference centres [R, N, 2] (logits), to which a learned one may be added."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for row, change in enumerate(changes):
            if change.box_cxcywh is not None:
                center = _logits(change.box_cxcywh[:2], output)
                learned = 0 if decoder.query_center is None else decoder.query_center[change.query]
                output[row, change.query] = center - learned
        return output

    return hook


def _set_gaussians(grids: Sequence[Grid], changes: Sequence[Change]) -> Any:
    def hook(_module: Any, _inputs: Any, output: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        priors = []
        for grid, (center, precision) in zip(grids, output, strict=True):
            center, precision = center.clone(), precision.clone()  # [R, h, N, 2] in cells
            extent = grid.valid_cells.flip(-1).to(center)  # [R, 2] (w, h)
            for row, change in enumerate(changes):
                n = change.rows
                if change.gaussian is not None:
                    center[row, :, n] = center.new_tensor(change.gaussian[:2]) * extent[row]
                sigma = change.gaussian[2:] if change.gaussian is not None else change.sigma
                if sigma is not None:
                    precision[row, :, n] = (precision.new_tensor(sigma) * extent[row]) ** -2
                precision[row, :, n] /= change.sigma_factor**2
            priors.append((center, precision))
        return priors

    return hook


def _set_levels(changes: Sequence[Change]) -> Any:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()  # [R, N, J], before the softmax
        for row, change in enumerate(changes):
            if change.level_weights is not None:
                output[row, change.rows] = output.new_tensor(change.level_weights).log()
        return output

    return hook


def _hidden(changes: Sequence[Change]) -> Any:
    """Of self-attention, which is called as (query, key, value, sees=…). Every query sees itself still."""

    def hook(_module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        n = inputs[0].shape[1]
        sees = torch.ones(len(changes), n, n, dtype=torch.bool, device=inputs[0].device)
        for row, change in enumerate(changes):
            sees[row, :, list(change.without)] = False
        return inputs, {**options, "sees": sees | torch.eye(n, dtype=torch.bool, device=sees.device)}

    return hook
