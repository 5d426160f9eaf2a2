"""--batch-size auto: the largest batch that fits, found without a trace."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smca.datasets import Augmentation
from smca.gpu import train
from smca.gpu.training import batch_size
from smca.gpu.training.setup import Run, set_up
from tiny_run import tiny


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for a GPU's: of five images a part, or of what the test puts there. The steps are taken all the same."""
    most = [5]
    take = batch_size.take_worst_steps

    def limited(run: Run, images: int, train_epoch: Any) -> None:
        take(run, min(images, 2), train_epoch)
        if images > most[0]:
            raise torch.cuda.OutOfMemoryError(f"no memory for {images}")

    monkeypatch.setattr(batch_size, "take_worst_steps", limited)
    monkeypatch.setattr(batch_size, "_has_memory_of_its_own", lambda device: True)
    return most


def test_the_most_that_fits_is_trained_with_and_resumed_with(
    tmp_path: Path, memory: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is the one that was given the number; and no other number is found when it goes on, whatever fits then."""
    train.train(tiny(tmp_path / "given", epochs=2, batch_size=4, overwrite=True))
    auto = tiny(tmp_path / "auto", epochs=2, batch_size="auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_detections", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(auto)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--batch-size auto: 4 images per step, which fit at 64×64 px with 6 objects each. Learning rates stay" in said
    )
    state = torch.load(tmp_path / "auto/checkpoint.pt", weights_only=True)
    assert state["settings"]["batch_size"] == 4
    memory[0] = 1
    train.train(tiny(tmp_path / "auto", epochs=2, batch_size="auto", resume=True))
    given, found = (load_file(tmp_path / name / "model_last/model.safetensors") for name in ("given", "auto"))
    assert all(torch.equal(found[name], value) for name, value in given.items())


@pytest.mark.parametrize(("most", "parts", "expected"), [(5, 1, 4), (7, 1, 6), (100, 1, 12), (2, 2, 4), (3, 4, 12)])
def test_what_is_tried(most: int, parts: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than there are: the run has twelve images."""
    run = set_up(tiny(tmp_path, batch_size="auto", accumulate=parts), 0, 1, None, None, None)
    monkeypatch.setattr(batch_size, "_has_memory_of_its_own", lambda device: True)
    monkeypatch.setattr(batch_size, "fits", lambda run, images, train_epoch: images <= most)
    assert batch_size.find_batch_size(run, train._train_epoch) == expected


def test_a_trial_leaves_no_trace(tmp_path: Path) -> None:
    config = tiny(tmp_path, batch_size="auto")
    run = set_up(config, 0, 1, None, None, None)
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    drawn = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    seen: list[tuple[int, ...]] = []

    def watched(trial: Run, *others: Any) -> None:
        train._train_epoch(trial, *others)
        seen.append(tuple(next(iter(trial.loader)).images.shape))
        assert trial.step == 1
        after = run.model.state_dict()
        assert any(not torch.equal(after[name], value) for name, value in before[0].items()), "it was a real step"
        random.random()
        np.random.random()  # noqa: NPY002

    batch_size.take_worst_steps(run, 3, watched)
    assert seen == [(3, 3, 64, 64)]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert run.optimizer.state_dict() == before[1]
    assert all(p.grad is None for p in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (np.random.get_state()[1] == drawn[1]).all()  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == drawn[2]
    assert (run.step, run.epoch, run.batch, run.train_seconds) == (0, 0, 0, 0.0)
    assert not list(tmp_path.iterdir())


def test_it_is_refused_where_nothing_can_be_found(
    tmp_path: Path, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory[0] = 0
    with pytest.raises(ValueError, match=r"not even one image of 64×64 px with 6 objects fits into the GPU's memory"):
        train.train(tiny(tmp_path, batch_size="auto"))
    run = set_up(tiny(tmp_path, batch_size="auto"), 0, 1, None, None, None)
    run.world = 2
    with pytest.raises(ValueError, match=r"expected one process, got 2: .* then give --batch-size 2 times that"):
        batch_size.find_batch_size(run, train._train_epoch)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"--batch-size auto: expected a CUDA GPU, .* got the device 'cpu': give a number"
    ):
        train.train(tiny(tmp_path, batch_size="auto"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match='batch_size must be at least 1, or "auto", got 0'):
        tiny(tmp_path, batch_size=0)
    assert train.parse(["demo", "--batch-size", "auto"]).batch_size == "auto"
    assert train.parse(["demo", "--batch-size", "3"]).batch_size == 3


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        (Augmentation(short_sides=(100, 200)), (400, 400)),
        (Augmentation(short_sides=(100, 200), max_size=300), (300, 300)),
        (Augmentation(), (90, 80)),
        (
            Augmentation(crop_probability=0.5, short_sides=(100,), crop_size=(100, 300), crop_short_sides=(300,)),
            (300, 300),
        ),
    ],
    ids=["sides", "limit", "as stored", "crops"],
)
def test_no_result_is_larger_than_the_largest(augmentation: Augmentation, expected: tuple[int, int]) -> None:
    """Images twice as wide as high, and twice as high as wide, of which batches can have both."""
    sizes = [(40, 80), (90, 45)]
    height, width = augmentation.largest_size(sizes)
    assert (height, width) == expected
    rng = np.random.default_rng(0)
    for size in sizes * 50:
        view = augmentation._crop(size, rng)
        got = augmentation._output_size(view, rng)
        assert got[0] <= height
        assert got[1] <= width


def test_a_trial_may_take_nine_tenths_of_what_is_free_or_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own limit, which a stand-in notes here."""
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    for name, index in (("cuda", None), ("cuda:1", 1)):
        limits.clear()
        with pytest.raises(torch.cuda.OutOfMemoryError), batch_size._limited_memory(torch.device(name)):
            raise torch.cuda.OutOfMemoryError
        assert limits == [(pytest.approx(0.63), index), (1.0, index)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_tenth_of_the_memory_is_left(tmp_path: Path) -> None:
    config = tiny(tmp_path, batch_size="auto", device="cuda")
    run = set_up(config, 0, 1, None, None, None)
    torch.cuda.reset_peak_memory_stats()
    images = batch_size.find_batch_size(run, train._train_epoch)
    assert images == 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_size, "SHARE", 1e-4)
        with pytest.raises(ValueError, match="not even one image"):
            batch_size.find_batch_size(run, train._train_epoch)
