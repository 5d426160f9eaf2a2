"""Noised objects as queries in training (docs/method.md §8; equations (N1) to (N5) of ``smca.reference.denoising``).

D = G·2·T queries per image, in the order group, kind (positive, negative), object. Shapes are static and nothing is drawn on the
host, so that no step waits for a GPU.

Shape letters: B images, G groups, T targets (padded), K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smca.datasets import Targets

BOX_NOISE = 0.4
"""In half sides: how far a positive query's corners move at most, and a negative one's at least."""
LABEL_NOISE = 0.2
"""Probability that a label is drawn anew."""
LEAST_SIDE = 0.01
LEAST_COORDINATE = 0.005


class Noise(NamedTuple):
    """What is drawn for a batch."""

    corners: Tensor
    """[B, G, 2, T, 4] by how many half sides each corner coordinate moves: x0, y0, x1, y1."""
    labels: Tensor
    """[B, G, 2, T] int64, the object's label, or another."""


class FurtherQueries(NamedTuple):
    """D queries per image beside the model's own."""

    box_logits: Tensor
    """[B, D, 4] logits of the boxes that they start on, cxcywh in 0–1 of the unpadded image."""
    labels: Tensor
    """[B, D] int64, from which their content is made."""
    sees: Tensor
    """[B, D, D] bool, True where the first attends to the second."""


def noised_queries(targets: Targets, noise: Noise) -> FurtherQueries:
    """Queries from a batch's objects and what was drawn; padding may hold anything."""
    shape = noise.labels.shape  # [B, G, 2, T]
    real = targets.valid[:, None, None].expand(shape)
    boxes = targets.boxes[:, None, None].to(noise.corners.dtype).expand(*shape, 4)
    boxes = boxes.masked_fill(~real[..., None], 0.5)
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    moved = torch.cat([center - half, center + half], dim=-1) + noise.corners * half.repeat(1, 1, 1, 1, 2)
    low, high = torch.split(moved.clamp(0, 1), 2, dim=-1)  # no corner moves as far as the middle
    noised = torch.cat([(low + high) / 2, (high - low).clamp(min=LEAST_SIDE)], dim=-1)
    noised = noised.masked_fill(~real[..., None], 0.5).clamp(LEAST_COORDINATE, 1 - LEAST_COORDINATE)

    _, groups, kinds, count = shape
    group = torch.arange(groups, device=real.device).repeat_interleave(kinds * count)
    sees = (group[:, None] == group) & real.flatten(1)[:, None]
    sees = sees | torch.eye(len(group), dtype=torch.bool, device=real.device)  # what stands for padding sees itself
    return FurtherQueries(noised.flatten(1, 3).logit(), noise.labels.flatten(1), sees)


def draw_noise(seeds: Tensor, labels: Tensor, num_groups: int, num_classes: int) -> Noise:
    """Draw for a batch's labels [B, T], where they are, from a seed of each image, [B] int64.

    What is drawn for an object follows from its image's seed and its place among the image's objects: neither the other images nor
    how far the batch is padded matters.
    """
    count = labels.shape[1]
    place = torch.arange(count * num_groups * 2 * 6, device=labels.device)
    place = place.reshape(count, num_groups, 2, 6).permute(1, 2, 0, 3)  # an object's numbers are those in a row
    bits = _hash(_hash(seeds)[:, None, None, None, None] + place)  # [B, G, 2, T, 6]
    kind = torch.arange(2, device=labels.device)[:, None, None]
    amount = (_uniform(bits[..., :4]) + kind) * BOX_NOISE
    sign = (bits[..., :4] & 1) * 2 - 1  # a bit that the uniform numbers leave
    other = (bits[..., 4] >> 1 & _ALL_BITS >> 1) % num_classes
    anew = _uniform(bits[..., 5]) < LABEL_NOISE
    return Noise(amount * sign, torch.where(anew, other, labels[:, None, None]))


_ALL_BITS = (1 << 63) - 1


def _hash(x: Tensor) -> Tensor:
    """Scramble int64 numbers: the generator SplitMix64 (Steele, Lea, Flood 2014), whose state they are. Products wrap around."""
    x = x * -0x61C8864680B583EB + -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of numbers taken as unsigned."""
    return x >> bits & (1 << 64 - bits) - 1


def _uniform(bits: Tensor) -> Tensor:
    """The highest 24 of 64 random bits → float32 in [0, 1)."""
    return _shifted(bits, 40).float() * 2.0**-24
