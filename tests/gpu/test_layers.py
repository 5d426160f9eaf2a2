"""Plain attention with padding, whose mask is a channel on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smca.gpu.model.layers import attention_masked_by_a_channel, plain_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(dtype: torch.dtype, keys: int, channels: int, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """q [2, 3, 5, d], k, v [2, 3, L, d] as heads are split off, and a mask [2, L] of which each image has some left."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, n, 3, channels, generator=g).transpose(1, 2) for n in (5, keys, keys)]
    mask = torch.arange(keys) >= torch.tensor([[keys // 2], [keys - 1]])
    return [t.to(device, dtype).requires_grad_() for t in tensors], mask.to(device)


def with_gradients(attention: object, tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    out = attention(*tensors, mask)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [5, 8, 32])
def test_a_mask_as_a_channel_is_a_mask(dtype: torch.dtype, channels: int) -> None:
    """Values and gradients; gradients are 0 at padded keys."""
    tensors, mask = example(dtype, 6, channels)
    got, expected = (with_gradients(f, tensors, mask) for f in (attention_masked_by_a_channel, plain_attention))
    exact = torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=64 * exact, atol=64 * exact)
    for grad in got[2:]:
        assert (grad[mask[:, None].expand(grad.shape[:3])] == 0).all()


def test_padded_keys_weigh_nothing_beside_logits_of_hundreds() -> None:
    tensors, mask = example(torch.float32, 6, 8)
    tensors[0].data *= 300.0
    moved = [t.detach().clone().requires_grad_() for t in tensors]
    for tensor in moved[1:]:
        tensor.data[mask[:, None].expand(tensor.shape[:3])] = 1e3
    for a, b in zip(*(with_gradients(attention_masked_by_a_channel, t, mask) for t in (tensors, moved)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: what it is about is a fault of cuDNN's")
@pytest.mark.parametrize("keys", [64, 192, 320, 420])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_finite_where_all_logits_are_low(keys: int, masked: bool) -> None:
    """At 64, 192 and 320 keys cuDNN's backward pass gives NaN (github.com/pytorch/pytorch/issues/196678)."""
    tensors, mask = example(torch.bfloat16, keys, 32, DEVICE)
    padded = mask if masked else None
    tensors[0].data[..., :], tensors[1].data[..., :] = 10.0, -10.0  # logits of −566
    tensors[1].data += torch.randn_like(tensors[1])
    assert all(value.isfinite().all() for value in with_gradients(plain_attention, tensors, padded))
