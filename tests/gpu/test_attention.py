"""The attention backends' errors, and which backend ``auto`` takes. conformance/ tests what they compute."""

from __future__ import annotations

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


def test_auto_leaves_the_lifted_form_where_float32_would_cancel() -> None:
    """λ = 1000 far from the middle of the map: lifted loses the digits that tell two equally near cells apart."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, n, 8)) for n in (4, 80, 80))
    center = np.array([[7.0, 0.5], [23.0, 0.5], [61.0, 0.5], [78.0, 0.5]])[None, None]  # between two cells
    precision = np.full((1, 1, 4, 2), 1000.0)
    expected = oracle.smca_attention(q, k, v, center, precision, (1, 80))
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (q, k, v, center, precision)]
    error = {
        backend: np.abs(attention.smca_attention(*tensors, (1, 80), backend=backend).numpy() - expected).max()
        for backend in ("auto", "eager", "lifted")
    }
    assert error["auto"] == error["eager"] < 1e-4 < error["lifted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_definition_where_it_cannot_know_how_narrow_priors_are(dtype: torch.dtype) -> None:
    """On a device whose numbers it could only read by waiting for it, and which runs no kernels of ours."""
    q = torch.empty(1, 2, 3, 8, dtype=dtype, device="meta")
    precision = torch.empty(1, 2, 3, 2, device="meta")
    assert dispatch._choose_backend(q, precision, (100, 168)) == "eager"
