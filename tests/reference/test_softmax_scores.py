"""smca.reference.softmax_scores: the odds in arithmetic of 50 digits, DETR's loss and match cost in torch, and what is refused."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from smca.reference.config import ModelConfig
from smca.reference.denoising import denoising_loss
from smca.reference.losses import Targets, match, set_loss
from smca.reference.matching import match_cost
from smca.reference.softmax_scores import log_odds, softmax_loss

WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0}


def random_batch(seed: int, classes: int = 4, scale: float = 2.0) -> tuple[dict[str, Any], Targets]:
    """Two layers, three images, six queries; the last image has no object, the second more than queries."""
    rng = np.random.default_rng(seed)
    z, boxes = rng.normal(size=(2, 3, 6, classes + 1)) * scale, rng.uniform(0.2, 0.7, size=(2, 3, 6, 4))
    valid = np.zeros((3, 8), dtype=bool)
    valid[0, [1, 2, 5]], valid[1] = True, True
    labels, truth = rng.integers(0, classes, size=(3, 8)), rng.uniform(0.2, 0.7, size=(3, 8, 4))
    return {"logits": log_odds(z), "class_logits": z, "boxes": boxes}, Targets(labels, truth, valid)


@pytest.mark.parametrize("z", [
    [0.0, 0.0], [3.0, -2.0], [1000.0, -1000.0, 500.0], [-1000.0, -1000.0, 1000.0], [5.0, 5.0, 5.0, -900.0],
    np.linspace(-7, 8, 92).tolist(), [1e4, 1e4, 0.0],
])  # fmt: skip
def test_odds_to_the_last_digits(z: list[float]) -> None:
    with mpmath.workdps(50):
        powers = [mpmath.exp(mpmath.mpf(x)) for x in z]
        exact = [powers[k] / sum(powers[:k] + powers[k + 1 :]) for k in range(len(z) - 1)]
        want = [float(mpmath.log(odds)) for odds in exact]
    np.testing.assert_allclose(log_odds(np.array(z)), want, rtol=1e-14, atol=1e-14)


def test_their_sigmoid_is_the_softmax() -> None:
    z = np.random.default_rng(0).normal(size=(40, 7)) * 5
    p = torch.from_numpy(z).softmax(-1)[:, :-1].numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-log_odds(z))), p, rtol=1e-13)


@pytest.mark.parametrize("no_object_weight", [0.1, 0.7])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_loss_is_torchs_mean_cross_entropy(scale: float, no_object_weight: float) -> None:
    rng = np.random.default_rng(1)
    z, labels = rng.normal(size=(3, 5, 5)) * scale, np.array([3, 0, 3])
    pairs = np.array([0, 0, 2]), np.array([4, 1, 0])
    wanted = np.full((3, 5), 4)
    wanted[pairs] = labels
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, no_object_weight], dtype=torch.float64)
    want = functional.cross_entropy(torch.from_numpy(z).flatten(0, 1), torch.from_numpy(wanted).flatten(), weight)
    assert softmax_loss(z, pairs, labels, no_object_weight) == pytest.approx(want.item(), rel=1e-13)


def test_set_loss_is_detrs() -> None:
    """The whole loss once more: SciPy's assignment of −p, torch's cross-entropy over the queries of all images at once."""
    outputs, targets = random_batch(2)
    terms = set_loss(outputs, targets, WEIGHTS, "softmax", 0.1)
    assert list(terms) == ["class/0", "l1/0", "giou/0", "class/1", "l1/1", "giou/1", "loss"]
    number = targets.valid.sum()
    for layer in range(2):
        z, boxes = torch.from_numpy(outputs["class_logits"][layer]), outputs["boxes"][layer]
        wanted, l1 = torch.full((3, 6), 4), 0.0
        for image in range(3):
            (real,) = np.nonzero(targets.valid[image])
            labels, truth = targets.labels[image, real], targets.boxes[image, real]
            # Without its classes the cost is that of the focal loss; DETR's has −p of the softmax in their place.
            of_boxes = match_cost(
                outputs["logits"][layer, image], boxes[image], labels, truth, {**WEIGHTS, "class": 0.0}
            )
            cost = of_boxes - z[image].softmax(-1).numpy()[:, labels]
            rows, columns = linear_sum_assignment(cost)
            wanted[image, rows] = torch.from_numpy(labels[columns])
            l1 += np.abs(boxes[image, rows] - truth[columns]).sum()
        weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
        assert terms[f"class/{layer}"] == pytest.approx(
            functional.cross_entropy(z.flatten(0, 1), wanted.flatten(), weight).item(), rel=1e-12
        )
        assert terms[f"l1/{layer}"] == pytest.approx(5 * l1 / number, rel=1e-12)
    assert terms["loss"] == pytest.approx(sum(terms.values()) - terms["loss"], rel=1e-14)


def test_the_cost_decides_who_is_matched() -> None:
    """Two equal boxes; the focal cost is for the query that is surer of the class, beside "no object" or not: so is −p. But −p
    of 0.99 and of 0.9999 is the same to a hundredth, for which a box that is nearer makes up; the focal cost's is not."""
    z = np.array([[[[np.log(9999.0), 0.0], [np.log(99.0), 0.0]]]])
    boxes = np.array([[[[0.5, 0.5, 0.408, 0.4], [0.5, 0.5, 0.4, 0.4]]]])
    one = Targets(np.array([[0]]), np.array([[[0.5, 0.5, 0.4, 0.4]]]), np.array([[True]]))
    assert match(log_odds(z), boxes, one, WEIGHTS, "softmax").tolist() == [[[1]]]
    assert match(log_odds(z), boxes, one, WEIGHTS).tolist() == [[[0]]]


def test_no_object_anywhere() -> None:
    """Then the weight of "no object" is every query's, and does not matter."""
    outputs, targets = random_batch(3)
    none = Targets(targets.labels, targets.boxes, np.zeros_like(targets.valid))
    terms = set_loss(outputs, none, WEIGHTS, "softmax")
    p = torch.from_numpy(outputs["class_logits"][1]).softmax(-1)[..., -1]
    assert terms["class/1"] == pytest.approx(-p.log().mean().item(), rel=1e-13)
    assert terms["class/1"] == pytest.approx(set_loss(outputs, none, WEIGHTS, "softmax", 0.5)["class/1"], rel=1e-13)
    assert terms["l1/1"] == terms["giou/1"] == 0.0


def test_what_is_refused() -> None:
    outputs, targets = random_batch(4)
    without = {name: value for name, value in outputs.items() if name != "class_logits"}
    with pytest.raises(ValueError, match=r"outputs\['class_logits'\]: expected .* got the keys \['boxes', 'logits'\]"):
        set_loss(without, targets, WEIGHTS, "softmax")
    with pytest.raises(ValueError, match=r"expected shape \(2, 3, 6, 5\), got \(2, 3, 6, 4\)"):
        set_loss({**outputs, "class_logits": outputs["logits"]}, targets, WEIGHTS, "softmax")
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no_object_weight: expected a finite number > 0"):
            set_loss(outputs, targets, WEIGHTS, "softmax", weight)
    with pytest.raises(ValueError, match=r"classification: expected one of .* got 'cross_entropy'"):
        set_loss(outputs, targets, WEIGHTS, "cross_entropy")
    with pytest.raises(ValueError, match="of noised queries"):
        denoising_loss(outputs, targets, WEIGHTS, 1, "softmax")
    with pytest.raises(ValueError, match=r"config.class_scores: expected one of \['sigmoid', 'softmax'\]"):
        ModelConfig(class_scores="focal")
    with pytest.raises(ValueError, match=r'config\.denoising_groups: expected 0 with class_scores="softmax", got 2'):
        ModelConfig(class_scores="softmax", query_init="anchors", denoising_groups=2)
