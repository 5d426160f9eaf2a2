"""From a query's state to its Gaussians: one per head and level (docs/method.md §1, §3, §4).

Shape letters: B images, N queries, h heads, C channels, J levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smca.gpu.config import ModelConfig
from smca.gpu.model.layers import Grid, in_full_precision

_AXES = {"fixed": 0, "single": 1, "independent": 2}
"""Number of scales that the head predicts per Gaussian."""

SIGMA_OF_SIDE = 0.3
"""Standard deviation at r = 1 with prior_unit="box", as a fraction of the box's side."""
LEAST_SIGMA = 0.5
"""The same in cells, at least: nothing can be told apart within a cell."""


class Prior(nn.Module):
    """Offset of the centre and precision, for each head and level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.unit, self.published = config.prior_unit, config.initialization == "published"
        self.gaussians = 1 if config.prior_heads == "shared" else config.num_heads
        # λ at r = 1 on each level, in its cells⁻²: 2/β.
        levels = zip(config.decoder_strides, config.sigma_of_levels, strict=True)
        self.unit_precision = [(stride / sigma) ** 2 for stride, sigma in levels]
        outputs = self.gaussians * len(config.strides)
        self.offset_head = nn.Linear(config.hidden_dim, outputs * 2)
        axes = _AXES[config.prior_scale]
        self.scale_head = nn.Linear(config.hidden_dim, outputs * axes) if axes else None

    def reset_parameters(self) -> None:
        """Start the heads as Gaussians of r = 1 on a ring of radius 1σ around the reference centre, whatever the query; or, as
        published, wherever Xavier's random weights put them.

        Values carry no position, so only the difference between heads that look to different sides tells a query where in its
        neighbourhood the object lies; with all heads on the same spot, that difference has to be learned first. (With one
        Gaussian for all heads there is no ring: it starts on the centre.)
        """
        if self.published:
            with torch.no_grad():
                self.offset_head.bias.add_(0.5)  # the authors' cells are at (i, j), half a cell from their centres
        else:
            nn.init.zeros_(self.offset_head.weight)
            nn.init.zeros_(self.offset_head.bias)
        if self.gaussians > 1 and not self.published:
            angle = torch.arange(self.gaussians) * (2 * math.pi / self.gaussians)
            sigma = torch.tensor(self.unit_precision)[:, None] ** -0.5
            if self.unit == "box":
                sigma = torch.full_like(sigma, SIGMA_OF_SIDE)
            ring = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None] * sigma
            with torch.no_grad():
                self.offset_head.bias.copy_(ring.flatten())  # [h, J, 2] in cells, or in sides of the box
        if self.scale_head is not None:
            nn.init.zeros_(self.scale_head.weight)
            nn.init.ones_(self.scale_head.bias)

    def forward(self, state: Tensor, reference: Tensor, grids: Sequence[Grid]) -> list[tuple[Tensor, Tensor]]:
        """O [B, N, C] and reference boxes [B, N, 4], cxcywh in 0–1 of the unpadded image → for each level centre (its cells)
        and precision (its cells⁻²), each [B, h, N, 2]."""
        # [B, h or 1, N, J, 2]; in the centres' precision, which under autocast is more than the network's.
        offsets = self._by_level(in_full_precision(self.offset_head, state)).to(reference.dtype)
        # r is the inverse scale 1/s: at 0 attention is plain.
        r = (
            None
            if self.scale_head is None
            else self._by_level(in_full_precision(self.scale_head, state)).to(reference.dtype)
        )
        priors = []
        for level, grid in enumerate(grids):
            extent, offset = grid.valid_cells.flip(-1)[:, None], offsets[..., level, :]
            unit: float | Tensor = self.unit_precision[level]
            if self.unit == "box":
                side = (reference[..., 2:] * extent)[:, None]  # [B, 1, N, 2] in cells
                offset, unit = side * offset, (SIGMA_OF_SIDE * side).clamp(min=LEAST_SIGMA) ** -2
            center = (reference[..., :2] * extent)[:, None] + offset
            precision = unit * (torch.ones_like(center) if r is None else r[..., level, :].square())
            shape = (len(state), self.num_heads, state.shape[1], 2)
            priors.append((center.expand(shape), precision.expand(shape)))
        return priors

    def _by_level(self, x: Tensor) -> Tensor:
        """[B, N, g·J·a] → [B, g, N, J, a]."""
        levels = len(self.unit_precision)
        return x.reshape(*x.shape[:2], self.gaussians, levels, -1).transpose(1, 2)
