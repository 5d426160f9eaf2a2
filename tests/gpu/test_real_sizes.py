"""The fused kernels at the size of a detector against the oracle on CuPy arrays, entry by entry, within the suite's bounds.

Needs a CUDA device and CuPy. Without them the same comparison runs at small sizes: NumPy arrays, Triton's interpreter.

Of a batch, image i is compared in head i modulo h: every image once, every head. Oracle and bounds take N × L numbers in
float64 a head, dozens of times over; so one head at a time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smca.conformance.tolerances import CONSTANTS, TINY, UNIT_ROUNDOFF, attention_bounds
from smca.gpu.attention.fused import available, fused_smca_attention
from smca.reference.attention import Level, smca_attention, smca_attention_vjp

NAMES = ("q", "k", "v", "center_xy", "precision_xy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    """B, h, N and d."""

    batch: int
    heads: int
    queries: int
    channels: int


REAL, REAL_MAPS = Sizes(16, 8, 300, 32), ((100, 168), (50, 84), (25, 42))  # strides 8, 16 and 32 of 800×1344 pixels
SMALL, SMALL_MAPS = Sizes(3, 2, 19, 8), ((7, 10), (1, 3))


def inputs(sizes: Sizes, size: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v in dtype, centres and precisions; the padding mask [B, L]; the output's gradient.

    Images fill from half of the map to all of it. Gaussians are as wide in pixels on every map, some hardly there at all.
    """
    b, h, n, d = sizes.batch, sizes.heads, sizes.queries, sizes.channels
    rows, columns = size
    g = torch.Generator(device).manual_seed(rows)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device=device)

    def normal(length: int) -> Tensor:
        return torch.randn(b, h, length, d, generator=g, device=device).to(dtype)

    extent = torch.tensor([columns, rows], device=device)
    center = (uniform(b, h, n, 2) * 1.2 - 0.1) * extent
    precision = uniform(b, h, n, 2).square() * (50 / rows) ** 2
    real = torch.linspace(1.0, 0.5, b, device=device)[:, None] * extent  # [B, 2]
    x, y = torch.arange(columns, device=device) >= real[:, :1], torch.arange(rows, device=device) >= real[:, 1:]
    mask = (y[:, :, None] | x[:, None, :]).flatten(1)
    leaves = [normal(n), normal(rows * columns), normal(rows * columns), center, precision]
    return [leaf.requires_grad_() for leaf in leaves], mask, normal(n)


def worst_errors(
    xp: Any,
    sizes: Sizes,
    size: tuple[int, int],
    dtype: torch.dtype,
    attend: Callable[..., Tensor] = fused_smca_attention,
    **options: Any,
) -> dict[str, tuple[float, float]]:
    """Of the output and of each gradient: the largest error over its bound, 1 or less of which is right; and for reading the
    largest ‖error‖/‖expected‖ of a head, since a bound that counts thousands of keys' roundings is far from most errors.

    Args:
        xp: numpy or cupy, on whose arrays the oracle runs; where the kernels run follows from it.
        sizes, size: of the batch and of the map.
        dtype: of q, k, v.
        attend: what is under test, called with `options`.
    """
    device = "cpu" if xp is np else "cuda"
    leaves, mask, grad_out = inputs(sizes, size, dtype, device)
    out = attend(*leaves, size, mask, **options)
    results = [out, *torch.autograd.grad(out, leaves, grad_out)]
    host = getattr(xp, "asnumpy", np.asarray)
    names = ("out", *NAMES)
    constants = [CONSTANTS["smca_attention"][0]] + [CONSTANTS["smca_attention_vjp"][0]] * len(NAMES)
    worst = dict.fromkeys(names, (0.0, 0.0))

    def one_head(image: int) -> tuple[list[Tensor], Tensor, list[Any], list[Any]]:
        at = slice(image, image + 1), slice(image % sizes.heads, image % sizes.heads + 1)
        chosen = [tensor.detach()[at].double() for tensor in (*leaves, grad_out)]
        arrays, padded = [xp.asarray(tensor) for tensor in chosen], xp.asarray(mask[at[:1]])
        expected = [smca_attention(*arrays[:-1], size, padded)]
        expected += smca_attention_vjp(arrays[-1], *arrays[:-1], size, padded)
        got = [tensor.detach()[at].double().cpu().numpy() for tensor in results]
        return chosen, mask[at[:1]], got, [host(array) for array in expected]

    def errors(chosen: list[Tensor], padded: Tensor, got: list[Any], expected: list[Any]) -> list[tuple[float, float]]:
        q, *rest, grad = (tensor.cpu().numpy() for tensor in chosen)
        level = Level(*rest, size, padded.cpu().numpy())
        limits = attention_bounds(q, level, grad, str(dtype).removeprefix("torch."), 0.0)
        largest = []
        for a, b, limit, constant in zip(got, expected, (limits.out, *limits.gradients), constants, strict=True):
            ratio = np.abs(a - b) / (limit * constant + TINY)
            relative = np.linalg.norm(a - b) / (np.linalg.norm(b) + TINY)
            largest.append((float(np.where(np.isnan(ratio), np.inf, ratio).max()), float(relative)))
        return largest

    # NumPy computes the bounds, on as many cores as the machine has, with up to a GiB or two for each.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = []
        for image in range(sizes.batch):
            jobs.append(pool.submit(errors, *one_head(image)))
        for job in jobs:
            for name, (ratio, relative) in zip(names, job.result(), strict=True):
                worst[name] = max(worst[name][0], ratio), max(worst[name][1], relative)
    return worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", REAL_MAPS, ids=str)
def test_at_real_size_on_a_gpu(size: tuple[int, int], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; the interpreter takes hours at this size")
    cupy = pytest.importorskip("cupy", reason="needs CuPy, on whose arrays the oracle runs")
    worst = worst_errors(cupy, REAL, size, dtype)
    for name, (ratio, relative) in worst.items():
        print(f"{size} {dtype} {name:12} largest error {ratio:.2g} of its bound; relative {relative:.2g}")
    assert all(ratio <= 1 for ratio, _ in worst.values()), worst


needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or available("cpu") is not None,
    reason="needs Triton's interpreter: TRITON_INTERPRET=1 before Python starts, and no GPU",
)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SMALL_MAPS, ids=str)
def test_the_comparison_at_small_sizes(size: tuple[int, int], dtype: torch.dtype) -> None:
    worst = worst_errors(np, SMALL, size, dtype)
    assert set(worst) == {"out", *NAMES}
    assert 0 < max(worst.values())[0] <= 1, worst
    assert 0 < worst["out"][1] < 8 * UNIT_ROUNDOFF[str(dtype).removeprefix("torch.")]


@needs_interpreter
@pytest.mark.parametrize(("name", "factor"), [("q", 1.01), ("v", 1.001), ("center_xy", 1.001), ("precision_xy", 1.01)])
def test_the_comparison_finds_a_wrong_kernel(name: str, factor: float) -> None:
    """One argument a little off, in the last image alone."""

    def attend(*args: Any) -> Tensor:
        scale = torch.ones(SMALL.batch, 1, 1, 1)
        scale[-1] = factor
        changed = list(args)
        changed[NAMES.index(name)] = changed[NAMES.index(name)] * scale
        return fused_smca_attention(*changed)

    worst = worst_errors(np, SMALL, SMALL_MAPS[0], torch.float32, attend)
    assert worst["out"][0] > 1
    assert max(worst[each] for each in NAMES)[0] > 1
