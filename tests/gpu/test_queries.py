"""Queries that are boxes, cells that become queries, and noised objects: what the conformance suite does not ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smca.datasets import Targets
from smca.gpu.config import LossConfig, ModelConfig
from smca.gpu.loss import SetCriterion, boxes_per_process
from smca.gpu.model import SMCADETR
from smca.gpu.model.denoising import BOX_NOISE, LABEL_NOISE, draw_noise
from smca.gpu.presets import PRESETS, tiny_resnet
from smca.gpu.training.setup import completed


def small_model(**changes: Any) -> SMCADETR:
    torch.manual_seed(0)
    demo = PRESETS["demo"]().model
    smaller = {"hidden_dim": 16, "num_heads": 2, "feedforward_dim": 16, "backbone": tiny_resnet(1, 1), "num_classes": 3}
    return SMCADETR(replace(demo, **{**smaller, **changes}))


def objects(*counts: int) -> Targets:
    """So many objects in each image, padded to four."""
    generator = torch.Generator().manual_seed(1)
    valid = torch.arange(4) < torch.tensor(counts)[:, None]
    boxes = torch.rand(len(counts), 4, 4, generator=generator) * 0.3 + 0.2
    return Targets(torch.randint(0, 3, valid.shape, generator=generator), boxes, valid)


def test_noise_is_what_the_method_says() -> None:
    labels = torch.zeros(50, 40, dtype=torch.int64)
    seeds = torch.arange(50)  # neighbours, to which nothing may be common
    noise = draw_noise(seeds, labels, 3, 4)
    assert noise.corners.shape == (50, 3, 2, 40, 4)
    positive, negative = noise.corners.abs().unbind(2)
    for amount, low in ((positive, 0.0), (negative, BOX_NOISE)):
        assert low <= amount.min() < low + 0.01
        assert low + BOX_NOISE - 0.01 < amount.max() <= low + BOX_NOISE
        assert abs(amount.mean() - (low + BOX_NOISE / 2)) < 0.005
    assert abs((noise.corners > 0).float().mean() - 0.5) < 0.01
    # A label that is drawn anew is the old one in a quarter of the cases.
    assert abs((noise.labels != 0).float().mean() - LABEL_NOISE * 3 / 4) < 0.01
    flat = noise.corners.flatten()
    assert flat.unique().numel() > 0.99 * flat.numel()
    for axis in range(5):  # numbers that follow each other along an axis: image, group, kind, object, corner
        signs = noise.corners.sign().movedim(axis, 0)
        assert abs((signs[1:] * signs[:-1]).mean()) < 0.02, axis


def test_noise_of_an_object_depends_on_its_image_alone() -> None:
    """Whatever the other images are, and however many objects they have."""
    labels = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([7, -(2**63), 2**63 - 1])
    whole = draw_noise(seeds, labels, 2, 4)
    for image in range(3):
        for count in (5, 2):
            alone = draw_noise(seeds[image : image + 1], labels[image : image + 1, :count], 2, 4)
            for got, expected in zip(alone, whole, strict=True):
                assert torch.equal(got[0], expected[image, :, :, :count])
    other = draw_noise(seeds + 1, labels, 2, 4)
    assert (other.corners != whole.corners).float().mean() > 0.99


@pytest.mark.parametrize("counts", [(3, 1), (0, 0)], ids=["objects", "no object"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_init": "anchors"},
        {"query_init": "anchors", "dense_head": False, "denoising_groups": 0, "prior_unit": "pixels"},
        {"strides": (8, 16), "encoder": "pyramid_conv"},
        {"strides": (8, 16), "encoder": "conv", "halve_finest": True},
        {"cross_attention": "dense", "prior_unit": "pixels", "box_refinement": False},
    ],
    ids=["selected", "anchors", "anchors alone", "levels", "authors' encoder", "dense"],
)
def test_every_parameter_is_trained(changes: dict[str, Any], counts: tuple[int, int]) -> None:
    """With several processes, one without a gradient stops the training; and what has only zeros learns nothing."""
    model = small_model(**changes).train()
    with torch.no_grad():  # away from zeros, behind which gradients are zero too
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    targets = objects(*counts)
    images = torch.rand(2, 3, 64, 64)
    SetCriterion(LossConfig(classification="matchability"))(model(images, None, targets), targets)["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    if sum(counts):
        assert [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()] == []


def test_noised_queries_are_there_in_training_alone() -> None:
    model, targets, images = small_model(), objects(3, 1), torch.rand(2, 3, 64, 64)
    trained, evaluated = model.train()(images, None, targets), model.eval()(images, None, targets)
    assert trained["further_logits"].shape == (2, 2, 2 * 2 * 4, 3)
    assert "further_logits" not in evaluated
    assert "further_logits" not in model.train()(images)
    assert trained["logits"].shape == evaluated["logits"].shape


def test_noised_queries_do_not_change_the_others() -> None:
    """No batch norm, whose statistics move from call to call."""
    model, targets, images = small_model().double(), objects(3, 1), torch.rand(2, 3, 64, 64).double()
    model.train().backbone.eval()
    alone, beside = model(images), model(images, None, targets)
    for name in ("logits", "boxes"):
        torch.testing.assert_close(alone[name], beside[name], rtol=1e-9, atol=1e-9)


def test_an_image_with_fewer_cells_than_queries(tmp_path: Path) -> None:
    model = small_model(image_short_side=16, image_max_size=64).eval()
    model.save_pretrained(tmp_path)
    loaded = SMCADETR.from_pretrained(tmp_path)
    image = np.zeros((16, 64, 3), dtype=np.uint8)  # 2 × 8 cells, 30 queries
    for made in (model, loaded):
        (found,) = made.predict([image])
        assert len(found.scores) == 30 * 3, "every query answers, on a cell or not"
        assert np.isfinite(np.asarray(found.boxes_xyxy)).all()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prior_unit": "box"}, "prior_unit"),
        ({"denoising_groups": 1}, "denoising_groups"),
        ({"query_init": "selected"}, "dense_head"),
        ({"query_init": "anchors", "prior_unit": "box", "cross_attention": "dense"}, "prior_unit"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"model.{field}"):
        ModelConfig(**changes)


def test_cells_are_taught_whatever_the_loss() -> None:
    """A loss of one's own need not know of cells and noised queries; one that does is not given theirs twice."""
    model, targets = small_model().train(), objects(3, 1)
    outputs = model(torch.rand(2, 3, 64, 64), None, targets)
    config = LossConfig(classification="matchability")
    whole = SetCriterion(config)
    expected = whole(outputs, targets)
    boxes = boxes_per_process(targets.valid.sum())
    own = completed(lambda o, t: {"loss": o["logits"].square().mean()}, config, 1)(outputs, targets, boxes)
    added = [name for name in expected if name.endswith(("/cells", "/noised"))]
    assert len(added) == 6
    torch.testing.assert_close(own["loss"], outputs["logits"].square().mean() + sum(expected[name] for name in added))
    wrapped = completed(lambda o, t: {**whole(o, t)}, config, 1)(outputs, targets, boxes)
    torch.testing.assert_close(wrapped["loss"], expected["loss"])
    half = completed(lambda o, t: {"loss": o["logits"].square().mean()}, config, 2)(outputs, targets, boxes)
    torch.testing.assert_close(half["loss"], own["loss"] - outputs["logits"].square().mean() / 2)
