"""The attention backends' errors, and which backend ``auto`` takes. conformance/ tests what they compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smca.gpu import attention
from smca.gpu.attention import dispatch
from smca.reference import attention as oracle


def test_mistakes_are_named() -> None:
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 6, 4)
    pairs = torch.zeros(1, 2, 3, 2)
    with pytest.raises(ValueError, match=r"k must have shape \(1, 2, 4, 4\)"):
        attention.smca_attention(q, k, k, pairs, pairs, (2, 2))
    with pytest.raises(ValueError, match="must be bool"):
        attention.smca_attention(q, k, k, pairs, pairs, (2, 3), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="unknown attention backend 'cuda'"):
        attention.smca_attention(q, k, k, pairs, pairs, (2, 3), backend="cuda")


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_auto_leaves_the_lifted_form_where_it_would_cancel(dtype: torch.dtype, rounding: float) -> None:
    """λ = 1000 far from the middle of the map: lifted loses the digits that tell two equally near cells apart."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, n, 8)) for n in (4, 80, 80))
    center = np.array([[7.0, 0.5], [23.0, 0.5], [61.0, 0.5], [78.0, 0.5]])[None, None]  # between two cells
    precision = np.full((1, 1, 4, 2), 1000.0)
    expected = oracle.smca_attention(q, k, v, center, precision, (1, 80))
    tensors = [torch.tensor(x, dtype=dtype) for x in (q, k, v, center, precision)]
    error = {
        backend: np.abs(attention.smca_attention(*tensors, (1, 80), backend=backend).numpy() - expected).max()
        for backend in ("auto", "eager", "lifted")
    }
    assert error["auto"] == error["eager"] < rounding < error["lifted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_auto_takes_the_definition_where_it_cannot_know_how_narrow_priors_are(dtype: torch.dtype) -> None:
    """On a device whose numbers it could only read by waiting for it, and which runs no kernels of ours."""
    q = torch.empty(1, 2, 3, 8, dtype=dtype, device="meta")
    precision = torch.empty(1, 2, 3, 2, device="meta")
    assert dispatch._choose_backend(q, precision, (100, 168)) == "eager"


@pytest.mark.parametrize(
    ("dtype", "channels", "runs_triton", "expected"),
    [
        (torch.float32, 32, True, "triton"),
        (torch.bfloat16, 128, True, "triton"),
        (torch.float16, 129, True, "eager"),
        (torch.float64, 32, True, "eager"),
        (torch.float32, 32, False, "eager"),
    ],
)
def test_auto_on_a_gpu(
    dtype: torch.dtype, channels: int, runs_triton: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels where they run, and never the lifted form, whose exactness depends on numbers on the device."""
    monkeypatch.setattr(dispatch, "_runs_triton", lambda _: runs_triton)
    q: Any = SimpleNamespace(dtype=dtype, shape=(1, 2, 3, channels), is_cuda=True, device=torch.device("cuda"))
    assert dispatch._choose_backend(q, torch.empty(1, 2, 3, 2, device="meta"), (100, 168)) == expected


@pytest.mark.parametrize("precision", [0.0, 0.01, 0.07])
def test_auto_is_the_lifted_form_on_a_cpu_for_wide_priors(precision: float) -> None:
    q = torch.empty(1, 2, 3, 8)
    assert dispatch._choose_backend(q, torch.full((1, 2, 3, 2), precision), (100, 168)) == "lifted"
