"""Muon: its Newton–Schulz steps, its update written out in NumPy, the parameters that it takes, and runs with it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smca.gpu import train
from smca.gpu.config import BackboneConfig, OptimConfig
from smca.gpu.model import SMCADETR
from smca.gpu.presets import PRESETS
from smca.gpu.training.log import read_metrics
from smca.gpu.training.muon import Muon, fast_dtype, matrices_of, orthogonalize
from smca.gpu.training.optimizer import make_optimizer, set_learning_rates
from tiny_run import tiny

Array = NDArray[np.float64]
CPU = torch.device("cpu")
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
"""With what Newton–Schulz may be off: the rounding of five steps; in bfloat16, whose unit is 2⁻⁸, measured at most 0.016."""


def quintic(values: Array) -> Array:
    """What five Newton–Schulz steps make of singular values."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def orthogonal(matrix: Array) -> Array:
    """What Newton–Schulz does, by the singular value decomposition."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    result: Array = u * quintic(values / np.linalg.norm(matrix)) @ vt
    return result


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


# Newton–Schulz


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (20, 90), (90, 20), (64, 64)], ids=str)
def test_newton_schulz_keeps_singular_vectors_and_makes_the_values_about_one(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    matrix = random(*shape)
    result = orthogonalize(matrix[None], dtype)
    assert (result.dtype, result.shape) == (dtype, (1, *shape))
    np.testing.assert_allclose(result[0].double(), orthogonal(matrix.numpy()), atol=tolerance)
    values = torch.linalg.svdvals(matrix)
    ended = torch.linalg.svdvals(result[0].double())[: int((values >= 0.0015 * matrix.norm()).sum())]
    assert 0.67 < ended.min() <= ended.max() < 1.21


def test_values_end_within_the_stated_range() -> None:
    ended = quintic(np.geomspace(0.0015, 1, 100_000))
    assert 0.67 < ended.min() < 0.69
    assert 1.20 < ended.max() < 1.21


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_a_batch_is_one_by_one_and_a_matrix_on_its_side_is_the_same(dtype: torch.dtype, tolerance: float) -> None:
    batch = random(5, 24, 40)
    together = orthogonalize(batch, dtype).double()
    alone = torch.cat([orthogonalize(matrix[None], dtype) for matrix in batch]).double()
    np.testing.assert_allclose(together, alone, atol=tolerance)
    np.testing.assert_allclose(together, orthogonalize(batch.mT, dtype).mT.double(), atol=tolerance)


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES], ids=str)
def test_the_size_of_a_gradient_does_not_matter_unless_it_is_zero(dtype: torch.dtype) -> None:
    matrix = random(1, 16, 32).float()
    small = orthogonalize(matrix * 2.0**-40, dtype)
    assert torch.equal(small, orthogonalize(matrix, dtype))
    assert torch.equal(orthogonalize(torch.zeros(1, 16, 32), dtype), torch.zeros(1, 16, 32, dtype=dtype))


def test_bfloat16_is_taken_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda known=known: known)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda known=known, including_emulation=True: known)
        assert fast_dtype(CPU) == fast_dtype(torch.device("cuda")) == dtype
    assert fast_dtype(torch.device("mps")) == torch.float32


# The update


def parameters() -> list[nn.Parameter]:
    """A wide and a tall matrix of one batch, a kernel laid out channels last and one that is not."""
    shapes = [(20, 32), (32, 20), (24, 4, 3, 3), (48, 2, 3, 3)]
    made = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in made]


def optimizer_of(matrices: list[nn.Parameter], dtype: torch.dtype = torch.float64) -> Muon:
    """At 0.1 for the first two matrices, at 0.2 for others, beside one parameter of AdamW."""
    other = nn.Parameter(random(3))
    groups = [{"params": part, "lr": lr} for part, lr in ((matrices[:2], 0.1), (matrices[2:], 0.2)) if part]
    return Muon([{"params": [other], "lr": 0.01}], groups, dtype, weight_decay=0.1)


def set_gradients(matrices: list[nn.Parameter], step: int) -> list[Array]:
    grads = [random(*matrix.shape, seed=100 * step + i + 7, scale=1e-3) for i, matrix in enumerate(matrices)]
    for matrix, grad in zip(matrices, grads, strict=True):
        matrix.grad = torch.empty_like(matrix).copy_(grad)
    return [grad.numpy() for grad in grads]


def test_three_steps_are_those_written_out() -> None:
    matrices = parameters()
    optimizer = optimizer_of(matrices)
    expected = [matrix.detach().numpy().copy() for matrix in matrices]
    momenta = [np.zeros_like(matrix) for matrix in expected]
    for step in range(3):
        for i, grad in enumerate(set_gradients(matrices, step)):
            momenta[i] = 0.95 * momenta[i] + 0.05 * grad
            ahead = (0.05 * grad + 0.95 * momenta[i]).reshape(len(grad), -1)
            scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
            expected[i] -= [0.1, 0.1, 0.2, 0.2][i] * scale * orthogonal(ahead).reshape(grad.shape)
        optimizer.step()
    for matrix, right in zip(matrices, expected, strict=True):
        np.testing.assert_allclose(matrix.detach(), right, atol=1e-11)


def test_others_move_by_adamw() -> None:
    optimizer = optimizer_of(parameters())
    (other,) = optimizer.param_groups[0]["params"]
    twin = nn.Parameter(other.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1)
    for step in range(3):
        other.grad = random(3, seed=step)
        twin.grad = other.grad.clone()
        optimizer.step()
        adamw.step()
    assert torch.equal(other, twin)


def test_parameters_without_gradients_are_left_alone() -> None:
    matrices, twins = parameters(), parameters()
    optimizer, alone = optimizer_of(matrices), optimizer_of(twins[:1])
    before = [matrix.detach().clone() for matrix in matrices]
    for step in range(2):
        set_gradients(matrices, step)
        set_gradients(twins, step)
        for matrix in matrices[1:]:
            matrix.grad = None
        optimizer.step()
        alone.step()
    assert [torch.equal(m, b) for m, b in zip(matrices, before, strict=True)] == [False, True, True, True]
    np.testing.assert_allclose(matrices[0].detach(), twins[0].detach(), atol=1e-12)
    assert list(optimizer.state) == [matrices[0]]


def test_found_inf_skips_a_step_as_in_adamw() -> None:
    matrices, twins = parameters(), parameters()
    optimizer, undisturbed = optimizer_of(matrices), optimizer_of(twins)
    for step in range(3):
        set_gradients(twins, step)
        undisturbed.step()
        for found in (0.0, 1.0):
            set_gradients(matrices, step)
            if found:
                for matrix in matrices:
                    matrix.grad = torch.full_like(matrix, torch.nan)
            optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
            optimizer.step()
    assert all(torch.equal(m, t) for m, t in zip(matrices, twins, strict=True))


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES], ids=str)
def test_a_loaded_state_goes_on_exactly(dtype: torch.dtype) -> None:
    matrices = parameters()
    optimizer = optimizer_of(matrices, dtype)
    (other,) = optimizer.param_groups[0]["params"]

    def take(steps: range, matrices: list[nn.Parameter], other: nn.Parameter, optimizer: Muon) -> None:
        for step in steps:
            set_gradients(matrices, step)
            other.grad = random(3, seed=step)
            optimizer.step()

    take(range(3), matrices, other, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = parameters()
    twin = optimizer_of(twins, dtype)
    (twin_other,) = twin.param_groups[0]["params"]
    with torch.no_grad():
        for parameter, copied in zip([*twins, twin_other], [*matrices, other], strict=True):
            parameter.copy_(copied)
    twin.load_state_dict(torch.load(file, weights_only=True))
    set_learning_rates(optimizer, [0.01, 0.1, 0.2], 0.5)
    set_learning_rates(twin, [0.01, 0.1, 0.2], 0.5)
    take(range(3, 5), matrices, other, optimizer)
    take(range(3, 5), twins, twin_other, twin)
    assert all(torch.equal(a, b) for a, b in zip([*matrices, other], [*twins, twin_other], strict=True))


# Which parameters


def model_of(preset: str) -> SMCADETR:
    """On the meta device, without published weights."""
    config = PRESETS[preset]().model
    with torch.device("meta"):
        return SMCADETR(
            dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None)), download=False
        )


@pytest.mark.parametrize("preset", ["demo", "smca_r50", "smca_r50_multiscale_conv"])
def test_every_trained_parameter_is_in_one_part_and_each_kind_where_it_belongs(preset: str) -> None:
    model = model_of(preset)
    optimizer = make_optimizer(model, OptimConfig(optimizer="muon"), torch.device("meta"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    if preset == "demo":
        rest, backbone, matrices, kernels = parts
    else:  # norms and stem are untrained
        (rest, matrices, kernels), backbone = parts, set()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rest | backbone | matrices | kernels == trained
    assert sum(map(len, parts)) == sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    assert {name for name in trained if name.startswith("backbone.")} == backbone | kernels

    heads = ("class_head", "offset_head", "scale_head", "level_head")
    for name, parameter in model.named_parameters():
        if name in matrices | kernels:
            assert parameter.dim() >= 2, name
            assert not any(part in name for part in (*heads, "query_", "level_embed", "norm", ".own", ".finer")), name
    last = f"{len(model.decoder.box_heads[0].layers) - 1}.weight"  # type: ignore[arg-type]
    layer = "decoder.layers.0"
    expected = {
        *(
            f"{layer}.{block}.{of}_proj.weight"
            for block in ("self_attn", "cross_attn")
            for of in ("q", "k", "v", "out")
        ),
        *(f"{layer}.linear1.weight", f"{layer}.linear2.weight", "encoder.layers.0.linear1.weight"),
        *("input_proj.0.weight", "decoder.box_heads.0.layers.0.weight"),
        f"decoder.{'box_position' if preset == 'demo' else 'center_head'}.layers.0.weight",
    }
    assert expected <= matrices
    assert {
        "decoder.class_head.weight",
        f"{layer}.prior.offset_head.weight",
        f"{layer}.prior.scale_head.weight",
    } <= rest
    queries = {"query_content", "label_embed"} if preset == "demo" else {"query_position"}
    assert {f"decoder.box_heads.0.layers.{last}", *(f"decoder.{name}" for name in queries)} <= rest
    if preset == "demo":
        first = [name for name in backbone if "embedder.embedder" in name and name.endswith("convolution.weight")]
        assert len(first) == 1, "the convolution that reads the image"
    assert all(model.get_parameter(name).dim() == 4 for name in kernels)
    assert len(kernels) == {"demo": 11}.get(preset, 42)
    if preset == "smca_r50_multiscale_conv":
        depthwise = [name for name in rest if model.get_parameter(name).dim() == 4]
        assert len(depthwise) == 36, "one for each of four levels and two between them, in each of six encoder layers"
        assert "halve.weight" in matrices
        assert f"{layer}.level_head.weight" in rest


def test_depthwise_kernels_of_any_size_and_what_reads_the_image_are_left_to_adamw() -> None:
    options = {"hidden_sizes": [24, 32], "depths": [1, 1], "num_stages": 2}
    config = dataclasses.replace(
        PRESETS["demo"]().model, backbone=BackboneConfig("convnext", options, frozen_norm=False), strides=(8,)
    )
    with torch.device("meta"):
        model = SMCADETR(config)
    taken = {id(parameter) for parameter in matrices_of(model)}
    kernels = {name: p for name, p in model.backbone.named_parameters() if p.dim() == 4}
    left = [tuple(p.shape) for p in kernels.values() if id(p) not in taken]
    assert sorted(left) == [(24, 1, 7, 7), (24, 3, 4, 4), (32, 1, 7, 7)]
    assert len(kernels) == 4


def test_the_rates_and_an_untrained_backbone() -> None:
    optim = OptimConfig(optimizer="muon", lr=1e-3, backbone_lr=1e-4, muon_lr=0.02)
    optimizer = make_optimizer(model_of("demo"), optim, torch.device("meta"))
    rates = [1e-3, 1e-4, 0.02, 0.002]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
    set_learning_rates(optimizer, rates, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 4 for rate in rates])
    model = model_of("demo")
    untrained = make_optimizer(model, dataclasses.replace(optim, backbone_lr=0.0), torch.device("meta"))
    assert [group["lr"] for group in untrained.param_groups] == [1e-3, 0.02]
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_its_rate_is_refused_where_nothing_reads_it() -> None:
    with pytest.raises(ValueError, match=r'optim.muon_lr must be left at its default with optimizer="adamw".*got 0.03'):
        OptimConfig(muon_lr=0.03)
    with pytest.raises(ValueError, match=r"optim.muon_lr must be positive, got 0"):
        OptimConfig(optimizer="muon", muon_lr=0.0)


# Runs


def test_a_run_learns_and_a_stopped_one_goes_on_exactly(tmp_path: Path) -> None:
    def config(name: str, epochs: int, **changes: Any) -> Any:
        optim = dataclasses.replace(tiny(tmp_path).optim, optimizer="muon", schedule="step", warmup_steps=0)
        return tiny(tmp_path / name, optim=optim, epochs=epochs, eval_every=2, **changes)

    train.train(config("whole", 4))
    train.train(config("parts", 2))
    train.train(config("parts", 4, resume=True))
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    assert sum("momentum" in state for state in whole["optimizer"]["state"].values()) > 30
    first, last = (line["loss"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    assert last < 0.95 * first


def test_a_checkpoint_of_the_other_optimiser_does_not_fit(tmp_path: Path) -> None:
    """Not even with --resume-changed."""
    train.train(tiny(tmp_path, epochs=1))
    optim = dataclasses.replace(tiny(tmp_path).optim, optimizer="adamw")
    with pytest.raises(ValueError, match=r"--optim.optimizer is 'adamw', was 'muon'"):
        train.train(tiny(tmp_path, epochs=1, resume=True, optim=optim))
    with pytest.raises(ValueError, match=r"does not fit this run .*parameter group.*start anew with --overwrite"):
        train.train(tiny(tmp_path, resume=True, resume_changed=True, optim=optim))


# On a GPU


@pytest.fixture
def waits_are_errors() -> Iterator[Callable[[], None]]:
    """A function from whose call on the CUDA runtime raises where the host waits for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu_do_not_wait_and_are_those_of_a_cpu(waits_are_errors: Callable[[], None]) -> None:
    config = tiny(Path()).model
    models = [SMCADETR(config).to(device) for device in ("cpu", "cuda")]
    models[1].load_state_dict(models[0].state_dict())
    optim = OptimConfig(optimizer="muon")
    optimizers = [
        make_optimizer(model, optim, torch.device(d)) for model, d in zip(models, ("cpu", "cuda"), strict=True)
    ]
    for step in range(3):
        for i, (on_cpu, on_gpu) in enumerate(zip(*(model.parameters() for model in models), strict=True)):
            on_cpu.grad = random(*on_cpu.shape, seed=1000 * step + i).float()
            on_gpu.grad = on_cpu.grad.to("cuda")
        optimizers[1].found_inf = torch.zeros((), device="cuda")  # type: ignore[attr-defined]
        optimizers[0].step()
        if step:
            waits_are_errors()
        optimizers[1].step()
        torch.cuda.set_sync_debug_mode("default")
    for on_cpu, on_gpu in zip(*(model.parameters() for model in models), strict=True):
        np.testing.assert_allclose(on_cpu.detach(), on_gpu.detach().cpu(), atol=3 * 3 * 0.01 * 0.03)
