"""losses_backward, small_detector, optimizers, training_step and training_run: against differences, against torch, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smca.datasets import Targets as TorchTargets
from smca.gpu.config import LossConfig
from smca.gpu.loss import SetCriterion
from smca.gpu.training.muon import Muon
from smca.reference import small_detector
from smca.reference.boxes import cxcywh_to_xyxy, generalized_box_iou
from smca.reference.losses import Targets, set_loss, sigmoid_focal_loss
from smca.reference.losses_backward import focal_terms_backward, giou_loss_backward, set_loss_backward
from smca.reference.optimizers import Moments, adamw, clip, muon, nearest_orthogonal, norm_of
from smca.reference.small_detector import Sizes, parameter_shapes
from smca.reference.softmax_scores import log_odds
from smca.reference.training_run import TrainingStepInputs, checkpoint_of, restored, training_run
from smca.reference.training_step import TrainingSettings, first_state, gradient_of, training_step

WEIGHTS = {"class": 1.5, "l1": 5.0, "giou": 2.5}


def batch(seed: int, objects: int = 3, classes: int = 4) -> tuple[dict[str, Any], Targets]:
    rng = np.random.default_rng(seed)
    shape = (2, 2, 5)
    z = rng.normal(size=(*shape, classes + 1))
    outputs = {"class_logits": z, "logits": log_odds(z), "boxes": rng.uniform(0.2, 0.6, (*shape, 4))}
    valid = np.zeros((2, objects + 1), dtype=bool)
    valid[0, :objects] = True  # the second image has none
    boxes = np.where(valid[..., None], rng.uniform(0.2, 0.6, (2, objects + 1, 4)), np.nan)
    return outputs, Targets(rng.integers(0, classes, valid.shape), boxes, valid)


def differences(function: Any, x: Any, step: float = 1e-6) -> Any:
    """The gradient of a scalar function by central differences."""
    gradient = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        moved = np.zeros(x.shape)
        moved[at] = step
        gradient[at] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_set_loss_is_its_slope(classification: str, seed: int) -> None:
    outputs, targets = batch(seed)
    scores = "class_logits" if classification == "softmax" else "logits"
    found = set_loss_backward(outputs, targets, WEIGHTS, classification)
    assert sorted(found) == sorted([scores, "boxes"])

    def loss(name: str, value: Any) -> float:
        changed = {**outputs, name: value}
        if name == "class_logits":
            changed["logits"] = log_odds(value)
        return set_loss(changed, targets, WEIGHTS, classification)["loss"]

    for name, gradient in found.items():
        slope = differences(lambda value, name=name: loss(name, value), outputs[name])
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)
    assert not found["boxes"][:, 1].any(), "an image without objects"
    assert np.count_nonzero(found["boxes"].any(-1)) == 2 * 3, "each layer's matched queries, no other"


def test_matchability_takes_weight_and_quality_as_given() -> None:
    """Its gradient is torch's, with both detached."""
    outputs, targets = batch(5)
    found = set_loss_backward(outputs, targets, WEIGHTS, "matchability")["logits"]
    logits = torch.tensor(outputs["logits"], requires_grad=True)
    given = (torch.tensor(targets.labels), torch.tensor(np.nan_to_num(targets.boxes)), torch.tensor(targets.valid))
    criterion = SetCriterion(LossConfig(*WEIGHTS.values(), "matchability"), matcher_backend="scipy")
    terms = criterion({"logits": logits, "boxes": torch.tensor(outputs["boxes"])}, TorchTargets(*given))
    terms["loss"].backward()
    np.testing.assert_allclose(found, logits.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_an_empty_batch_has_a_gradient_of_its_scores_alone() -> None:
    outputs, targets = batch(1)
    none = Targets(targets.labels, targets.boxes, np.zeros_like(targets.valid))
    found = set_loss_backward(outputs, none, WEIGHTS)
    assert not found["boxes"].any()
    assert (found["logits"] > 0).all(), "every score is to fall"
    halved = set_loss_backward(outputs, none, WEIGHTS, num_boxes=2)
    np.testing.assert_array_equal(halved["logits"], found["logits"] / 2)


def test_focal_terms_backward_by_differences_and_far_out() -> None:
    x = np.array([-3.0, -0.5, 0.0, 2.0])
    for alpha, gamma in ((0.25, 2.0), (0.75, 1.5)):
        for found, present in zip(focal_terms_backward(x, alpha, gamma), (np.ones(4), np.zeros(4)), strict=True):

            def loss(logits: Any, present: Any = present, alpha: float = alpha, gamma: float = gamma) -> float:
                return float(sigmoid_focal_loss(logits, present, alpha, gamma).sum())

            np.testing.assert_allclose(found, differences(loss, x), rtol=1e-6)
    positive, negative = focal_terms_backward(np.array([-1e4, 1e4]))
    np.testing.assert_allclose(positive, [-0.25, 0.0], atol=1e-300)
    np.testing.assert_allclose(negative, [0.0, 0.75], atol=1e-300)


@pytest.mark.parametrize("kind", ["any", "apart", "inside", "around"])
def test_the_gradient_of_giou_is_its_slope(kind: str) -> None:
    rng = np.random.default_rng(3)
    wanted = np.concatenate([rng.uniform(0.4, 0.6, (20, 2)), rng.uniform(0.2, 0.4, (20, 2))], axis=1)
    ours = {
        "any": np.concatenate([rng.uniform(0.3, 0.7, (20, 2)), rng.uniform(0.1, 0.5, (20, 2))], axis=1),
        "apart": wanted + np.array([1.0, 0.9, 0.0, 0.1]),
        "inside": wanted * np.array([1.0, 1.0, 0.5, 0.4]),
        "around": wanted * np.array([1.0, 1.0, 2.0, 1.5]),
    }[kind]

    def loss(boxes: Any) -> float:
        return float((1 - generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))).sum())

    np.testing.assert_allclose(giou_loss_backward(ours, wanted), differences(loss, ours), rtol=1e-5, atol=1e-8)


def test_boxes_without_area_have_a_finite_gradient() -> None:
    flat = np.array([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.5, 0.5, 0.2, 0.2]])
    assert np.isfinite(giou_loss_backward(flat, flat)).all()
    assert np.isfinite(giou_loss_backward(flat, flat[::-1])).all()
    assert not giou_loss_backward(flat[:1], flat[:1]).any()


SMALL = Sizes(inputs=3, channels=4, classes=2, layers=2)


def small(seed: int, sizes: Sizes = SMALL) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) / 2 for name, shape in parameter_shapes(sizes).items()}


def part(seed: int, objects: int, inputs: int = 3, classes: int = 2) -> tuple[Any, Targets]:
    rng = np.random.default_rng(seed)
    valid = np.arange(3)[None] < objects
    boxes = np.concatenate([rng.uniform(0.4, 0.6, (1, 3, 2)), rng.uniform(0.2, 0.4, (1, 3, 2))], axis=-1)
    return rng.normal(size=(1, 4, inputs)), Targets(rng.integers(0, classes, (1, 3)), boxes, valid)


def test_every_parameter_of_the_small_detector_gets_its_slope() -> None:
    params, settings = small(0), TrainingSettings(weights=WEIGHTS)
    shards = [[part(1, 2), part(2, 0)], [part(3, 1), part(4, 3)]]
    _, found = gradient_of(params, shards, settings)
    for name, value in params.items():
        slope = differences(lambda v, name=name: gradient_of({**params, name: v}, shards, settings)[0], value)
        np.testing.assert_allclose(found[name], slope, rtol=1e-5, atol=1e-7, err_msg=name)


def test_parameters_that_do_not_fit_are_refused() -> None:
    params = small(0)
    with pytest.raises(ValueError, match="expected the names"):
        small_detector.forward({**params, "more": np.zeros(1)}, np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match=r"class_head.bias'\]: expected shape \(2,\), got \(3,\)"):
        small_detector.forward({**params, "class_head.bias": np.zeros(3)}, np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match=r"x: expected shape \(any, any, 3\)"):
        small_detector.forward(params, np.zeros((1, 2, 5)))


def test_adamw_is_torchs() -> None:
    rng = np.random.default_rng(0)
    value = rng.normal(size=(3, 2))
    theirs = torch.nn.Parameter(torch.tensor(value))
    optimizer = torch.optim.AdamW([theirs], lr=0.03, weight_decay=0.2)
    ours, moments = value, Moments(np.zeros((3, 2)), np.zeros((3, 2)))
    for step in range(1, 8):
        gradient = rng.normal(size=(3, 2)) * 10.0 ** rng.integers(-6, 2)
        optimizer.param_groups[0]["lr"] = rate = 0.03 / step
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        ours, moments = adamw(ours, gradient, moments, step, rate, 0.2)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-13)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (6, 2)])
def test_muon_is_productions(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    value = rng.normal(size=shape)
    theirs, other = torch.nn.Parameter(torch.tensor(value)), torch.nn.Parameter(torch.zeros(1))
    optimizer = Muon([{"params": [other], "lr": 1.0}], [{"params": [theirs], "lr": 0.05}], torch.float64)
    ours, momentum = value, np.zeros(shape)
    for step in range(5):
        gradient = rng.normal(size=shape) if step != 3 else np.zeros(shape)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        ours, momentum = muon(ours, gradient, momentum, 0.05)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-11, atol=1e-13)


def test_orthogonalize_keeps_singular_vectors_and_nothing_comes_of_nothing() -> None:
    matrix = np.random.default_rng(2).normal(size=(3, 6))
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ nearest_orthogonal(matrix) @ right.T
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-12)
    assert ((np.diag(inside) > 0.68) & (np.diag(inside) < 1.2)).all()
    assert not nearest_orthogonal(np.zeros((2, 3))).any()


def test_clipping_is_torchs_and_leaves_short_gradients_alone() -> None:
    gradients = {"a": np.array([3.0, -4.0]), "b": np.array([[12.0]])}
    assert norm_of(gradients) == 13.0
    parameters = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    for parameter, clipped in zip(parameters, clip(gradients, 0.5).values(), strict=True):
        np.testing.assert_allclose(clipped, parameter.grad.numpy(), rtol=1e-14)
    np.testing.assert_array_equal(clip(gradients, 20.0)["a"], gradients["a"])


def test_the_divisor_by_hand() -> None:
    """Processes of 1 and 3 objects divide by 2; two of none by ½, since one object is the least in all."""
    params, settings = small(1), TrainingSettings(weights=WEIGHTS)
    one, three, none = part(1, 1), part(2, 3), part(3, 0)
    alone = [gradient_of(params, [[p]], settings)[0] for p in (one, three, none)]
    assert gradient_of(params, [[one], [three]], settings)[0] == pytest.approx((alone[0] + 3 * alone[1]) / 4, rel=1e-13)
    assert gradient_of(params, [[none], [none]], settings)[0] == pytest.approx(2 * alone[2], rel=1e-13)
    assert gradient_of(params, [[none, three]], settings)[0] == pytest.approx((alone[2] + 3 * alone[1]) / 3, rel=1e-13)


def test_a_gradient_is_measured_and_clipped_after_the_scale_is_taken_out() -> None:
    params, shards = small(2), [[part(1, 2)]]
    plain, scaled = (
        training_step(first_state(params, s), shards, s)
        for s in (TrainingSettings(clip_norm=0.1), TrainingSettings(clip_norm=0.1, loss_scale=4096.0))
    )
    assert plain[1] == scaled[1]
    for name, value in plain[0].params.items():
        np.testing.assert_array_equal(value, scaled[0].params[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(optimizer: str) -> None:
    params = small(3, Sizes(inputs=16, channels=16, classes=2, layers=1))
    steps = [TrainingStepInputs([[part(seed, 2, inputs=16)]], 1 / (1 + seed)) for seed in range(5)]
    runs = [
        training_run(params, steps, TrainingSettings(optimizer=optimizer, lr=0.01, ema_decay=0.9, resume_after=after))
        for after in (0, 3)
    ]
    for of in ("params", "average"):
        for name, value in getattr(runs[0], of).items():
            np.testing.assert_array_equal(value, getattr(runs[1], of)[name], err_msg=name)
            assert len(value) == 5
    state = first_state(params, TrainingSettings(optimizer=optimizer))
    assert set(state.momentum) == (set() if optimizer == "adamw" else {"backbone.weight", "layers.0.weight"})
    assert restored(checkpoint_of(state)).steps == 0
