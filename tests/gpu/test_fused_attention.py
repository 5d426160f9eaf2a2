"""The fused Triton kernels against the reference, on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from smca.gpu import attention
from smca.gpu.attention import fused as fused_attention
from smca.gpu.attention.fused import fused_smca_attention
from smca.gpu.attention.shapes import cell_centers
from smca.reference.attention import smca_attention, smca_attention_vjp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "center_xy", "precision_xy")
# Of the largest number in each result. Half precision rounds A and S̄ before they meet the keys, as eager does.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
_reason = fused_attention.available(DEVICE)
if _reason is not None:
    pytest.skip(_reason, allow_module_level=True)


def example(
    size: tuple[int, int], *, b: int = 2, h: int = 2, n: int = 5, d: int = 8, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q, k, v in dtype, centres inside and outside the map, precisions from near 0 to 2; leaves that need gradients."""
    g = torch.Generator().manual_seed(0)
    keys, extent = size[0] * size[1], torch.tensor([size[1], size[0]], dtype=torch.float32)
    q, k, v = (torch.randn(b, h, rows, d, generator=g).to(dtype) for rows in (n, keys, keys))
    center = (torch.rand(b, h, n, 2, generator=g) * 1.6 - 0.3) * extent
    precision = 2 * torch.rand(b, h, n, 2, generator=g) ** 2
    return [tensor.to(DEVICE).requires_grad_() for tensor in (q, k, v, center, precision)]


def output_gradient(out: torch.Tensor) -> torch.Tensor:
    """Random, the same for equal shapes, and not contiguous."""
    grad = torch.randn(*out.shape[::-1], generator=torch.Generator().manual_seed(1)).permute(3, 2, 1, 0)
    return grad.to(out)


def assert_close(got: torch.Tensor, expected: Any, tolerance: float, name: str) -> None:
    expected = torch.as_tensor(expected).cpu()
    error, largest = (got.detach().double().cpu() - expected).abs().max().item(), expected.abs().max().item()
    # A gradient that is exactly 0 (as with one key) comes out as the rounding of terms of order 1.
    assert error <= tolerance * max(largest, 1.0), f"{name}: off by {error:.3g} where the largest is {largest:.3g}"


def check(
    inputs: list[torch.Tensor], size: tuple[int, int], mask: torch.Tensor | None = None, factor: float = 1.0, **kw: Any
) -> None:
    """Output and the five gradients against the float64 reference on the same (rounded) inputs."""
    out = fused_smca_attention(*inputs, size, mask, **kw)
    assert out.dtype == inputs[0].dtype
    tolerance = factor * TOLERANCES[out.dtype]
    arrays = [tensor.detach().double().cpu().numpy() for tensor in inputs]
    padded = None if mask is None else mask.cpu().numpy()
    assert_close(out, smca_attention(*arrays, size, padded), tolerance, "out")
    grad_out = output_gradient(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    expected = smca_attention_vjp(grad_out.double().cpu().numpy(), *arrays, size, padded)
    for name, tensor, grad, reference in zip(NAMES, inputs, grads, expected, strict=True):
        assert grad.dtype == tensor.dtype
        assert_close(grad, reference, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_kernel_compiled_for_aligned_tensors_gets_no_others(dtype: torch.dtype) -> None:
    """Kernels are kept by what they were compiled for: equal inputs use the same kernel, an odd address needs another."""
    size = (4, 8)
    inputs = example(size, n=16, d=16, dtype=dtype)
    odd = []
    for tensor in inputs:
        shifted = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        odd.append(shifted.copy_(tensor.detach()).requires_grad_())
    known = []
    for tensors in (inputs, odd, inputs, odd):
        check(tensors, size)
        known.append(len(fused_attention._COMPILED))
    if DEVICE == "cuda":
        assert known[1] == known[0] + 3
        assert known[3] == known[2] == known[1]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("size", "n", "d"),
    [((1, 1), 1, 1), ((1, 7), 3, 5), ((5, 7), 19, 32), ((9, 1), 16, 40), ((4, 8), 17, 128), ((6, 11), 1, 16)],
)
def test_agrees_with_the_reference(size: tuple[int, int], n: int, d: int, dtype: torch.dtype) -> None:
    """Widths that are and aren't powers of two; N and H·W below, at and between multiples of a block."""
    check(example(size, n=n, d=d, dtype=dtype), size)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_padded_keys_may_hold_anything(dtype: torch.dtype) -> None:
    size = (5, 7)
    inputs = example(size, n=18, dtype=dtype)
    mask = torch.zeros(2, *size, dtype=torch.bool, device=DEVICE)
    mask[0, :, 4:] = True
    mask[1, :4] = mask[1, :, :6] = True  # one key left, in the last block
    mask = mask.flatten(1)
    for tensor, junk in ((inputs[1], torch.nan), (inputs[2], torch.inf)):
        tensor.data.masked_fill_(mask[:, None, :, None], junk)
    check(inputs, size, mask)
    grads = torch.autograd.grad(fused_smca_attention(*inputs, size, mask).sum(), inputs)
    for grad in grads[1:3]:
        assert (grad[mask[:, None].expand(grad.shape[:3])] == 0).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU rounds the weights to bfloat16, too, and as much comes of that")
def test_the_backward_pass_reads_the_output_before_it_is_rounded() -> None:
    """What all values have in common gives no gradient to q and k. Rounded with the output, it would give them one."""
    size = (5, 7)
    inputs = example(size, n=18, dtype=torch.bfloat16)
    inputs[2].data = (inputs[2].data / 4).round() + 128
    check(inputs, size, factor=4.0)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # NumPy's, in the interpreter
def test_an_image_without_keys_gets_nan() -> None:
    inputs = example((2, 3))
    mask = torch.tensor([[True] * 6, [False] * 6], device=DEVICE)
    out = fused_smca_attention(*inputs, (2, 3), mask)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_precision_from_none_to_a_single_cell() -> None:
    """λ = 0 is plain attention; λ = 1000 is the nearest cell, with logits down to −1000·(10²)/2."""
    size = (4, 10)
    inputs = example(size, n=6)
    inputs[4].data[:, :, ::2] = 0.0
    inputs[4].data[:, :, 1::2] = 1e3
    inputs[3].data[:, :, 1] = torch.tensor([-2.0, 1.0])
    inputs[3].data[:, :, 3] = torch.tensor([4.49, 2.51])
    check(inputs, size, factor=4.0)  # beside the nearest cell; logits of 1e4 resolve 1e-3 in float32
    plain = torch.nn.functional.scaled_dot_product_attention(*inputs[:3])
    torch.testing.assert_close(fused_smca_attention(*inputs, size)[:, :, ::2], plain[:, :, ::2], rtol=1e-5, atol=1e-6)


def test_logits_of_ten_thousand_stay_finite() -> None:
    size = (4, 9)
    inputs = example(size, n=6, d=16)
    inputs[0].data *= 1e4
    out = fused_smca_attention(*inputs, size)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))
    eager = attention.smca_attention(*(tensor.double() for tensor in inputs), size, backend="eager")
    torch.testing.assert_close(out.double(), eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_centers_come_in_any_float_dtype(dtype: torch.dtype) -> None:
    inputs = example((3, 5))
    inputs[3:] = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs[3:]]
    check(inputs, (3, 5), factor=1.0 if dtype == torch.float64 else 300.0)  # their gradients are rounded to dtype


def test_any_strides() -> None:
    """Heads split off the channels, as models do it; one head's keys for all; channels that aren't adjacent."""
    size = (3, 6)
    q, k, v, center, precision = example(size)
    layouts = (
        q.detach().transpose(1, 2).contiguous().transpose(1, 2),
        k.detach()[:, :1].expand(-1, 2, -1, -1),
        v.detach().transpose(2, 3).contiguous().transpose(2, 3),
        center.detach()[:, :1].expand(-1, 2, -1, -1),
        precision.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    )
    check([tensor.requires_grad_() for tensor in layouts], size)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_runs_agree_bit_for_bit(dropout: float) -> None:
    size = (6, 7)
    inputs = example(size, n=20)
    first, second = (fused_smca_attention(*inputs, size, dropout=dropout, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    grads = [torch.autograd.grad(out, inputs, output_gradient(out)) for out in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", ["none", "one", "all"])
def test_half_precision_keeps_narrow_gaussians(dtype: torch.dtype, narrow: str) -> None:
    """On a wide map, of 40 queries in several blocks: a head with one narrow Gaussian does without the lifted form altogether."""
    size = (3, 90)
    inputs = example(size, b=1, n=40, dtype=dtype)
    inputs[3].data[:, :, :3] = torch.tensor([[0.6, 1.0], [89.5, 2.9], [50.2, 1.7]])
    inputs[4].data *= {"none": 0.05, "one": 0.05, "all": 20.0}[narrow]
    if narrow == "one":
        inputs[4].data[:, 1, 20] = 30.0
    check(inputs, size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_centers_far_off_the_map(dtype: torch.dtype) -> None:
    """Negative precisions, too: there the farthest keys win."""
    size = (5, 12)
    inputs = example(size, b=1, n=33, dtype=dtype)
    inputs[3].data *= 3.0
    check(inputs, size, factor=2.0)
    inputs[4].data.neg_()
    check(inputs, size, factor=20.0)  # logits of hundreds that are not relative to the largest


@pytest.mark.parametrize("size", [(2, 257), (130, 2)])
def test_half_precision_on_maps_of_many_cells(size: tuple[int, int]) -> None:
    """Beyond 256 cells per side bfloat16 does not hold the positions; and blocks that end before, at and after the map."""
    check(example(size, b=1, h=1, n=3, dtype=torch.bfloat16), size)


def weights_kept(inputs: list[torch.Tensor], size: tuple[int, int], dropout: float, seed: int | torch.Tensor) -> Any:
    """[B, h, N, L] bool: with the identity for v, the output is A itself, 0 where it was dropped."""
    keys = size[0] * size[1]
    q, k, _, center, precision = inputs
    identity = torch.eye(keys, device=DEVICE).expand(*q.shape[:2], -1, -1)
    wide_q, wide_k = (torch.nn.functional.pad(t, (0, keys - t.shape[-1])) for t in (q, k))
    out = fused_smca_attention(wide_q, wide_k, identity, center, precision, size, dropout=dropout, seed=seed)
    return out.detach() != 0


def eager_weights(inputs: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    q, k, _, center, precision = (tensor.double() for tensor in inputs)
    x, y = cell_centers(size, center)
    dx, dy = x - center[..., :1], y - center[..., 1:]
    logits = q @ k.mT / q.shape[-1] ** 0.5 - 0.5 * (precision[..., :1] * dx**2 + precision[..., 1:] * dy**2)
    return logits.softmax(-1)


def test_dropout_drops_weights_and_the_backward_replays_it() -> None:
    size, dropout = (6, 7), 0.3
    inputs = example(size, n=19)
    inputs[4].data *= 0.05  # no weight underflows to 0
    kept = weights_kept(inputs, size, dropout, 11)
    assert abs(kept.double().mean().item() - (1 - dropout)) < 0.02  # 3192 draws: σ = 0.008
    out = fused_smca_attention(*inputs, size, dropout=dropout, seed=11)
    eager = eager_weights(inputs, size) * kept / (1 - dropout) @ inputs[2].double()
    assert_close(out, eager, 5e-6, "out")
    grad = output_gradient(out)
    expected = torch.autograd.grad(eager, inputs, grad.double())
    for name, gradient, reference in zip(NAMES, torch.autograd.grad(out, inputs, grad), expected, strict=True):
        assert_close(gradient, reference.double(), 5e-6, f"gradient of {name}")


def test_dropout_depends_on_the_seed_and_keeps_the_mean() -> None:
    size = (4, 5)
    inputs = example(size, b=1, n=6)
    with torch.no_grad():
        tensor_seed = torch.tensor([5], device=DEVICE)
        same = fused_smca_attention(*inputs, size, dropout=0.5, seed=tensor_seed)
        assert torch.equal(fused_smca_attention(*inputs, size, dropout=0.5, seed=5), same)
        seeds = (5, -5, 5 + 2**32, 2**62)  # all 64 bits count
        masks = [weights_kept(inputs, size, 0.5, seed) for seed in seeds]
        assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
        assert not torch.equal(masks[0][:, 0], masks[0][:, 1])
        assert not torch.equal(masks[0][:, :, 0], masks[0][:, :, 1])
        mean = torch.stack([fused_smca_attention(*inputs, size, dropout=0.2, seed=s) for s in range(50)]).mean(0)
        assert (mean - fused_smca_attention(*inputs, size)).abs().max() < 0.35  # σ of the mean is up to 0.07


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_torch_accepts_the_op(dropout: float) -> None:
    """Schema, fake shapes and strides, autograd registration, tracing with dynamic shapes."""
    size = (3, 4)
    inputs = example(size)
    inputs[0] = inputs[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    mask = torch.zeros(2, 12, dtype=torch.bool, device=DEVICE)
    seed = torch.tensor([7], device=DEVICE) if dropout else None
    torch.library.opcheck(torch.ops.smca.fused_attention.default, (*inputs, 4, mask, dropout, seed))


def test_compiles_into_one_graph() -> None:
    size = (3, 4)
    inputs = example(size)
    mask = torch.tensor([[False] * 12, [False] * 8 + [True] * 4], device=DEVICE)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        seed = torch.full((1,), 3, dtype=torch.int64, device=DEVICE)
        return (fused_smca_attention(*tensors, size, mask, 0.2, seed) * 2.0).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_as_eager_does() -> None:
    inputs = example((3, 4))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = fused_smca_attention(*inputs, (3, 4))
        eager = attention.smca_attention(*inputs, (3, 4), backend="eager")
    assert out.dtype == eager.dtype == torch.bfloat16
    torch.testing.assert_close(out, eager, rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), inputs))


def test_no_queries_and_no_images() -> None:
    for b, n in ((2, 0), (0, 5)):
        inputs = example((2, 3), b=b, n=n)
        out = fused_smca_attention(*inputs, (2, 3))
        assert out.shape == (b, 2, n, 8)
        assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), inputs))


def test_mistakes_are_named() -> None:
    size = (2, 3)
    inputs = example(size)
    with pytest.raises(ValueError, match=r"q, k, v must have the same dtype, one of .*, got torch\.float64"):
        fused_smca_attention(*(tensor.double() for tensor in inputs), size)
    with pytest.raises(ValueError, match=r"got torch.float16, torch.float32"):
        fused_smca_attention(inputs[0].half(), *inputs[1:], size)
    with pytest.raises(ValueError, match=r"1 to 128 .* got 129"):
        fused_smca_attention(*example(size, d=129), size)
    with pytest.raises(ValueError, match="k must have shape"):
        fused_smca_attention(*inputs, (3, 3))
    with pytest.raises(ValueError, match="dropout must be"):
        fused_smca_attention(*inputs, size, dropout=1.0)
    with pytest.raises(ValueError, match="seed must be one int64"):
        fused_smca_attention(*inputs, size, dropout=0.5, seed=torch.zeros(1, device=DEVICE))


def test_second_derivatives_are_refused() -> None:
    inputs = example((2, 3))
    (grad,) = torch.autograd.grad(fused_smca_attention(*inputs, (2, 3)).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "smca.gpu.attention.fused_kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fused_attention.available(DEVICE) == "triton is not installed: pip install triton"
    with pytest.raises(RuntimeError, match="pip install triton"):
        fused_smca_attention(*example((2, 3)), (2, 3))


def test_says_how_to_run_on_the_cpu() -> None:
    code = """
import os, sys
from smca.gpu.benchmark.attention import Size, attention_case
from smca.gpu.attention.fused import available
assert "triton" not in sys.modules
print(available("cpu"))
os.environ["TRITON_INTERPRET"] = "1"
del sys.modules["smca.gpu.attention.fused_kernels"]
print(available("cpu"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    without, late = ran.stdout.splitlines()
    assert "set TRITON_INTERPRET=1 before Python starts" in without
    assert "was set after Triton was imported" in late


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; the interpreter takes minutes at this size"
)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("d", [32, 40, 128])
@pytest.mark.parametrize("narrow", [False, True])
def test_at_the_size_of_a_detector(dtype: torch.dtype, d: int, narrow: bool) -> None:
    size = (50, 84)
    inputs = example(size, n=300, h=8, d=d, dtype=dtype)
    if narrow:  # far from all that is not padded, logits of thousands would be rounded
        inputs[3].data[1] *= 0.6
    inputs[4].data[:] *= 10.0 if narrow else 0.2
    mask = torch.zeros(2, *size, dtype=torch.bool, device=DEVICE)
    mask[1, 40:] = mask[1, :, 70:] = True
    check(inputs, size, mask.flatten(1), factor=4.0)
    runs = [fused_smca_attention(*inputs, size, mask.flatten(1), 0.1, 1) for _ in range(2)]
    assert torch.equal(*runs)
    grads = [torch.autograd.grad(out, inputs, output_gradient(out)) for out in runs]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
