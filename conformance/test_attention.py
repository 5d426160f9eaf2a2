"""smca_attention of the production package against the oracle: output and all five gradients (docs/method.md §2 and §6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from smca.conformance.strategies import AttentionInputs, attention_inputs
from smca.conformance.tolerances import assert_close
from smca.gpu import attention as production
from smca.reference import attention as oracle

LEAVES = ("q", "k", "v", "center_xy", "precision_xy")
BACKENDS = ("eager", "lifted", "auto")


def run(x: AttentionInputs, backend: str, dtype: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output and gradients of the production attention."""
    leaves = [torch.tensor(getattr(x, name), dtype=getattr(torch, dtype), requires_grad=True) for name in LEAVES]
    mask = None if x.key_padding_mask is None else torch.tensor(x.key_padding_mask)
    q, k, v, center_xy, precision_xy = leaves
    out = production.smca_attention(q, k, v, center_xy, precision_xy, x.size, mask, backend=backend)
    return out.detach(), torch.autograd.grad(out, leaves, torch.tensor(x.grad_out, dtype=out.dtype))


def check(x: AttentionInputs, backend: str, dtype: str) -> None:
    """Compare output and gradients with the oracle."""
    arguments = (x.q, x.k, x.v, x.center_xy, x.precision_xy, x.size, x.key_padding_mask)
    expected = oracle.smca_attention(*arguments)
    gradients = oracle.smca_attention_vjp(x.grad_out, *arguments)
    out, grads = run(x, backend, dtype)
    assert_close(out, expected, "attention", dtype, f"{backend}: output as the oracle's")
    for name, got, want in zip(LEAVES, grads, gradients, strict=True):
        assert_close(got, want, "attention", dtype, f"{backend}: gradient of {name} as the oracle's")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(x=attention_inputs())
def test_output_and_gradients_equal_the_oracle(x: AttentionInputs, backend: str, dtype: str) -> None:
    check(x, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(x=attention_inputs())
def test_what_padded_keys_hold_changes_nothing(x: AttentionInputs, backend: str) -> None:
    if x.key_padding_mask is None:
        return
    clean, clean_grads = run(x, backend, "float64")
    padded = x.key_padding_mask[:, None, :, None]
    poisoned = AttentionInputs(**{**vars(x), "k": np.where(padded, np.nan, x.k), "v": np.where(padded, np.inf, x.v)})
    out, grads = run(poisoned, backend, "float64")
    assert_close(out, clean, "attention", "float64", f"{backend}: NaN and inf in padded keys leave the output alone")
    for name, got, want in zip(LEAVES, grads, clean_grads, strict=True):
        assert_close(
            got, want, "attention", "float64", f"{backend}: NaN in padded keys leaves the gradient of {name} alone"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(x=attention_inputs())
def test_precision_zero_is_plain_attention(x: AttentionInputs, backend: str) -> None:
    flat = AttentionInputs(**{**vars(x), "precision_xy": np.zeros_like(x.precision_xy)})
    out, _ = run(flat, backend, "float64")
    keep = None if x.key_padding_mask is None else torch.tensor(~x.key_padding_mask)[:, None, None, :]
    q, k, v = torch.tensor(x.q), torch.tensor(x.k), torch.tensor(x.v)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    assert_close(out, plain.numpy(), "attention", "float64", f"{backend}: λ = 0 is DETR's attention")


def test_auto_leaves_the_lifted_form_where_float32_would_cancel() -> None:
    """λ = 1000 at 40 cells from the middle: lifted loses every digit of the logit, so auto must not take it."""
    rng = np.random.default_rng(0)
    x = AttentionInputs(
        q=rng.normal(size=(1, 1, 4, 8)),
        k=rng.normal(size=(1, 1, 80, 8)),
        v=rng.normal(size=(1, 1, 80, 8)),
        center_xy=rng.uniform(0, 1, size=(1, 1, 4, 2)) * [80, 1],
        precision_xy=np.full((1, 1, 4, 2), 1000.0),
        size=(1, 80),
        key_padding_mask=None,
        grad_out=rng.normal(size=(1, 1, 4, 8)),
    )
    expected = oracle.smca_attention(x.q, x.k, x.v, x.center_xy, x.precision_xy, x.size)
    auto, _ = run(x, "auto", "float32")
    assert_close(auto, expected, "attention", "float32", "auto: as exact as eager at λ = 1000")


def test_mistakes_are_named() -> None:
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 6, 4)
    pairs = torch.zeros(1, 2, 3, 2)
    with pytest.raises(ValueError, match=r"k must have shape \(1, 2, 4, 4\)"):
        production.smca_attention(q, k, k, pairs, pairs, (2, 2))
    with pytest.raises(ValueError, match="must be bool"):
        production.smca_attention(q, k, k, pairs, pairs, (2, 3), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="unknown attention backend 'cuda'"):
        production.smca_attention(q, k, k, pairs, pairs, (2, 3), backend="cuda")


@pytest.mark.parametrize("mutant", ["cell corner", "half forgotten", "x and y swapped"])
def test_the_comparison_can_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three plausible bugs, planted; the comparison above must see each."""
    true_eager, true_centers = production._eager, production.cell_centers
    if mutant == "cell corner":
        monkeypatch.setattr(
            production, "cell_centers", lambda size, like: tuple(c - 0.5 for c in true_centers(size, like))
        )
    elif mutant == "half forgotten":
        monkeypatch.setattr(production, "_eager", lambda q, k, v, c, p, s, m: true_eager(q, k, v, c, 2 * p, s, m))
    else:
        monkeypatch.setattr(production, "_eager", lambda q, k, v, c, p, s, m: true_eager(q, k, v, c.flip(-1), p, s, m))
    rng = np.random.default_rng(1)
    x = AttentionInputs(
        q=rng.normal(size=(1, 2, 3, 4)),
        k=rng.normal(size=(1, 2, 15, 4)),
        v=rng.normal(size=(1, 2, 15, 4)),
        center_xy=rng.uniform(0, 3, size=(1, 2, 3, 2)),
        precision_xy=rng.uniform(0.2, 1, size=(1, 2, 3, 2)),
        size=(3, 5),
        key_padding_mask=None,
        grad_out=rng.normal(size=(1, 2, 3, 4)),
    )
    with pytest.raises(AssertionError, match="over the bound"):
        check(x, "eager", "float64")
