"""smca.reference.attention against loops, against central differences, and against torch's autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.mixins import NDArrayOperatorsMixin

from smca.reference.attention import (
    Level,
    gaussian_weight_map,
    multi_scale_smca_attention,
    multi_scale_smca_attention_vjp,
    precision_from_scale,
    smca_attention,
    smca_attention_vjp,
)
from smca.reference.layers import dot_product_attention

SIZE = (3, 4)
NAMES = ("q", "k", "v", "center_xy", "precision_xy")


def example(seed: int = 0, b: int = 2, h: int = 3, n: int = 4, d: int = 5, size: tuple[int, int] = SIZE) -> list[Any]:
    """q, k, v, center_xy, precision_xy, with centres inside and outside the map."""
    rng = np.random.default_rng(seed)
    keys = size[0] * size[1]
    q, k, v = rng.normal(size=(b, h, n, d)), rng.normal(size=(b, h, keys, d)), rng.normal(size=(b, h, keys, d))
    return [q, k, v, rng.uniform(-2, 6, size=(b, h, n, 2)), rng.uniform(0.05, 1.5, size=(b, h, n, 2))]


def example_mask(b: int = 2, size: tuple[int, int] = SIZE) -> np.ndarray[Any, Any]:
    """[B, L]: nothing padded in the first image, last column and last row in the others."""
    mask = np.zeros((b, *size), dtype=bool)
    mask[1:, -1, :] = mask[1:, :, -1] = True
    return mask.reshape(b, -1)


def by_loops(q: Any, k: Any, v: Any, center_xy: Any, precision_xy: Any, size: Any, mask: Any = None) -> Any:
    """Equations (3) to (6), one number at a time."""
    out = np.zeros_like(q)
    for b, h, n in np.ndindex(*q.shape[:3]):
        (cx, cy), (px, py) = center_xy[b, h, n], precision_xy[b, h, n]
        total, mixed = 0.0, [0.0] * q.shape[3]
        for row in range(size[0]):
            for column in range(size[1]):
                key = row * size[1] + column
                if mask is not None and mask[b, key]:
                    continue
                logit = sum(float(x) * float(y) for x, y in zip(q[b, h, n], k[b, h, key], strict=True))
                logit /= math.sqrt(q.shape[3])
                logit += -0.5 * px * (column + 0.5 - cx) ** 2 - 0.5 * py * (row + 0.5 - cy) ** 2
                weight = math.exp(logit)
                total += weight
                mixed = [m + weight * float(x) for m, x in zip(mixed, v[b, h, key], strict=True)]
        out[b, h, n] = [m / total for m in mixed]
    return out


def in_torch(arrays: list[torch.Tensor], size: tuple[int, int], mask: Any = None) -> torch.Tensor:
    """The same formula, written the paper's way: softmax of q·k/√d + log G, with G a weight map."""
    q, k, v, center, precision = arrays
    rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x, y = columns.flatten().double(), rows.flatten().double()
    log_g = -((x - center[..., :1]) ** 2) * precision[..., :1] / 2
    log_g = log_g - (y - center[..., 1:]) ** 2 * precision[..., 1:] / 2
    bias = log_g if mask is None else log_g.masked_fill(torch.from_numpy(mask)[:, None, None], -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def test_weight_map_is_the_papers_equation() -> None:
    g = gaussian_weight_map(np.array([1.0, 2.5]), np.array([0.5, 2.0]), 8.0, (4, 3))
    assert g.shape == (4, 3)
    # Cell (column 2, row 0) is at (2.5, 0.5): exp(−1.5²/(8·0.25) − 2²/(8·4)) = exp(−1.125 − 0.125)
    assert g[0, 2] == pytest.approx(math.exp(-1.25), rel=1e-14)
    assert g[2, 0] == pytest.approx(math.exp(-0.125), rel=1e-14)


def test_weight_map_equals_its_precision_form() -> None:
    rng = np.random.default_rng(1)
    center, scale, beta = rng.uniform(-1, 5, (2, 3, 2)), rng.uniform(0.3, 3, (2, 3, 2)), 3.0
    precision = precision_from_scale(scale, beta)
    x, y = np.meshgrid(np.arange(4) + 0.5, np.arange(3) + 0.5)
    delta_x, delta_y = x - center[..., 0, None, None], y - center[..., 1, None, None]
    log_g = -0.5 * precision[..., 0, None, None] * delta_x**2 - 0.5 * precision[..., 1, None, None] * delta_y**2
    np.testing.assert_allclose(np.log(gaussian_weight_map(center, scale, beta, SIZE)), log_g, rtol=1e-12)


def test_prior_enters_as_the_weight_map() -> None:
    """With q = 0 the attention weights are the normalised weight map, read off with one-hot values."""
    q, _, _, center, _ = example(2, d=12)
    scale = np.random.default_rng(3).uniform(0.5, 2, center.shape)
    v = np.broadcast_to(np.eye(12), (2, 3, 12, 12))
    weights = smca_attention(0 * q, v, v, center, precision_from_scale(scale, 4.0), SIZE)
    g = gaussian_weight_map(center, scale, 4.0, SIZE).reshape(2, 3, 4, 12)
    np.testing.assert_allclose(weights, g / g.sum(axis=-1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 12), (4, 3)])
def test_attention_equals_loops(size: tuple[int, int], masked: bool) -> None:
    arrays = example(4, size=size)
    mask = example_mask(size=size) if masked and size[0] > 1 else None
    expected = by_loops(*arrays, size, mask)
    np.testing.assert_allclose(smca_attention(*arrays, size, mask), expected, rtol=1e-12, atol=1e-14)


def test_attention_equals_torch() -> None:
    arrays, mask = example(5), example_mask()
    expected = in_torch([torch.from_numpy(a) for a in arrays], SIZE, mask).numpy()
    np.testing.assert_allclose(smca_attention(*arrays, SIZE, mask), expected, rtol=1e-12, atol=1e-14)


def test_one_head_is_many_heads_one_at_a_time() -> None:
    arrays = example(6)
    together = smca_attention(*arrays, SIZE)
    for head in range(3):
        alone = smca_attention(*(a[:, head : head + 1] for a in arrays), SIZE)
        np.testing.assert_allclose(alone, together[:, head : head + 1], rtol=1e-13)


def test_precision_of_zero_is_plain_attention() -> None:
    q, k, v, center, precision = example(7)
    mask = example_mask()
    plain = dot_product_attention(q, k, v, mask)
    np.testing.assert_array_equal(smca_attention(q, k, v, center, 0 * precision, SIZE, mask), plain)
    assert np.abs(smca_attention(q, k, v, center, precision, SIZE, mask) - plain).max() > 0.1


def test_a_distant_narrow_prior_does_not_overflow() -> None:
    """Every weight of the map underflows, but the softmax, which takes the largest logit off, is still exact."""
    q, k, v, center, precision = example(8)
    out = smca_attention(0 * q, k, v, 0 * center - 1000.0, 0 * precision + 100.0, SIZE)
    np.testing.assert_allclose(out, np.broadcast_to(v[:, :, :1], out.shape), rtol=1e-12)  # the nearest cell, alone


def test_vjp_equals_central_differences() -> None:
    arrays = example(9, b=1, h=2, n=2, d=2, size=(2, 3))
    mask = np.array([[False] * 4 + [True, False]])
    grad_out = np.random.default_rng(10).normal(size=arrays[0].shape)
    gradients = smca_attention_vjp(grad_out, *arrays, (2, 3), mask)
    step = 1e-5
    for name, array, gradient in zip(NAMES, arrays, gradients, strict=True):
        assert gradient.shape == array.shape
        for index in np.ndindex(*array.shape):
            kept, values = array[index], []
            for moved in (kept + step, kept - step):
                array[index] = moved
                values.append(float((smca_attention(*arrays, (2, 3), mask) * grad_out).sum()))
            array[index] = kept
            expected = (values[0] - values[1]) / (2 * step)
            assert gradient[index] == pytest.approx(expected, rel=1e-6, abs=1e-8), f"d{name}{list(index)}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision_factor", [0.0, 1.0, 50.0])
def test_vjp_equals_autograd(precision_factor: float, masked: bool) -> None:
    arrays, mask = example(11), example_mask() if masked else None
    arrays[4] *= precision_factor
    leaves = [torch.from_numpy(a).requires_grad_() for a in arrays]
    out = in_torch(leaves, SIZE, mask)
    grad_out = torch.from_numpy(np.random.default_rng(12).normal(size=tuple(out.shape)))
    expected = torch.autograd.grad(out, leaves, grad_out)
    gradients = smca_attention_vjp(grad_out.numpy(), *arrays, SIZE, mask)
    for name, gradient, want in zip(NAMES, gradients, expected, strict=True):
        scale = float(want.abs().max())
        np.testing.assert_allclose(gradient, want.numpy(), rtol=1e-10, atol=1e-12 * scale, err_msg=f"d{name}")


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e300])
def test_padded_keys_are_never_read(junk: float) -> None:
    arrays, mask = example(13), example_mask()
    grad_out = np.ones_like(arrays[0])
    out, gradients = smca_attention(*arrays, SIZE, mask), smca_attention_vjp(grad_out, *arrays, SIZE, mask)
    padded = np.broadcast_to(mask[:, None, :, None], arrays[1].shape)
    arrays[1], arrays[2] = np.where(padded, junk, arrays[1]), np.where(padded, junk, arrays[2])
    np.testing.assert_array_equal(smca_attention(*arrays, SIZE, mask), out)
    for got, want in zip(smca_attention_vjp(grad_out, *arrays, SIZE, mask), gradients, strict=True):
        np.testing.assert_array_equal(got, want)
    assert not gradients[1][padded].any()
    assert not gradients[2][padded].any()


def test_padding_is_the_same_as_a_smaller_map() -> None:
    """Last row and column padded: as if the map ended there."""
    arrays, mask = example(14, b=1, n=2), example_mask(2)[1:]
    inner = [a.reshape(1, 3, *SIZE, 5)[:, :, :2, :3].reshape(1, 3, 6, 5) for a in arrays[1:3]]
    cropped = smca_attention(arrays[0], *inner, *arrays[3:], (2, 3))
    np.testing.assert_allclose(smca_attention(*arrays, SIZE, mask), cropped, rtol=1e-13)


class OnlyProtocols(NDArrayOperatorsMixin):
    """As CuPy's arrays: answers NumPy's two protocols, refuses to become a NumPy array or to be mixed with one."""

    def __init__(self, inner: np.ndarray[Any, Any]) -> None:
        self.inner = inner

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit conversion to a NumPy array")

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return _wrap(getattr(ufunc, method)(*_unwrap(args), **_unwrap(kwargs)))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _wrap(func(*_unwrap(args), **_unwrap(kwargs)))

    def __getitem__(self, index: Any) -> Any:
        return _wrap(self.inner[index])

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name not in {"shape", "dtype", "ndim"}:
            raise AttributeError(f"{name}: only what every array library has")
        return getattr(self.inner, name)


def _wrap(value: Any) -> Any:
    return OnlyProtocols(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def _unwrap(value: Any) -> Any:
    if isinstance(value, OnlyProtocols):
        return value.inner
    if isinstance(value, np.ndarray):
        raise TypeError("an array on the host among arrays on the device")
    if isinstance(value, tuple | list):
        return type(value)(_unwrap(item) for item in value)
    return {k: _unwrap(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_runs_on_foreign_arrays_through_numpys_protocols() -> None:
    arrays, mask = example(15), example_mask()
    grad_out = np.ones_like(arrays[0])
    foreign: list[Any] = [OnlyProtocols(a) for a in arrays]
    foreign_mask: Any = OnlyProtocols(mask)
    foreign_grad: Any = OnlyProtocols(grad_out)

    out: Any = smca_attention(*foreign, SIZE, foreign_mask)
    assert isinstance(out, OnlyProtocols)
    np.testing.assert_array_equal(out.inner, smca_attention(*arrays, SIZE, mask))
    gradients: Any = smca_attention_vjp(foreign_grad, *foreign, SIZE, foreign_mask)
    for got, want in zip(gradients, smca_attention_vjp(grad_out, *arrays, SIZE, mask), strict=True):
        assert isinstance(got, OnlyProtocols)
        np.testing.assert_array_equal(got.inner, want)
    weights = np.full((2, 4, 2), 0.5)
    own, foreign_levels = Level(*arrays[1:], SIZE, mask), [Level(*foreign[1:], SIZE, foreign_mask)] * 2
    foreign_weights: Any = OnlyProtocols(weights)
    mixed: Any = multi_scale_smca_attention(foreign[0], foreign_levels, foreign_weights)
    np.testing.assert_array_equal(mixed.inner, multi_scale_smca_attention(arrays[0], [own, own], weights))
    dweights: Any = multi_scale_smca_attention_vjp(foreign_grad, foreign[0], foreign_levels, foreign_weights)[2]
    np.testing.assert_array_equal(
        dweights.inner, multi_scale_smca_attention_vjp(grad_out, arrays[0], [own, own], weights)[2]
    )
    g: Any = gaussian_weight_map(foreign[3], foreign[4], 2.0, SIZE)
    assert isinstance(g, OnlyProtocols)
    assert isinstance(precision_from_scale(foreign[4], 2.0), OnlyProtocols)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 3, 4), r"q: expected shape \(any, any, any, any\), got \(2, 3, 4\)"),
        (1, (2, 3, 11, 5), r"k: expected shape \(2, 3, 12, 5\), got \(2, 3, 11, 5\).*\(3, 4\)"),
        (2, (2, 3, 12, 4), r"v: expected shape \(2, 3, 12, 5\), got \(2, 3, 12, 4\)"),
        (3, (2, 3, 4, 3), r"center_xy: expected shape \(2, 3, 4, 2\), got \(2, 3, 4, 3\)"),
        (4, (2, 1, 4, 2), r"precision_xy: expected shape \(2, 3, 4, 2\), got \(2, 1, 4, 2\)"),
    ],
)
def test_wrong_shapes_are_named(position: int, shape: tuple[int, ...], message: str) -> None:
    arrays = example()
    arrays[position] = np.zeros(shape)
    with pytest.raises(ValueError, match=message):
        smca_attention(*arrays, SIZE)
    with pytest.raises(ValueError, match=message):
        smca_attention_vjp(arrays[0], *arrays, SIZE)


def test_other_bad_input_is_named() -> None:
    arrays = example()
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(2, 12\), got \(2, 3, 4\)"):
        smca_attention(*arrays, SIZE, np.zeros((2, 3, 4), dtype=bool))
    with pytest.raises(ValueError, match="key_padding_mask: expected dtype bool"):
        smca_attention(*arrays, SIZE, np.zeros((2, 12)))
    with pytest.raises(ValueError, match="a key that is not padded in every image"):
        smca_attention(*arrays, SIZE, np.ones((2, 12), dtype=bool))
    with pytest.raises(ValueError, match="size: expected"):
        smca_attention(*arrays, (0, 4))
    with pytest.raises(ValueError, match="grad_out: expected shape"):
        smca_attention_vjp(np.zeros((2, 3, 4, 6)), *arrays, SIZE)
    with pytest.raises(ValueError, match="scale_xy: expected every scale > 0"):
        gaussian_weight_map(np.zeros(2), np.array([1.0, 0.0]), 1.0, SIZE)
    with pytest.raises(ValueError, match="beta: expected"):
        precision_from_scale(np.ones(2), 0.0)
    with pytest.raises(ValueError, match=r"center_xy: expected shape \(..., 2\)"):
        gaussian_weight_map(np.zeros(3), np.ones(2), 1.0, SIZE)
    with pytest.raises(ValueError, match="shapes that broadcast"):
        gaussian_weight_map(np.zeros((3, 2)), np.ones((4, 2)), 1.0, SIZE)
