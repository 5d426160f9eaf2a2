"""What queries looked at, layer by layer: their Gaussians, their attention, their boxes.

    explanation = model.explain(PIL.Image.open("photo.jpg"))
    explanation.centers_xy[-1, 0]      # of the best detection, after all layers: [h, J, 2] in pixels of the photograph

Shape letters: M decoder layers, Q queries, h heads, J levels, (H, W) cells of a level, K classes. The numbers are those of
docs/method.md §1 to §4, and equal the specification's (``smca.reference``), which a test holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smca.gpu.attention.eager import attention_weights
from smca.gpu.model.layers import Grid, split_heads, split_levels

if TYPE_CHECKING:
    from smca.gpu.model.decoder import Decoder, DecoderLayer
    from smca.gpu.model.detector import SMCADETR
    from smca.gpu.model.encoded import EncodedImage

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Explanation:
    """Of one image. Lengths are in pixels of that image, as a viewer shows it; layers come first, the last one last."""

    image_size: tuple[int, int]
    """(height, width) in pixels."""
    cell_sizes_xy: Array
    """[J, 2]: width and height of a level's cell."""
    queries: npt.NDArray[np.int64]
    """[Q] numbers of the queries, the best score first unless they were asked for by number."""
    scores: Array
    """[M, Q, K] in 0–1: what each layer gives each class."""
    boxes_xyxy: Array
    """[M, Q, 4]: the box after each layer, not cut at the image's edges."""
    level_weights: Array
    """[M, Q, J], α: how much of what the query takes comes from each level; they add up to 1."""
    attention: list[Array]
    """For each level [M, Q, h, H, W], A: how much of a head's attention each cell has; all cells of a level add up to 1. No level
    if maps were not asked for."""
    attention_without_prior: list[Array]
    """The same of the same queries and keys with a precision of 0: what the Gaussian changed."""
    references_xy: Array | None
    """[M, Q, 2]: the reference centre that the layer's Gaussians start from. None with cross_attention="dense", as below."""
    centers_xy: Array | None
    """[M, Q, h, J, 2]: the Gaussian's centre, which may lie outside the image."""
    sigmas_xy: Array | None
    """[M, Q, h, J, 2]: its standard deviation along x and y; inf where the prior is flat."""


@dataclass
class _Layer:
    """What passed through a decoder layer."""

    q: Tensor | None = None
    k: Tensor | None = None
    level_logits: Tensor | None = None
    reference: Tensor | None = None
    priors: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def explained(encoded: EncodedImage, queries: Sequence[int] | None, most: int, maps: bool) -> Explanation:
    """``SMCADETR.explain`` of an image that is encoded.

    Raises:
        ValueError: a query that the model does not have.
    """
    model, grids = encoded.model, encoded.grids
    numbers = model.config.num_queries
    wrong = [query for query in queries or () if not 0 <= query < numbers]
    if wrong:
        raise ValueError(f"no query {wrong[0]}: the model has {numbers}, numbered from 0")
    with _recorded(model.decoder) as layers:
        outcome = encoded.decode()
    scores = outcome.scores[0]  # [M, N, K]
    if queries is None:
        best = scores[-1].amax(-1).argsort(descending=True, stable=True)[:most]
    else:
        best = torch.as_tensor(list(queries), dtype=torch.int64, device=scores.device)
    height, width = encoded.image_size
    extent = scores.new_tensor([width, height])
    cell_xy = torch.stack([extent / grid.valid_cells[0].flip(0).to(extent) for grid in grids])  # [J, 2] pixels per cell
    both = [_attention(model, layers, grids, best, prior) if maps else [] for prior in (True, False)]
    steered = bool(layers[0].priors)
    centers, sigmas = _gaussians(layers, best, cell_xy) if steered else (None, None)
    references = [layer.reference[0, best, :2] * extent for layer in layers if layer.reference is not None]
    return Explanation(
        image_size=(height, width),
        cell_sizes_xy=_array(cell_xy),
        queries=best.cpu().numpy(),
        scores=_array(scores[:, best]),
        boxes_xyxy=_array(outcome.boxes_xyxy[0][:, best]),
        level_weights=_array(_level_weights(layers, grids, best)),
        attention=both[0],
        attention_without_prior=both[1],
        references_xy=_array(torch.stack(references)) if steered else None,
        centers_xy=centers,
        sigmas_xy=sigmas,
    )


@contextmanager
def _recorded(decoder: Decoder) -> Iterator[list[_Layer]]:
    """While it is open, what passes through a decoder is noted; it computes as ever."""
    modules: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
    layers, hooks = [_Layer() for _ in modules], []
    for layer, module in zip(layers, modules, strict=True):

        def note(name: str, layer: _Layer = layer) -> Any:
            return lambda _module, _inputs, output: setattr(layer, name, output)

        def note_prior(_: Any, inputs: Any, output: Any, layer: _Layer = layer) -> None:
            layer.reference, layer.priors = inputs[1], output

        hooks.append(module.cross_attn.q_proj.register_forward_hook(note("q")))
        hooks.append(module.cross_attn.k_proj.register_forward_hook(note("k")))
        if module.level_head is not None:
            hooks.append(module.level_head.register_forward_hook(note("level_logits")))
        if module.prior is not None:
            hooks.append(module.prior.register_forward_hook(note_prior))
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _attention(
    model: SMCADETR, layers: Sequence[_Layer], grids: Sequence[Grid], queries: Tensor, with_prior: bool
) -> list[Array]:
    """For each level [M, Q, h, H, W]."""
    found: list[list[Tensor]] = [[] for _ in grids]
    for layer in layers:
        assert layer.q is not None
        assert layer.k is not None
        q = split_heads(layer.q, model.config.num_heads)[:, :, queries]
        keys = split_levels(split_heads(layer.k, model.config.num_heads), grids, dim=2)
        nothing = q.new_zeros(*q.shape[:3], 2)
        for level, (k, grid) in enumerate(zip(keys, grids, strict=True)):
            center, precision = nothing, nothing
            if with_prior and layer.priors:
                center, precision = (values[:, :, queries] for values in layer.priors[level])
            weights = attention_weights(q, k, center, precision, grid.size, grid.key_padding_mask)[0]
            found[level].append(weights.transpose(0, 1).reshape(len(queries), weights.shape[0], *grid.size))
    return [_array(torch.stack(maps)) for maps in found]


def _gaussians(layers: Sequence[_Layer], queries: Tensor, cell_xy: Tensor) -> tuple[Array, Array]:
    """Centres and standard deviations in pixels, each [M, Q, h, J, 2]."""
    center, precision = (
        torch.stack([torch.stack([pair[part][0][:, queries] for pair in layer.priors], dim=2) for layer in layers])
        for part in (0, 1)
    )  # [M, h, Q, J, 2] in cells
    sigma = precision.clamp(min=0).rsqrt()
    return tuple(_array((values * cell_xy).transpose(1, 2)) for values in (center, sigma))  # type: ignore[return-value]


def _level_weights(layers: Sequence[_Layer], grids: Sequence[Grid], queries: Tensor) -> Tensor:
    """[M, Q, J]."""
    equal = queries.new_full((len(queries), len(grids)), 1, dtype=torch.float64) / len(grids)
    return torch.stack(
        [
            equal if layer.level_logits is None else layer.level_logits[0, queries].double().softmax(-1)
            for layer in layers
        ]
    )


def _array(values: Tensor) -> Array:
    return values.detach().double().cpu().numpy()
