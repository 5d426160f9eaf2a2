"""The oracle against code from elsewhere: SciPy, PyTorch's attention, transformers' losses, and arithmetic of 50 digits."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.nn import functional
from transformers.loss import loss_for_object_detection

from smca.conformance.inputs.attention import AttentionInputs, attention_inputs
from smca.conformance.inputs.matching import BoxInputs, CostInputs, LossInputs, box_inputs, cost_inputs, loss_inputs
from smca.conformance.tolerances import attention_bounds
from smca.reference import attention, boxes, layers, losses, matching

SMALL = settings(max_examples=60, deadline=None, derandomize=True)
THEIRS: Any = loss_for_object_detection
Array = npt.NDArray[np.float64]


@SMALL
@given(recipe=st.one_of(cost_inputs(), cost_inputs(kind=st.just("forbidden"))))
def test_assignment_costs_what_scipys_costs(recipe: CostInputs) -> None:
    cost = recipe.array("float64")
    ours, theirs = matching.linear_sum_assignment(cost), linear_sum_assignment(cost)
    assert cost[ours].sum() == pytest.approx(cost[theirs].sum(), rel=1e-12, abs=1e-12)


@SMALL
@given(recipe=attention_inputs(batch=1, padding="none"))
def test_attention_is_pytorchs_with_log_g_as_its_mask(recipe: AttentionInputs) -> None:
    """`multi_head_attention_forward` with identity projections; log G enters as the additive mask that it takes."""
    x = recipe.arrays("float64")
    h, n, d = x.q.shape[1:]
    weight = attention.gaussian_weight_map(
        x.level.center_xy, np.sqrt(2 / np.maximum(x.level.precision_xy, 1e-12)), 1.0, x.level.size
    )
    log_g = np.log(np.maximum(weight.reshape(h, n, -1), 1e-300))
    usable = weight.reshape(h, n, -1).min(-1) > 1e-290  # below, the paper's G underflows where its logarithm does not
    merged = [torch.tensor(layers.merge_heads(array)[0][:, None]) for array in (x.q, x.level.k, x.level.v)]
    eye, zero = torch.eye(h * d, dtype=torch.float64), torch.zeros(h * d, dtype=torch.float64)
    query, key, value = merged
    output, _ = functional.multi_head_attention_forward(
        query, key, value, h * d, h, torch.cat([eye] * 3), torch.cat([zero] * 3), None, None, False, 0.0, eye, zero,
        attn_mask=torch.tensor(log_g), need_weights=False,
    )  # fmt: skip
    ours = layers.merge_heads(attention.smca_attention(*x.arguments))[0].reshape(n, h, d)
    theirs = output[:, 0].numpy().reshape(n, h, d)
    keep = usable.T[..., None]
    np.testing.assert_allclose(np.where(keep, ours, 0), np.where(keep, theirs, 0), rtol=1e-9, atol=1e-7)


@SMALL
@given(recipe=box_inputs())
def test_giou_is_transformers(recipe: BoxInputs) -> None:
    one, two = recipe.arrays("float64")
    theirs = THEIRS.generalized_box_iou(torch.tensor(one), torch.tensor(two)).numpy()
    ours = boxes.generalized_box_iou(one[:, None], two)
    defined = np.isfinite(theirs)  # theirs is NaN where both boxes lie on one line
    np.testing.assert_allclose(ours[defined], theirs[defined], rtol=0, atol=1e-12)


@SMALL
@given(recipe=loss_inputs())
def test_focal_loss_is_transformers(recipe: LossInputs) -> None:
    x = recipe.arrays("float64")
    truth: Array = np.asarray(np.random.default_rng(recipe.seed).random(x.logits.shape) < 0.3, dtype=np.float64)
    flat = torch.tensor(x.logits).flatten(1), torch.tensor(truth).flatten(1)
    theirs = THEIRS.sigmoid_focal_loss(*flat, num_boxes=1).item() * flat[0].shape[1]
    assert losses.sigmoid_focal_loss(x.logits, truth).sum() == pytest.approx(theirs, rel=1e-11)


def exact_output(x: dict[str, Any], size: tuple[int, int], mask: Any) -> Any:
    """Σ grad_out · O of one head and image, in mpmath's precision, written from method.md §2 without looking at ours."""
    total = mpmath.mpf(0)
    for n in range(len(x["q"])):
        numerators, denominator = [mpmath.mpf(0)] * len(x["v"][0]), mpmath.mpf(0)
        for row in range(size[0]):
            for column in range(size[1]):
                key = row * size[1] + column
                if mask is not None and mask[key]:
                    continue
                dot = sum(a * b for a, b in zip(x["q"][n], x["k"][key], strict=True)) / mpmath.sqrt(len(x["q"][n]))
                distance = (column + mpmath.mpf(1) / 2 - x["c"][n][0], row + mpmath.mpf(1) / 2 - x["c"][n][1])
                log_g = -(x["p"][n][0] * distance[0] ** 2 + x["p"][n][1] * distance[1] ** 2) / 2
                weight = mpmath.exp(dot + log_g)
                denominator += weight
                numerators = [a + weight * v for a, v in zip(numerators, x["v"][key], strict=True)]
        total += sum(a / denominator * g for a, g in zip(numerators, x["g"][n], strict=True))
    return total


@pytest.mark.parametrize("padding", ["none", "some"])
@pytest.mark.parametrize("logit", [1.0, 30.0])
def test_gradients_to_the_last_digit(logit: float, padding: str) -> None:
    """Every entry of every gradient by central differences at 50 digits, whose truncation is near 10⁻²⁶."""
    recipe = AttentionInputs(queries=2, channels=2, size=(2, 3), logit=logit, padding=padding, seed=11)
    a = recipe.arrays("float64")
    mask = None if a.level.key_padding_mask is None else a.level.key_padding_mask[0]
    names = {"q": a.q, "k": a.level.k, "v": a.level.v, "c": a.level.center_xy, "p": a.level.precision_xy}
    with mpmath.workdps(50):
        x = {
            name: [[mpmath.mpf(float(v)) for v in row] for row in array[0, 0]]
            for name, array in {**names, "g": a.grad_out}.items()
        }
        ours = float((attention.smca_attention(*a.arguments) * a.grad_out).sum())
        assert ours == pytest.approx(float(exact_output(x, (2, 3), mask)), rel=1e-13, abs=1e-15)
        gradients = attention.smca_attention_vjp(a.grad_out, *a.arguments)
        step = mpmath.mpf(10) ** -13
        bounds = attention_bounds(a.q, a.level, a.grad_out, "float64", 0.0).gradients
        for name, gradient, bound in zip(names, gradients, bounds, strict=True):
            for i, j in np.ndindex(gradient.shape[2:]):
                kept = x[name][i][j]
                x[name][i][j] = kept + step
                ahead = exact_output(x, (2, 3), mask)
                x[name][i][j] = kept - step
                behind = exact_output(x, (2, 3), mask)
                x[name][i][j] = kept
                exact = float((ahead - behind) / (2 * step))
                assert abs(gradient[0, 0, i, j] - exact) <= bound[0, 0, i, j] + 1e-23, (name, i, j)
