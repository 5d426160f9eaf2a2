"""An image up to the decoder, and what the decoder makes of it, as it is or with something changed.

encoded = model.encode(PIL.Image.open("photo.jpg"))
encoded.explain(most=5)                                        # as model.explain, without running the network again
encoded.decode([Change(query=7, sigma_factor=2.0)])            # smca.gpu.model.intervention
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smca.gpu.model.detections import Detections, decode
from smca.gpu.model.explanation import Explanation, explained
from smca.gpu.model.intervention import Change, changed, start_boxes
from smca.gpu.model.layers import Grid, log_odds

if TYPE_CHECKING:
    from smca.gpu.model.detector import SMCADETR

_AT_ONCE = 32
"""Changes that the decoder computes together."""


@dataclass(frozen=True)
class Outcome:
    """What the decoder makes of an image under R changes; R = 1 if there was none to make."""

    logits: Tensor
    """[R, M, N, K], whose sigmoid are the scores."""
    boxes: Tensor
    """[R, M, N, 4] cxcywh in 0–1 of the image."""
    image_size: tuple[int, int]
    """(height, width) in pixels."""

    @property
    def scores(self) -> Tensor:
        """[R, M, N, K] in 0–1."""
        return self.logits.sigmoid()

    @property
    def boxes_xyxy(self) -> Tensor:
        """[R, M, N, 4] in pixels of the image, not cut at its edges."""
        height, width = self.image_size
        boxes = self.boxes * self.boxes.new_tensor([width, height, width, height])
        return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


@dataclass(frozen=True)
class EncodedImage:
    """One image, encoded; ``SMCADETR.encode`` makes it."""

    model: SMCADETR
    image_size: tuple[int, int]
    """(height, width) in pixels, as a viewer shows it."""
    memory: Tensor
    """[1, ΣL, C] the encoder's output."""
    pos: Tensor
    """[1, ΣL, C] what is added to it in keys."""
    grids: list[Grid]
    selected: Tensor | None
    """[1, N, 4] logits of the boxes that queries start on, with query_init="selected"."""
    outcome: Outcome
    """What the decoder makes of it as it is: of one row."""

    @classmethod
    def of(cls, model: SMCADETR, images: Tensor, padding_mask: Tensor | None, original_sizes: Tensor) -> EncodedImage:
        """Of one image that is the network's input [1, 3, H, W]."""
        height, width = (int(side) for side in original_sizes[0])
        noted: list[Any] = []
        hook = model.decoder.register_forward_pre_hook(lambda _, inputs: noted.extend(inputs))
        try:
            with evaluating(model), torch.inference_mode():
                outputs = model(images, padding_mask)
        finally:
            hook.remove()
        memory, pos, grids, selected, *_ = noted
        outcome = Outcome(outputs["logits"].transpose(0, 1), outputs["boxes"].transpose(0, 1), (height, width))
        return cls(model, (height, width), memory, pos, list(grids), selected, outcome)

    @torch.inference_mode()
    def decode(self, changes: Sequence[Change] = ()) -> Outcome:
        """What all queries say after every layer, for each change alone; of the image as it is if there is none."""
        parts = [self._decode(changes[at : at + _AT_ONCE]) for at in range(0, max(1, len(changes)), _AT_ONCE)]
        logits, boxes = (torch.cat(part) for part in zip(*parts, strict=True))
        return Outcome(logits, boxes, self.image_size)

    def placed(self, where: tuple[float, float, float], skip: Sequence[int] = ()) -> Change:
        """A query that looks at one place: the nearest one starts on a square around it, without the others.

        Its Gaussians lie around that centre as the model's heads arrange them. Where widths follow the box they follow the square;
        elsewhere they are half its side.

        Args:
            where: x, y and half the side, in pixels of the image.
            skip: queries that are not to be the one.

        Raises:
            ValueError: a place outside the image, no size, or a model whose queries have no place.
        """
        x, y, radius = where
        height, width = self.image_size
        if not (0 <= x <= width and 0 <= y <= height and radius > 0):
            raise ValueError(
                f"where must be x, y, radius in pixels of the image, which is {width} wide and {height} high, with a radius above "
                f"0; got {where}"
            )
        if not self.can_place:
            raise ValueError('a DETR\'s queries cannot be placed: their places are learned (cross_attention="dense")')
        distance = (self._first_centers() - torch.tensor([x / width, y / height])) * torch.tensor([width, height])
        squares = distance.square().sum(-1)
        squares[list(skip)] = torch.inf
        config, nearest = self.model.config, int(squares.argmin())
        sigma = None if config.prior_unit == "box" else (radius / width, radius / height)
        return Change(
            nearest,
            box_cxcywh=(x / width, y / height, min(1.0, 2 * radius / width), min(1.0, 2 * radius / height)),
            sigma=sigma,
            without=tuple(n for n in range(config.num_queries) if n != nearest),
        )

    def look(self, where: tuple[float, float, float], max_detections: int) -> Detections:
        """What a query that looks at one place (``placed``) sees there: its box, with the score of each class, best first."""
        change = self.placed(where)
        assert change.query is not None
        outcome = self.decode([change])
        sizes = torch.tensor([self.image_size], device=outcome.boxes.device)
        own = slice(change.query, change.query + 1)
        logits, boxes = outcome.logits[:, -1, own], outcome.boxes[:, -1, own]
        seen = decode(logits, boxes, sizes, max_detections, class_scores=self.model.config.class_scores)[0]
        return replace(seen, queries=torch.full_like(seen.queries, change.query))

    @property
    def can_place(self) -> bool:
        """Whether its queries start from places: a DETR's learn theirs as a whole."""
        return self.first_boxes is not None or self.model.decoder.center_head is not None

    def _first_centers(self) -> Tensor:
        """[N, 2] in 0–1: where queries start."""
        if self.first_boxes is not None:
            return self.first_boxes[0, :, :2].sigmoid().cpu()
        return self.outcome.boxes[0, 0, :, :2].cpu()

    @torch.inference_mode()
    def explain(self, *, queries: Sequence[int] | None = None, most: int = 10, maps: bool = True) -> Explanation:
        """``SMCADETR.explain`` of this image."""
        return explained(self, queries, most, maps)

    @property
    def first_boxes(self) -> Tensor | None:
        """[1, N, 4] logits of the boxes that queries start on; None where they have learned positions instead."""
        anchors = self.model.decoder.query_anchor if self.selected is None else self.selected
        return None if anchors is None else anchors.detach().reshape(1, -1, 4)

    def _decode(self, changes: Sequence[Change]) -> tuple[Tensor, Tensor]:
        """Logits [R, M, N, K] and boxes [R, M, N, 4]."""
        rows, decoder = max(1, len(changes)), self.model.decoder
        grids = [_repeated(grid, rows) for grid in self.grids]
        memory, pos = (x.expand(rows, -1, -1) for x in (self.memory, self.pos))
        selected = self.selected
        if changes and self.first_boxes is not None:
            selected = start_boxes(self.first_boxes, changes)
        with evaluating(self.model), changed(decoder, grids, changes):
            logits, boxes = decoder(memory, pos, grids, selected)
        if self.model.config.class_scores == "softmax":
            logits = log_odds(logits)
        return logits.transpose(0, 1), boxes.transpose(0, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it is open, `model` is in evaluation mode; then in that which it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _repeated(grid: Grid, rows: int) -> Grid:
    mask = grid.key_padding_mask
    return Grid(grid.size, grid.valid_cells.expand(rows, -1), None if mask is None else mask.expand(rows, -1))
