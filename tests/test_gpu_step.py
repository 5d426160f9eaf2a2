"""A training step on a GPU waits for nothing: no copy to the host, no synchronisation, with any backend of the attention."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from smca.gpu.benchmark_cases import Work, autocast, smca_detector, trained_by_adamw
from smca.gpu.criterion import SetCriterion

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None, reason="needs a CUDA device and cupy"
)


def losses(work: Work, preset: str, attention: str, matcher: str, *, compiled: bool = False) -> list[float]:
    """Of four steps, of which on a GPU the last two may not wait: the first ones compile kernels and make the optimiser's
    state."""
    model, criterion, targets, images = smca_detector(preset, attention, work)
    assert isinstance(criterion, SetCriterion)
    criterion.matcher_backend = matcher
    optimizer = trained_by_adamw(model, model.backbone)
    if compiled:
        model.compile()
        criterion.compile()
    pixels = (images * 255).byte().cpu()
    if work.device == "cuda":
        pixels = pixels.pin_memory()
    found = []
    model.train()
    for index in range(4):
        if work.device == "cuda" and index == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            there = pixels.to(work.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            with autocast(work):
                outputs = model(there)
            terms = criterion(outputs, targets)
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            found.append(terms["loss"].detach())
        finally:
            if work.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return torch.stack(found).tolist()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "lifted", "triton"])
@pytest.mark.parametrize("preset", ["smca_r50", "smca_r50_multiscale"])
def test_a_step_does_not_wait_for_the_gpu(preset: str, attention: str, dtype: torch.dtype) -> None:
    work = Work((256, 320), batch=2, dtype=dtype, device="cuda", small=False)
    first, *_, last = losses(work, preset, attention, "cupy")
    assert 0 < last < 1e4
    assert last != first


@needs_gpu
def test_a_compiled_step_does_not_wait_either() -> None:
    work = Work((256, 320), batch=2, dtype=torch.bfloat16, device="cuda", small=False)
    first, *_, last = losses(work, "smca_r50", "triton", "cupy", compiled=True)
    assert 0 < last < 1e4
    assert last != first


@needs_gpu
def test_the_debug_mode_finds_a_step_that_waits() -> None:
    """SciPy's matcher does: the comparison above can fail."""
    work = Work((256, 320), batch=2, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        losses(work, "smca_r50", "lifted", "scipy")


def test_the_step_itself_on_a_cpu() -> None:
    first, *_, last = losses(Work((64, 96), batch=1), "smca_r50", "eager", "scipy")
    assert 0 < last < 1e4
    assert last != first
