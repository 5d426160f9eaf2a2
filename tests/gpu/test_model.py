"""What SMCADETR takes for an image. What it computes: conformance/."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smca.conformance.implementations.pytorch import production_config
from smca.conformance.inputs.model import SMALL
from smca.datasets import Targets
from smca.gpu.config import LossConfig
from smca.gpu.loss import NonFiniteError, SetCriterion, matcher
from smca.gpu.model import SMCADETR
from smca.gpu.training.guard import check_terms
from smca.reference.model import forward


def model(dtype: torch.dtype) -> SMCADETR:
    torch.manual_seed(0)
    made = SMCADETR(production_config(SMALL)).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # zeros at the start would hide what multiplies them
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.to(dtype)


def test_images_to_boxes_equal_the_oracle_behind_the_backbone() -> None:
    """From pixels on: normalisation, masks of two images of different size, backbone, and the part that is specified."""
    made, sizes = model(torch.float64), [(37, 61), (64, 24)]
    images = torch.rand(2, 3, 64, 61, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones(2, 64, 61, dtype=torch.bool)
    for index, (height, width) in enumerate(sizes):
        mask[index, :height, :width] = False
    with torch.no_grad():
        got = made(images, mask)
        features = [f.numpy() for f in made.backbone.each_alone(made.normalize(images, mask), torch.tensor(sizes))]
    params = {name: value.numpy() for name, value in made.state_dict().items()}
    expected = forward(params, features, np.array(sizes), SMALL)
    for name in ("logits", "boxes"):
        np.testing.assert_allclose(got[name].numpy(), expected[name], rtol=1e-10, atol=1e-12)


def test_uint8_and_float_images_are_the_same() -> None:
    made = model(torch.float32)
    images = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(made(images)["logits"], made(images / 255)["logits"], rtol=1e-5, atol=1e-5)


def test_non_finite_costs_are_reported_not_repaired() -> None:
    logits, boxes = torch.zeros(2, 1, 3, 2), torch.full((2, 1, 3, 4), 0.5)
    logits[1, 0, 2, 1] = torch.nan
    targets = Targets(torch.tensor([[1]]), torch.full((1, 1, 4), 0.5), torch.tensor([[True]]))
    with pytest.raises(NonFiniteError, match=r"decoder layer 1, image 0 .* query 2 and target 0"):
        matcher.match(logits, boxes, targets, LossConfig().weights)


def test_a_matching_broken_on_the_gpu_makes_the_loss_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend cannot raise without waiting for the GPU: it marks the problem, and the loss turns NaN."""
    broken = torch.tensor([[[matcher.BROKEN], [0]]])  # [M, B, T]
    monkeypatch.setattr("smca.gpu.loss.criterion.match", lambda *arguments, **options: broken)
    outputs = {"logits": torch.zeros(1, 2, 3, 2), "boxes": torch.full((1, 2, 3, 4), 0.5)}
    targets = Targets(torch.tensor([[1], [0]]), torch.full((2, 1, 4), 0.5), torch.tensor([[True], [True]]))
    terms = SetCriterion(LossConfig())(outputs, targets)
    assert torch.isnan(terms["loss"])
    with pytest.raises(NonFiniteError, match="class term of decoder layer 0 is nan"):
        check_terms({name: value.item() for name, value in terms.items()})


def test_matcher_backends_that_cannot_run_say_why() -> None:
    logits, boxes = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3, 4), 0.5)
    targets = Targets(torch.tensor([[1]]), torch.full((1, 1, 4), 0.5), torch.tensor([[True]]))
    with pytest.raises(ValueError, match="unknown matcher backend 'hungarian': choose one of auto, scipy, cupy"):
        matcher.match(logits, boxes, targets, LossConfig().weights, backend="hungarian")
    with pytest.raises(ValueError, match="'cupy' cannot run here: the assignment kernel needs a CUDA device"):
        matcher.match(logits, boxes, targets, LossConfig().weights, backend="cupy")
