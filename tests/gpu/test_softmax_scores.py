"""DETR's own scores and loss in training: their numbers, in parts and in half precision, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from smca.datasets import Targets
from smca.gpu import train
from smca.gpu.config import LossConfig, ModelConfig, RunConfig
from smca.gpu.loss import NonFiniteError, SetCriterion, boxes_per_process, matcher
from smca.gpu.model import SMCADETR
from smca.gpu.model.detections import decode
from smca.gpu.model.layers import CLASS_PRIOR, log_odds
from smca.gpu.presets import tiny_resnet
from smca.gpu.training import replay
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.setup import completed
from tiny_run import tiny

DETR = LossConfig(class_weight=1.0, classification="softmax")
SCORES: dict[str, Any] = {"class_scores": "softmax", "denoising_groups": 0}


def small_model(**changes: Any) -> SMCADETR:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_dim": 16,
        "num_heads": 2,
        "feedforward_dim": 16,
        "num_queries": 6,
        "num_classes": 3,
    }
    small |= {"encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0, "cross_attention": "dense", "strides": (8,)}
    return SMCADETR(ModelConfig(**{**small, "backbone": tiny_resnet(1, 1), "class_scores": "softmax", **changes}))


def batch(seed: int = 0, images: int = 4, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Targets]:
    """Outputs of two layers, five queries, three classes; up to four objects, of which the padding holds any box."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, images, 5, 4, generator=g, dtype=dtype).mul(3).requires_grad_()
    boxes = torch.rand(2, images, 5, 4, generator=g, dtype=dtype).mul(0.5).add(0.2).requires_grad_()
    valid = torch.rand(images, 4, generator=g) < 0.5
    valid[0] = False
    truth = torch.rand(images, 4, 4, generator=g, dtype=dtype) * 0.5 + 0.2
    labels = torch.randint(0, 3, (images, 4), generator=g)
    targets = Targets(labels, truth.masked_fill(~valid[..., None], torch.nan), valid)
    return {"logits": log_odds(z), "class_logits": z, "boxes": boxes}, targets


def of_images(outputs: dict[str, Tensor], targets: Targets, first: int, last: int) -> tuple[dict[str, Tensor], Targets]:
    some = slice(first, last)
    taken = Targets(targets.labels[some], targets.boxes[some], targets.valid[some])
    return {name: value[:, some] for name, value in outputs.items()}, taken


def exact_odds(z: list[float]) -> list[float]:
    """In arithmetic of 40 digits."""
    with mpmath.workdps(40):
        powers = [mpmath.exp(mpmath.mpf(x)) for x in z]
        others = [mpmath.fsum(powers[:k] + powers[k + 1 :]) for k in range(len(z) - 1)]
        return [float(mpmath.log(power / other)) for power, other in zip(powers, others, strict=False)]


@pytest.mark.parametrize("classes", [1, 3, 91])
@pytest.mark.parametrize("far", [0.0, 1.0, 50.0])
def test_odds_in_float32_are_off_by_roundings_alone(classes: int, far: float) -> None:
    """However much one output dominates, and whatever all of them are shifted by: at most 4 u·(1 + |odds|)."""
    g = torch.Generator().manual_seed(classes)
    for scale in (1.0, 20.0):
        z = torch.randn(6, classes + 1, generator=g) * scale
        z[:3, 0] += far * scale
        z[3:, -1] += far * scale
        leaf = (z + 512.0).requires_grad_()  # the outputs that float32 represents after the shift
        z = leaf.detach() - 512.0
        found = log_odds(leaf)
        want = np.array([exact_odds(row) for row in z.tolist()])
        error = np.abs(found.detach().double().numpy() - want)
        assert (error / (2.0**-24 * (1 + np.abs(want)))).max() < 4
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        assert gradient.isfinite().all()
        # A constant added to all outputs changes nothing.
        assert gradient.sum(-1).abs().max() < 1e-5 * classes


@pytest.mark.parametrize("no_object_weight", [0.1, 0.4])
def test_loss_and_gradient_are_torchs_mean_cross_entropy(no_object_weight: float) -> None:
    outputs, targets = batch()
    config = dataclasses.replace(DETR, no_object_weight=no_object_weight)
    terms = SetCriterion(config)(outputs, targets)
    query = matcher.match(outputs["logits"], outputs["boxes"], targets, config.weights, "softmax")
    assert (query >= 0).any(2).any(1).all()
    z, expected = outputs["class_logits"], torch.zeros((), dtype=torch.float64)
    weight = torch.tensor([1, 1, 1, no_object_weight], dtype=torch.float64)
    for layer in range(2):
        wanted = torch.full((4, 5), 3)
        for image, target in targets.valid.nonzero().tolist():
            wanted[image, query[layer, image, target]] = targets.labels[image, target]
        loss = functional.cross_entropy(z[layer].flatten(0, 1), wanted.flatten(), weight)
        torch.testing.assert_close(terms[f"class/{layer}"], loss, rtol=1e-12, atol=0)
        expected = expected + loss
    whole = [terms[f"class/{layer}"] for layer in range(2)]
    (got,), (want,) = torch.autograd.grad(sum(whole), z, retain_graph=True), torch.autograd.grad(expected, z)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert terms["loss"].item() == pytest.approx(sum(v.item() for name, v in terms.items() if name != "loss"))


def test_detrs_cost_is_of_the_probability() -> None:
    outputs, targets = batch()
    of_class = matcher.match_costs(
        outputs["logits"],
        outputs["boxes"],
        with_boxes(targets),
        {"class": 1.0, "l1": 0.0, "giou": 0.0},
        "softmax",
    )
    p = outputs["class_logits"].softmax(-1)
    for image, target in targets.valid.nonzero().tolist():
        want = -p[:, image, :, targets.labels[image, target]]
        torch.testing.assert_close(of_class[:, image, :, target], want, rtol=1e-12, atol=1e-15)


def with_boxes(targets: Targets) -> Targets:
    """The same, with numbers in the padding: 0 times NaN is NaN."""
    return Targets(targets.labels, targets.boxes.nan_to_num(0.5), targets.valid)


def test_parts_add_up_to_the_mean_that_as_many_processes_have() -> None:
    """DETR's mean is over the images of a process. A step in parts on one process is what DETR does on as many processes."""
    outputs, targets = batch(images=6)
    criterion = SetCriterion(DETR)
    num_boxes = boxes_per_process(targets.valid.sum())
    in_parts = completed(criterion, DETR, 3)
    pieces = [of_images(outputs, targets, first, first + 2) for first in (0, 2, 4)]
    added = [in_parts(*piece, num_boxes) for piece in pieces]
    # DETR on three processes: each divides boxes by a third of all objects, and gradients are averaged.
    alone = [criterion(*piece, num_boxes / 3) for piece in pieces]
    for name in alone[0]:
        got, want = sum(terms[name] for terms in added), sum(terms[name] for terms in alone) / 3
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # the number of boxes is float32
    assert added[0]["class/0"] != alone[0]["class/0"]


def test_a_run_in_parts_takes_the_mean_over_them(tmp_path: Path) -> None:
    """Boxes have the same loss in any number of parts, classes nearly."""
    seen: list[dict[str, float]] = []

    def recorded(self: Any, terms: Mapping[str, Tensor], *more: Any) -> None:
        seen.append({name: float(value) for name, value in terms.items()})

    for parts in (1, 4):
        config = softmax_run(tmp_path / str(parts), max_steps=1, accumulate=parts, seed=1)
        frozen = dataclasses.replace(config.model.backbone, frozen_norm=True)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=frozen))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FiniteCheck, "record", recorded)
            train.train(config)
    whole, in_parts = seen
    for name, value in whole.items():
        assert in_parts[name] == pytest.approx(value, rel=0.1 if name in ("class/0", "class/1", "loss") else 1e-5), name


def softmax_run(output: Path, **changes: Any) -> RunConfig:
    config = tiny(output)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **SCORES), loss=DETR, **changes)


def test_a_run_learns_in_half_precision_too(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        metrics = train_metrics(softmax_run(tmp_path / precision, epochs=3, precision=precision))
        losses.append([line["loss"] for line in metrics])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    model = SMCADETR.from_pretrained(tmp_path / "fp32" / "model")
    assert model.decoder.class_head.out_features == model.config.num_classes + 1


def train_metrics(config: RunConfig) -> list[dict[str, Any]]:
    from smca.gpu.training.log import read_metrics

    train.train(config)
    return read_metrics(config.output / "metrics.jsonl")


def test_under_autocast_odds_and_loss_are_float32() -> None:
    model, (_, targets) = small_model().train(), batch(images=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(2, 3, 64, 64))
        terms = SetCriterion(DETR)(outputs, targets)
    assert outputs["class_logits"].dtype == torch.bfloat16
    assert outputs["logits"].dtype == terms["loss"].dtype == torch.float32
    exact = log_odds(outputs["class_logits"].double())
    torch.testing.assert_close(outputs["logits"].double(), exact, rtol=1e-5, atol=1e-5)
    terms["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_is_trained() -> None:
    model, (_, targets) = small_model().train(), batch(images=2, dtype=torch.float32)
    SetCriterion(DETR)(model(torch.rand(2, 3, 64, 64)), targets)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_it_is_traced_whole() -> None:
    model, (_, targets) = small_model().train(), batch(images=2, dtype=torch.float32)
    model.backbone.eval()
    images, criterion = torch.rand(2, 3, 64, 64), SetCriterion(DETR)
    expected = criterion(model(images), targets)
    model.compile(backend="eager", fullgraph=True)
    criterion.compile(backend="eager", fullgraph=True)
    for name, value in criterion(model(images), targets).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_scores_of_detections_are_probabilities() -> None:
    """Of each query's best class, as in DETR; and "no object" is never detected, however likely."""
    outputs = small_model().eval()(torch.rand(2, 3, 64, 64))
    p = outputs["class_logits"][-1].softmax(-1)
    assert outputs["class_logits"].shape == (2, 2, 6, 4)
    sizes = torch.tensor([[64, 64]] * 2)
    images = decode(outputs["logits"][-1], outputs["boxes"][-1], sizes, class_scores="softmax")
    for image, found in enumerate(images):
        want, label = p[image, :, :-1].max(-1)
        order = want.argsort(descending=True)
        torch.testing.assert_close(found.scores, want[order], rtol=1e-5, atol=1e-7)
        assert torch.equal(found.labels, label[order])


def test_the_prior_of_scores_is_for_sigmoids_alone() -> None:
    softmax, sigmoid = (small_model(class_scores=kind).decoder.class_head.bias for kind in ("softmax", "sigmoid"))
    assert sigmoid.sigmoid().tolist() == pytest.approx([CLASS_PRIOR] * 3)
    assert softmax.shape == (4,)
    assert 0 < softmax.abs().max() <= 16**-0.5


def test_a_layer_whose_matching_fails_is_named_and_the_others_have_their_numbers() -> None:
    outputs, targets = batch()
    whole = SetCriterion(DETR)(outputs, targets)
    z = outputs["class_logits"].detach().clone()
    z[1, 1, 2, 0] = torch.nan
    broken = {**outputs, "logits": log_odds(z), "class_logits": z}
    criterion = SetCriterion(DETR, matcher_backend="scipy")
    num_boxes = boxes_per_process(targets.valid.sum())
    with pytest.raises(NonFiniteError, match="decoder layer 1, image 1"):
        criterion(broken, targets)
    terms = replay._by_layer(criterion, completed(criterion, DETR, 1), broken, targets, num_boxes)
    assert terms["class/0"] == whole["class/0"]
    assert terms["class/1"].isnan()


def test_a_softmax_model_can_learn_by_the_focal_loss_and_not_the_other_way_round() -> None:
    outputs, targets = batch()
    focal = SetCriterion(LossConfig())(outputs, targets)["loss"]
    (gradient,) = torch.autograd.grad(focal, outputs["class_logits"])
    assert gradient.isfinite().all()
    assert gradient[..., -1].abs().min() > 0, "odds are against no object, too"
    RunConfig(model=ModelConfig(class_scores="softmax"))
    with pytest.raises(ValueError, match=r"loss.classification must be .*model.class_scores=.sigmoid.*got 'softmax'"):
        RunConfig(loss=DETR)
    del outputs["class_logits"]
    with pytest.raises(ValueError, match=r'needs the outputs "class_logits" of a model with class_scores="softmax"'):
        SetCriterion(DETR)(outputs, targets)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ModelConfig, {**SCORES, "query_init": "anchors", "denoising_groups": 1}, "model.denoising_groups must be 0"),
        (LossConfig, {"no_object_weight": 0.2}, "loss.no_object_weight must be left at its default"),
        (LossConfig, {"classification": "softmax", "no_object_weight": 0.0}, "loss.no_object_weight must be positive"),
        (LossConfig, {"classification": "softmax", "no_object_weight": float("nan")}, "loss.no_object_weight must be positive"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)
