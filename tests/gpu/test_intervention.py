"""What is changed in the decoder is changed, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from explained_photo import PHOTO, model

from smca.gpu.model import SMCADETR
from smca.gpu.model.encoded import EncodedImage, Outcome
from smca.gpu.model.explanation import _recorded
from smca.gpu.model.intervention import Change

HEIGHT, WIDTH = PHOTO.shape[:2]
BOXES: dict[str, Any] = {"query_init": "anchors", "box_refinement": True, "prior_unit": "box", "decoder_layers": 3}
LEVELS: dict[str, Any] = {"strides": (4, 8), "decoder_layers": 2}
KINDS: dict[str, dict[str, Any]] = {
    "as published": {},
    "grid": {"query_init": "grid", "box_refinement": True},
    "two levels": LEVELS,
    "boxes": BOXES,
    "softmax": {"class_scores": "softmax"},
}


def seen(made: SMCADETR, changes: list[Change]) -> tuple[Outcome, EncodedImage, list[Any]]:
    """What the decoder says under `changes`, and what went through its layers."""
    encoded = made.encode(PHOTO)
    with _recorded(made.decoder) as layers:
        outcome = encoded.decode(changes)
    return outcome, encoded, layers


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_without_a_change_it_is_what_the_model_says(changes: dict[str, Any]) -> None:
    made, _ = model(changes)
    plain = made.encode(PHOTO).decode()
    same = made.encode(PHOTO).decode([Change(1), Change(0)])
    images, mask, _ = made._prepared([PHOTO])
    with torch.inference_mode():
        whole = made(images, mask)
    for row in (plain.logits[0], *same.logits):
        torch.testing.assert_close(row, whole["logits"][:, 0], rtol=1e-9, atol=1e-11)
    for row in (plain.boxes[0], *same.boxes):
        torch.testing.assert_close(row, whole["boxes"][:, 0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("changes", [{}, LEVELS, BOXES], ids=["published", "two levels", "boxes"])
def test_gaussians_are_where_they_are_put(changes: dict[str, Any]) -> None:
    made, _ = model(changes)
    asked = [
        Change(1, gaussian=(0.25, 0.75, 0.1, 0.2)),
        Change(1, sigma_factor=3.0),
        Change(2, sigma=(0.1, 0.2)),
        Change(0),
    ]
    outcome, encoded, layers = seen(made, asked)
    _, _, plain = seen(made, [Change(0)])
    extents = [grid.valid_cells[0].flip(0) for grid in encoded.grids]
    for layer, before in zip(layers, plain, strict=True):
        for (center, precision), (old_center, old_precision), extent in zip(
            layer.priors, before.priors, extents, strict=True
        ):
            sigma = (extent * extent.new_tensor([0.1, 0.2])).expand(center.shape[1], 2)
            torch.testing.assert_close(center[0, :, 1], (extent * extent.new_tensor([0.25, 0.75])).expand_as(sigma))
            torch.testing.assert_close(precision[0, :, 1], sigma**-2)
            torch.testing.assert_close(precision[2, :, 2], sigma**-2)
            if layer is layers[0]:  # later ones follow what the first made of it
                torch.testing.assert_close(precision[1, :, 1], old_precision[0, :, 1] / 9)
                torch.testing.assert_close(center[1:, :, 1], old_center.expand_as(center)[1:, :, 1])
            others = [n for n in range(precision.shape[2]) if n != 1]
            if layer is layers[0]:
                torch.testing.assert_close(precision[1][:, others], old_precision[0][:, others])
    base = encoded.decode()
    assert (outcome.logits[0, -1, 1] - base.logits[0, -1, 1]).abs().max() > 1e-6, "a hook that changes nothing"
    torch.testing.assert_close(outcome.logits[3], base.logits[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("changes", [{}, KINDS["grid"], BOXES], ids=["published", "grid", "boxes"])
def test_a_query_starts_where_it_is_placed(changes: dict[str, Any]) -> None:
    made, _ = model(changes)
    _, _, layers = seen(made, [Change(2, box_cxcywh=(0.2, 0.7, 0.1, 0.3)), Change(0)])
    _, _, plain = seen(made, [Change(0)])
    reference, before = layers[0].reference, plain[0].reference
    torch.testing.assert_close(reference[0, 2, :2], reference.new_tensor([0.2, 0.7]))
    if changes is BOXES:
        torch.testing.assert_close(reference[0, 2, 2:], reference.new_tensor([0.1, 0.3]))
    torch.testing.assert_close(reference[1], before[0])
    others = [n for n in range(reference.shape[1]) if n != 2]
    if changes is BOXES:
        torch.testing.assert_close(reference[0, others], before[0, others])


def test_levels_are_weighed_as_asked() -> None:
    made, _ = model(LEVELS)
    outcome, encoded, layers = seen(made, [Change(1, level_weights=(0.25, 0.75)), Change(1, level_weights=(1.0, 0.0))])
    for layer in layers:
        torch.testing.assert_close(layer.level_logits[0, 1].softmax(-1), layer.level_logits.new_tensor([0.25, 0.75]))
        torch.testing.assert_close(layer.level_logits[1, 1].softmax(-1), layer.level_logits.new_tensor([1.0, 0.0]))
    assert outcome.logits.isfinite().all()
    assert (outcome.logits[0, -1, 1] - encoded.decode().logits[0, -1, 1]).abs().max() > 1e-6


def test_queries_that_are_not_there_are_not_there() -> None:
    """The others say what a model says that lacks them."""
    made, _ = model(BOXES)
    kept = [0, 2]
    gone = tuple(n for n in range(made.config.num_queries) if n not in kept)
    fewer = copy.deepcopy(made)
    for name in ("query_anchor", "query_content"):
        setattr(fewer.decoder, name, torch.nn.Parameter(getattr(made.decoder, name)[kept]))
    fewer.decoder.num_queries = len(kept)
    got = made.encode(PHOTO).decode([Change(0, without=gone)])
    want = fewer.encode(PHOTO).decode()
    torch.testing.assert_close(got.logits[:, :, kept], want.logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.boxes[:, :, kept], want.boxes, rtol=1e-9, atol=1e-11)


def test_many_changes_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smca.gpu.model.encoded._AT_ONCE", 2)
    encoded = model(LEVELS)[0].encode(PHOTO)
    asked = [
        Change(0, sigma_factor=2.0),
        Change(1),
        Change(2, level_weights=(0.5, 0.5)),
        Change(0, without=(1,)),
        Change(1),
    ]
    together = encoded.decode(asked)
    for row, change in enumerate(asked):
        torch.testing.assert_close(together.logits[row], encoded.decode([change]).logits[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "changes", [{}, KINDS["grid"], BOXES, LEVELS], ids=["published", "grid", "boxes", "two levels"]
)
def test_predict_looks_where_it_is_told(changes: dict[str, Any]) -> None:
    made, _ = model(changes)
    (got,) = made.predict([PHOTO], where=(30.0, 20.0, 8.0))
    encoded = made.encode(PHOTO)
    change = encoded.placed((30.0, 20.0, 8.0))
    starts = encoded._first_centers().numpy() * [WIDTH, HEIGHT]
    assert change.query == np.square(starts - [30, 20]).sum(1).argmin()
    assert sorted((change.query, *change.without)) == list(range(made.config.num_queries))
    outcome = encoded.decode([change])
    best = outcome.scores[0, -1, change.query].sort(descending=True)
    assert got.queries.tolist() == [change.query] * made.config.num_classes
    torch.testing.assert_close(got.scores, best.values.float())
    assert got.labels.tolist() == best.indices.tolist()
    edges = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float64)
    box = outcome.boxes_xyxy[0, -1, change.query].clamp(min=0).minimum(edges)
    torch.testing.assert_close(got.boxes_xyxy[0].double(), box, rtol=1e-6, atol=1e-5)
    for wrong in ((-1.0, 5.0, 5.0), (5.0, 60.0, 5.0), (5.0, 5.0, 0.0), (float("nan"), 5.0, 5.0)):
        with pytest.raises(ValueError, match=r"x, y, radius in pixels of the image, which is 77 wide and 50 high"):
            made.predict([PHOTO], where=wrong)


def test_a_detr_cannot_be_told_where_to_look() -> None:
    made, _ = model({"cross_attention": "dense"})
    with pytest.raises(ValueError, match="a DETR's queries cannot be placed"):
        made.predict([PHOTO], where=(5.0, 5.0, 5.0))


def test_the_model_is_left_as_it_was() -> None:
    made, _ = model(LEVELS)
    made.train()
    encoded = made.encode(PHOTO)
    encoded.decode(
        [Change(0, sigma_factor=2.0, without=(1,), level_weights=(0.5, 0.5), box_cxcywh=(0.5, 0.5, 0.1, 0.1))]
    )
    assert made.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
