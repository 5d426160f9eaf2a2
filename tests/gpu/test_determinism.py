"""--deterministic: what it switches on, for how long, and what it says where it cannot be had."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smca.gpu import train
from smca.gpu.training import determinism
from smca.gpu.training.determinism import deterministic
from smca.gpu.training.resume import differences, settings_of
from tiny_run import tiny


def test_a_run_takes_deterministic_operations_only_and_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(determinism.CUBLAS, raising=False)
    seen = []

    def noting(*arguments: Any, of_all: Any = train.seed_step) -> None:
        cudnn = torch.backends.cudnn
        seen.append((torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark))
        of_all(*arguments)

    monkeypatch.setattr(train, "seed_step", noting)
    train.train(tiny(tmp_path, max_steps=1, deterministic=True))
    assert seen == [(True, True, False)]
    assert os.environ[determinism.CUBLAS] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert not flushes()


def flushes() -> bool:
    """Whether the smallest numbers are taken for 0."""
    least = torch.tensor(1e-310, dtype=torch.float64)
    return bool((least * 2 == 0).item())


@pytest.mark.parametrize("before", [False, True])
def test_the_smallest_numbers_are_0_in_a_run_and_then_as_before(before: bool) -> None:
    torch.set_flush_denormal(before)
    try:
        with determinism.without_denormals():
            assert flushes()
        assert flushes() is before
    finally:
        torch.set_flush_denormal(False)


def test_nothing_is_switched_on_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(determinism.CUBLAS, raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    assert determinism.CUBLAS not in os.environ


def test_it_must_be_asked_for_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for value, refused in ((":0:0", True), (":16:8", False)):
        monkeypatch.setenv(determinism.CUBLAS, value)
        if not refused:
            with deterministic(True):
                continue
        with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 before CUDA starts"), deterministic(True):
            pass


def test_an_operation_that_has_no_such_form_is_named() -> None:
    """On a CPU there are few."""
    with pytest.raises(ValueError, match=r"cannot be had with --deterministic .*put_"), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="mine"), deterministic(True):
        raise RuntimeError("mine")


def test_a_run_does_not_change_it_unasked_when_it_goes_on(tmp_path: Path) -> None:
    plain = tiny(tmp_path)
    changed = differences(settings_of(plain), settings_of(dataclasses.replace(plain, deterministic=True)))
    assert changed == ["--deterministic is True, was False"]


@pytest.mark.usefixtures("job")
def test_gradients_have_their_place_before_the_first_step() -> None:
    """Nothing but the place is changed, and PyTorch has nothing to say of it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model.to(memory_format=torch.channels_last)
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    parallel = DistributedDataParallel(model)
    torch.set_warn_always(True)  # not once only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            determinism.arrange_gradients(parallel)
    finally:
        torch.set_warn_always(False)
    assert parallel.module is model
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    parallel(torch.rand(5, 3, 2, 2)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    parallel(torch.rand(5, 3, 2, 2))  # which says what held in the pass before
    assert parallel._get_ddp_logging_data()["has_rebuilt_buckets"]


@pytest.mark.usefixtures("job")
def test_where_gradients_keep_their_place_no_pass_is_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = DistributedDataParallel(nn.Linear(3, 4), find_unused_parameters=True)
    monkeypatch.setattr(parallel, "forward", lambda: pytest.fail("a pass was taken"))
    determinism.arrange_gradients(parallel)
