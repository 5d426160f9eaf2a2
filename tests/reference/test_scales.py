"""smca.reference.attention over several levels: against one level at a time, central differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smca.reference.attention import (
    Level,
    multi_scale_smca_attention,
    multi_scale_smca_attention_vjp,
    smca_attention,
    smca_attention_vjp,
)

SIZES = ((5, 6), (3, 3), (2, 2))  # of 33 × 47 pixels at strides 8, 16 and 32: levels that do not nest


def example(
    seed: int = 0, b: int = 2, h: int = 3, n: int = 4, d: int = 5, sizes: Any = SIZES
) -> tuple[Any, list[Level], Any]:
    """q, levels (nothing padded in the first image, a last column in the others) and weights that don't sum to 1."""
    rng = np.random.default_rng(seed)
    levels = []
    for height, width in sizes:
        k, v = rng.normal(size=(2, b, h, height * width, d))
        mask = np.zeros((b, height, width), dtype=bool)
        mask[1:, :, -1] = width > 1
        center, precision = rng.uniform(-1, 5, (b, h, n, 2)), rng.uniform(0.05, 1.5, (b, h, n, 2))
        levels.append(Level(k, v, center, precision, (height, width), mask.reshape(b, -1)))
    return rng.normal(size=(b, h, n, d)), levels, rng.uniform(0.1, 1, (b, n, len(sizes)))


def in_torch(q: Any, levels: list[list[Any]], sizes: Any, masks: Any, weights: Any) -> Any:
    """Σ_j α_j · softmax(q·k_j/√d + log G_j) · v_j by torch's attention; levels are [k, v, centre, precision]."""
    total = torch.zeros_like(q)
    for j, (k, v, center, precision) in enumerate(levels):
        y, x = torch.meshgrid(*(torch.arange(size).double() + 0.5 for size in sizes[j]), indexing="ij")
        delta = torch.stack([x.flatten(), y.flatten()], dim=-1) - center[..., None, :]
        bias = -(delta**2 * precision[..., None, :]).sum(dim=-1) / 2
        bias = bias.masked_fill(torch.from_numpy(masks[j])[:, None, None], -torch.inf)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        total = total + weights[:, None, :, j : j + 1] * out
    return total


def test_one_level_of_weight_one_is_single_scale() -> None:
    q, levels, _ = example(1)
    ones, grad_out = np.ones((2, 4, 1)), np.random.default_rng(2).normal(size=q.shape)
    for level in levels:
        np.testing.assert_array_equal(multi_scale_smca_attention(q, [level], ones), smca_attention(q, *level))
        dq, (rest,), dweights = multi_scale_smca_attention_vjp(grad_out, q, [level], ones)
        for got, want in zip((dq, *rest), smca_attention_vjp(grad_out, q, *level), strict=True):
            np.testing.assert_array_equal(got, want)
        assert dweights.shape == (2, 4, 1)


def test_one_hot_weights_pick_a_level() -> None:
    q, levels, _ = example(3)
    picked = np.array([[0, 1, 2, 1], [2, 2, 0, 1]])  # [B, N]
    out = multi_scale_smca_attention(q, levels, np.eye(3)[picked])
    for image, query in np.ndindex(2, 4):
        alone = smca_attention(q, *levels[picked[image, query]])
        np.testing.assert_array_equal(out[image, :, query], alone[image, :, query])


def test_attention_equals_torch() -> None:
    q, levels, weights = example(4)
    tensors = [[torch.from_numpy(x) for x in level[:4]] for level in levels]
    masks = [level.key_padding_mask for level in levels]
    want = in_torch(torch.from_numpy(q), tensors, SIZES, masks, torch.from_numpy(weights)).numpy()
    np.testing.assert_allclose(multi_scale_smca_attention(q, levels, weights), want, rtol=1e-12, atol=1e-13)


def test_each_softmax_is_over_its_own_level() -> None:
    """What is added to all logits of one level's keys changes nothing: no other level is weighed against it."""
    q, levels, weights = example(5)
    shifted = [level._replace(k=level.k + 3.0 * j) for j, level in enumerate(levels)]
    got, want = (multi_scale_smca_attention(q, each, weights) for each in (shifted, levels))
    np.testing.assert_allclose(got, want, rtol=1e-11)


def test_order_of_levels_does_not_matter() -> None:
    q, levels, weights = example(6)
    order = [2, 0, 1]
    turned = multi_scale_smca_attention(q, [levels[j] for j in order], weights[..., order])
    np.testing.assert_allclose(turned, multi_scale_smca_attention(q, levels, weights), rtol=1e-12)


def test_weights_are_a_querys_and_the_same_for_all_heads() -> None:
    q, levels, weights = example(7)
    together = multi_scale_smca_attention(q, levels, weights)
    for head, query in np.ndindex(3, 4):
        one = (slice(None), slice(head, head + 1))
        cut = [
            Level(x.k[one], x.v[one], x.center_xy[one][:, :, [query]], x.precision_xy[one][:, :, [query]], *x[4:])
            for x in levels
        ]
        alone = multi_scale_smca_attention(q[one][:, :, [query]], cut, weights[:, [query]])
        np.testing.assert_allclose(alone, together[one][:, :, [query]], rtol=1e-12)


def test_vjp_equals_central_differences() -> None:
    q, levels, weights = example(8, b=2, h=2, n=2, d=2, sizes=((2, 3), (1, 2), (1, 1)))
    grad_out = np.random.default_rng(9).normal(size=q.shape)
    dq, per_level, dweights = multi_scale_smca_attention_vjp(grad_out, q, levels, weights)
    pairs = [("q", q, dq), ("level_weights", weights, dweights)]
    for j, level in enumerate(levels):
        pairs += [(f"levels[{j}].{level._fields[i]}", level[i], per_level[j][i]) for i in range(4)]
    step = 1e-5
    for name, array, gradient in pairs:
        assert gradient.shape == array.shape
        for index in np.ndindex(*array.shape):
            kept, values = array[index], []
            for moved in (kept + step, kept - step):
                array[index] = moved
                values.append(float((multi_scale_smca_attention(q, levels, weights) * grad_out).sum()))
            array[index] = kept
            expected = (values[0] - values[1]) / (2 * step)
            assert gradient[index] == pytest.approx(expected, rel=1e-6, abs=1e-8), f"d{name}{list(index)}"


def test_vjp_equals_autograd() -> None:
    q, levels, weights = example(10)
    leaves = [torch.from_numpy(x).requires_grad_() for x in (q, weights, *(x for level in levels for x in level[:4]))]
    masks = [level.key_padding_mask for level in levels]
    out = in_torch(leaves[0], [leaves[2 + 4 * j : 6 + 4 * j] for j in range(3)], SIZES, masks, leaves[1])
    grad_out = torch.from_numpy(np.random.default_rng(11).normal(size=q.shape))
    want = torch.autograd.grad(out, leaves, grad_out)
    dq, per_level, dweights = multi_scale_smca_attention_vjp(grad_out.numpy(), q, levels, weights)
    for got, expected in zip((dq, dweights, *(x for level in per_level for x in level)), want, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


def test_by_hand() -> None:
    """Two keys of equal weight, 2 and 4, in level 0, and one of 10 in level 1: 3·0.9 + 10·0.1 = 3.7."""
    zero = np.zeros((1, 1, 1, 2))
    q, v = np.zeros((1, 1, 1, 1)), np.array([2.0, 4.0]).reshape(1, 1, 2, 1)
    levels = [Level(v, v, zero, zero, (1, 2)), Level(q, q + 10, zero, zero, (1, 1))]
    weights = np.array([[[0.9, 0.1]]])
    assert multi_scale_smca_attention(q, levels, weights).item() == pytest.approx(3.7, rel=1e-14)
    dq, per_level, dweights = multi_scale_smca_attention_vjp(np.full_like(q, 2.0), q, levels, weights)
    np.testing.assert_allclose(dweights, [[[6.0, 20.0]]], rtol=1e-14)
    np.testing.assert_allclose(per_level[0][1].ravel(), [0.9, 0.9], rtol=1e-14)
    np.testing.assert_allclose(per_level[1][1].ravel(), [0.2], rtol=1e-14)
    # S̄ = 0.9·2·½·(2 − 3, 4 − 3) = (−0.9, 0.9); the keys are 2 and 4, so q's gradient is 0.9·(4 − 2)
    assert dq.item() == pytest.approx(1.8, rel=1e-14)


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_padded_keys_are_never_read(junk: float) -> None:
    q, levels, weights = example(12)
    dirty = []
    for level in levels:
        mask: Any = level.key_padding_mask
        padded = np.broadcast_to(mask[:, None, :, None], level.k.shape)
        assert padded.any()
        dirty.append(level._replace(k=np.where(padded, junk, level.k), v=np.where(padded, junk, level.v)))
    want, got = (multi_scale_smca_attention(q, each, weights) for each in (levels, dirty))
    np.testing.assert_array_equal(got, want)
    want_vjp, got_vjp = (multi_scale_smca_attention_vjp(q, q, each, weights) for each in (levels, dirty))
    np.testing.assert_array_equal(got_vjp[2], want_vjp[2])
    np.testing.assert_array_equal(got_vjp[1][0][0], want_vjp[1][0][0])


def test_bad_levels_are_named() -> None:
    q, levels, weights = example()
    with pytest.raises(ValueError, match="levels: expected at least one feature level, got none"):
        multi_scale_smca_attention(q, [], weights)
    with pytest.raises(ValueError, match=r"level_weights: expected shape \(2, 4, 3\), got \(2, 3, 4\)"):
        multi_scale_smca_attention(q, levels, weights.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"level_weights: expected shape \(2, 4, 2\), got \(2, 4, 3\)"):
        multi_scale_smca_attention_vjp(q, q, levels[:2], weights)
    with pytest.raises(ValueError, match=r"levels\[1\]: v: expected shape \(2, 3, 9, 5\), got \(2, 3, 4, 5\)"):
        multi_scale_smca_attention(q, [levels[0], levels[1]._replace(v=levels[2].v)], weights)
    hidden = levels[2]._replace(key_padding_mask=np.ones((2, 4), dtype=bool))
    with pytest.raises(ValueError, match=r"levels\[2\]: key_padding_mask: expected a key that is not padded"):
        multi_scale_smca_attention(q, [*levels[:2], hidden], weights)
    with pytest.raises(ValueError, match="grad_out: expected shape"):
        multi_scale_smca_attention_vjp(q[:1], q, levels, weights)
