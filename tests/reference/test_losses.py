"""smca.reference.losses: a batch worked by hand, focal loss in torch, and what must not matter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smca.reference.losses import Targets, match, set_loss, sigmoid_focal_loss

WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
TARGET = [0.25, 0.5, 0.5, 0.5]


def hand_worked() -> tuple[dict[str, Any], Targets]:
    """Two layers, two images, two queries, two classes; image 0 has one object of class 1, image 1 has none."""
    logits = np.zeros((2, 2, 2, 2))
    logits[1, 0, 0, 1] = np.log(3.0)  # layer 1: query 0 says p = ¾ for the right class
    boxes = np.full((2, 2, 2, 4), 0.5)
    boxes[0, 0] = [[0.75, 0.5, 0.5, 0.5], [0.375, 0.5, 0.5, 0.5]]
    boxes[1, 0] = [TARGET, [0.75, 0.5, 0.5, 0.5]]
    valid = np.array([[False, True], [False, False]])
    target_boxes = np.full((2, 2, 4), np.nan)  # padding may hold anything
    target_boxes[0, 1] = TARGET
    return {"logits": logits, "boxes": boxes}, Targets(np.array([[99, 1], [-7, 99]]), target_boxes, valid)


def random_batch(seed: int, targets: int = 4) -> tuple[dict[str, Any], Targets]:
    rng = np.random.default_rng(seed)
    outputs = {"logits": rng.normal(size=(3, 2, 6, 5)) * 3, "boxes": rng.uniform(0.1, 0.7, size=(3, 2, 6, 4))}
    labels, boxes = rng.integers(0, 5, size=(2, targets)), rng.uniform(0.1, 0.7, size=(2, targets, 4))
    return outputs, Targets(labels, boxes, np.ones((2, targets), dtype=bool))


def test_focal_equals_torch() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(50, 7)) * 5, (rng.random((50, 7)) < 0.3).astype(float)
    x, z = torch.from_numpy(logits), torch.from_numpy(targets)
    p = x.sigmoid()
    ce = torch.nn.functional.binary_cross_entropy_with_logits(x, z, reduction="none")
    p_t = p * z + (1 - p) * (1 - z)
    for alpha, gamma in [(0.25, 2.0), (0.5, 0.0), (0.9, 1.5)]:
        want = (alpha * z + (1 - alpha) * (1 - z)) * (1 - p_t) ** gamma * ce
        np.testing.assert_allclose(sigmoid_focal_loss(logits, targets, alpha, gamma), want.numpy(), rtol=1e-9)


def test_focal_is_stable_and_strict() -> None:
    far = np.array([-1e4, 1e4, -40.0])
    # Far out it is α·|x|, or nothing; at −40 and absent, ¾·(e^−40)²·e^−40, which a plain log(1 − p) would lose
    np.testing.assert_allclose(
        sigmoid_focal_loss(far, np.array([1.0, 0.0, 0.0])), [2500.0, 7500.0, 0.75 * np.exp(-120)]
    )
    with pytest.raises(ValueError, match="targets: expected 0 or 1"):
        sigmoid_focal_loss(far, np.array([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match=r"targets: expected shape \(3,\), got \(2,\)"):
        sigmoid_focal_loss(far, np.array([0.0, 1.0]))


def test_set_loss_by_hand() -> None:
    """Layer 0: query 1 is nearer (L1 0.125 against 0.5; its box shares 0.1875 of 0.3125 with the target, so IoU = GIoU
    = 0.6, the hull being the union). Layer 1: query 0 has the very box. A logit of 0 costs ¾·¼·ln 2 = 0.1299651 where
    the class is absent and ¼·¼·ln 2 = 0.0433217 where it is present; p = ¾ costs ¼·(¼)²·ln(4/3) = 0.0044950."""
    outputs, targets = hand_worked()
    assert match(outputs["logits"], outputs["boxes"], targets, WEIGHTS).tolist() == [
        [[-1, 1], [-1, -1]],
        [[-1, 0], [-1, -1]],
    ]
    terms = set_loss(outputs, targets, WEIGHTS)
    expected = {
        "class/0": 2 * (7 * 0.1299651 + 0.0433217),
        "l1/0": 5 * 0.125,
        "giou/0": 2 * (1 - 0.6),
        "class/1": 2 * (7 * 0.1299651 + 0.0044950),
        "l1/1": 0.0,
        "giou/1": 0.0,
        "loss": 5.1596558,
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value, abs=2e-6), name


def test_the_number_of_boxes_divides() -> None:
    """The same image twice: twice the sums, twice the boxes, the same loss."""
    outputs, targets = random_batch(1)
    once = {k: v[:, :1] for k, v in outputs.items()}
    twice = {k: np.concatenate([v, v], axis=1) for k, v in once.items()}
    alone = Targets(targets.labels[:1], targets.boxes[:1], targets.valid[:1])
    both = Targets(*(np.concatenate([a, a]) for a in (alone.labels, alone.boxes, alone.valid)))
    want = set_loss(once, alone, WEIGHTS)
    assert set_loss(twice, both, WEIGHTS) == pytest.approx(want, rel=1e-13)
    assert want["l1/0"] > 0.1


@pytest.mark.parametrize("width", [0, 3])
def test_no_object_anywhere(width: int) -> None:
    outputs, _ = random_batch(2)
    none = Targets(np.zeros((2, width), dtype=int), np.zeros((2, width, 4)), np.zeros((2, width), dtype=bool))
    terms = set_loss(outputs, none, WEIGHTS)
    assert match(outputs["logits"], outputs["boxes"], none, WEIGHTS).shape == (3, 2, width)
    assert (match(outputs["logits"], outputs["boxes"], none, WEIGHTS) == -1).all()
    assert terms["l1/2"] == terms["giou/2"] == 0.0
    absent = 2 * sigmoid_focal_loss(outputs["logits"][2], np.zeros((2, 6, 5))).sum()  # divided by 1, not by 0
    assert terms["class/2"] == pytest.approx(absent, rel=1e-13)


def test_order_of_queries_and_targets_does_not_matter() -> None:
    outputs, targets = random_batch(3)
    want, indices = set_loss(outputs, targets, WEIGHTS), match(outputs["logits"], outputs["boxes"], targets, WEIGHTS)
    queries, objects = np.array([3, 1, 5, 0, 4, 2]), np.array([2, 0, 3, 1])
    shuffled = {k: v[:, :, queries] for k, v in outputs.items()}
    turned = Targets(targets.labels[:, objects], targets.boxes[:, objects], targets.valid)
    assert set_loss(shuffled, turned, WEIGHTS) == pytest.approx(want, rel=1e-12)
    np.testing.assert_array_equal(
        queries[match(shuffled["logits"], shuffled["boxes"], turned, WEIGHTS)], indices[:, :, objects]
    )


def test_more_objects_than_queries() -> None:
    outputs, targets = random_batch(4, targets=9)
    indices = match(outputs["logits"], outputs["boxes"], targets, WEIGHTS)
    assert ((indices >= 0).sum(axis=-1) == 6).all()
    for found in indices.reshape(-1, 9):
        assert sorted(found[found >= 0].tolist()) == list(range(6))
    terms = set_loss(outputs, targets, WEIGHTS)
    assert terms["l1/0"] > 0
    assert np.isfinite(terms["loss"])


def test_perfect_predictions_cost_nothing() -> None:
    _, targets = random_batch(5)
    logits = np.full((1, 2, 4, 5), -500.0)
    np.put_along_axis(logits[0], targets.labels[:, :, None], 500.0, axis=-1)
    terms = set_loss({"logits": logits, "boxes": targets.boxes[None]}, targets, WEIGHTS)
    assert terms["loss"] == pytest.approx(0.0, abs=1e-12)


def test_loss_is_the_sum_and_weights_scale_their_terms() -> None:
    outputs, targets = random_batch(6)
    terms = set_loss(outputs, targets, WEIGHTS)
    assert sum(value for name, value in terms.items() if name != "loss") == pytest.approx(terms["loss"], rel=1e-14)
    tripled = set_loss(outputs, targets, {k: 3 * v for k, v in WEIGHTS.items()})  # the same matching
    assert tripled == pytest.approx({k: 3 * v for k, v in terms.items()}, rel=1e-13)


def test_torch_tensors_and_any_object_with_the_attributes_will_do() -> None:
    outputs, targets = random_batch(7)
    tensors = SimpleNamespace(**{k: torch.from_numpy(getattr(targets, k)) for k in ("labels", "boxes", "valid")})
    assert set_loss({k: torch.from_numpy(v) for k, v in outputs.items()}, tensors, WEIGHTS) == set_loss(
        outputs, targets, WEIGHTS
    )


def test_predictions_that_are_not_finite_raise() -> None:
    outputs, targets = random_batch(8)
    outputs["logits"][1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"cost\[2, 0\]: expected a number"):
        set_loss(outputs, targets, WEIGHTS)


def test_bad_input_is_named() -> None:
    outputs, targets = random_batch(9)
    with pytest.raises(ValueError, match=r"boxes: expected shape \(3, 2, 6, 4\), got \(3, 2, 5, 4\)"):
        set_loss({**outputs, "boxes": outputs["boxes"][:, :, :5]}, targets, WEIGHTS)
    with pytest.raises(ValueError, match=r"logits: expected shape .* got \(2, 6, 5\)"):
        set_loss({k: v[0] for k, v in outputs.items()}, targets, WEIGHTS)
    with pytest.raises(ValueError, match=r"targets.labels: expected shape \(2, 4\), got \(2, 3\)"):
        set_loss(outputs, Targets(targets.labels[:, :3], targets.boxes, targets.valid), WEIGHTS)
    with pytest.raises(ValueError, match=r"targets.valid: expected shape \(2, any\), got \(1, 4\)"):
        set_loss(outputs, Targets(targets.labels[:1], targets.boxes[:1], targets.valid[:1]), WEIGHTS)
    with pytest.raises(ValueError, match="labels: expected each in"):
        set_loss(outputs, Targets(targets.labels + 5, targets.boxes, targets.valid), WEIGHTS)
    with pytest.raises(ValueError, match="weights: expected the terms"):
        set_loss(outputs, targets, {"class": 1.0})
