"""The trainer's step on a GPU: the CUDA runtime finds nothing in it that waits for the device, with any attention backend.

tests/gpu/test_no_sync.py shows the same without a GPU.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from smca.datasets import Batch, Targets
from smca.gpu.benchmark.cases import Work, autocast, smca_detector, trained_by_adamw
from smca.gpu.training.bad_step import Step
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.optimizer import clip_gradient, update_average

STEPS, WARM_UP = 4, 2
"""The first steps compile kernels and make the optimiser's state, and may wait."""

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None, reason="needs a CUDA device and cupy"
)


def losses(
    work: Work, preset: str, attention: str, matcher: str, output: Path, *, compiled: bool = False
) -> list[float]:
    """The losses of a few steps, as ``smca.gpu.train`` takes them; in the last two, the debug mode raises where one waits."""
    model, criterion, targets, images = smca_detector(preset, attention, work)
    criterion.matcher_backend = matcher
    cuda, average = work.device == "cuda", copy.deepcopy(model).requires_grad_(False)
    optimizer = trained_by_adamw(model, model.backbone)
    if compiled:
        model.compile()
        criterion.compile()
    half = work.dtype is torch.float16
    scaler = torch.amp.GradScaler(work.device, init_scale=2.0**6, enabled=half)  # a step that overflows would not learn
    check = FiniteCheck(model, output, delayed=cuda, skips=half)
    mask = torch.zeros(work.batch, *work.image_size, dtype=torch.bool)
    mask[:, :, -64:] = True
    sizes = torch.tensor([work.image_size] * work.batch)
    on_host = Targets(targets.labels.cpu(), targets.boxes.cpu(), targets.valid.cpu())
    host = Batch((images * 255).byte().cpu(), mask, on_host, torch.arange(work.batch), sizes, torch.arange(work.batch))
    pixels, mask = (tensor.pin_memory() if cuda else tensor for tensor in (host.images, mask))
    losses = []
    model.train()
    for index in range(STEPS):
        if cuda and index == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        on_device = pixels.to(work.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with autocast(work):
            outputs = model(on_device, mask.to(work.device, non_blocking=True), targets)
        terms = criterion(outputs, targets)
        check.raise_if_not_finite()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(terms["loss"]).backward()
        scaler.unscale_(optimizer)
        norm = clip_gradient(model.parameters(), 0.1)
        check.record(terms, norm, Step([host]), optimizer)
        optimizer.step()
        scaler.update()
        update_average(average, model, 0.9)
        losses.append(terms["loss"].detach())
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    return torch.stack(losses).tolist()


@pytest.fixture(autouse=True)
def _debug_mode_ends_here() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def assert_learning(losses: list[float]) -> None:
    assert len(set(losses)) == STEPS
    assert all(0 < loss < 1e4 for loss in losses)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "lifted", "triton"])
@pytest.mark.parametrize("preset", ["smca_r50", "smca_r50_multiscale", "fast_r50"])
def test_a_step_does_not_wait(preset: str, attention: str, dtype: torch.dtype, tmp_path: Path) -> None:
    work = Work((256, 320), batch=2, dtype=dtype, device="cuda", small=False)
    assert_learning(losses(work, preset, attention, "cupy", tmp_path))


@needs_gpu
def test_a_compiled_step_does_not_wait_either(tmp_path: Path) -> None:
    work = Work((256, 320), batch=2, dtype=torch.bfloat16, device="cuda", small=False)
    assert_learning(losses(work, "fast_r50", "triton", "cupy", tmp_path, compiled=True))


@needs_gpu
def test_a_step_that_waits_is_found(tmp_path: Path) -> None:
    """SciPy's matcher does, from the first step with the debug mode on."""
    with pytest.raises(RuntimeError, match="synchroniz"):
        losses(Work((256, 320), batch=2, device="cuda"), "smca_r50", "lifted", "scipy", tmp_path)


def test_the_step_itself_on_a_cpu(tmp_path: Path) -> None:
    assert_learning(losses(Work((64, 96), batch=1), "smca_r50", "eager", "scipy", tmp_path))
