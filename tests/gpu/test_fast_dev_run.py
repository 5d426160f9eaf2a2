"""--fast-dev-run: everything once, beside the real run, and what that would take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from smca.datasets import SyntheticShapes
from smca.gpu import train
from smca.gpu.presets import PRESETS
from smca.gpu.training import batch_size, fast_run
from smca.gpu.training.log import read_metrics
from tiny_run import tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("pictures")
def test_all_that_a_run_does_is_done_once_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even if an earlier one has filled its folder. The real run stays as it is; its time follows from that of an image:
    here a second of computing, a quarter of loading, half a one for a held-out image."""

    def reported(run: Any, *more: Any) -> str:
        run.train_seconds, run.data_seconds = 6.5, 0.5
        return fast_run.report(run, *more)

    monkeypatch.setattr(train, "report", reported)
    monkeypatch.setattr(fast_run, "_seconds_to_load", lambda run: 0.25)
    monkeypatch.setattr(fast_run, "_seconds_to_detect", lambda run: 0.5)
    output, own = tmp_path / "real", tmp_path / "real.fast-dev-run"
    for folder in (output, own):
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(b"of a run")
    train.train(tiny(output, epochs=30, batch_size=2, fast_dev_run=True, resume=True))
    assert contents(output) == {"checkpoint.pt": b"of a run"}
    assert set(tmp_path.iterdir()) == {output, own}
    models = {f"{model}/{file}" for model in ("model", "model_last") for file in ("config.json", "model.safetensors")}
    others = {"checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "curves.png", "predictions.png"}
    others |= {"priors.jsonl", "priors.png"}
    assert {name for name in contents(own) if not name.startswith(("tensorboard", "pictures"))} == models | others
    assert len(list((own / "tensorboard").iterdir())) == 1
    assert len(list((own / "pictures").iterdir())) == 2
    (line,) = read_metrics(own / "metrics.jsonl")
    assert line["step"] == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "fast dev run: 3 of 3 steps, of 2 images, an evaluation of 2 of 6 held-out images" in said
    assert f"all in {own}; {output} is untouched" in said
    assert "whole run at this speed: 180 steps of 2 images in 7.5 minutes, and 30 evaluations in 90.0 seconds" in said
    assert "largest batch: a step of 1 image of 64×64 px, the largest there can be, with 6 objects each works" in said


def test_what_stands_in_the_way_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(batch_size, "take_worst_steps", no_memory)
    monkeypatch.setattr(fast_run, "_seconds_to_load", lambda run: 5.0)
    monkeypatch.setattr(fast_run.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))  # type: ignore[attr-defined]
    train.train(tiny(tmp_path / "run", fast_dev_run=True, cache_images=False))
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"PROBLEM: a step of 1 image of 64×64 px,.* takes more than nine tenths of the GPU's free memory", said
    )
    assert "PROBLEM: training would wait for images" in said
    assert re.search(r"PROBLEM: the run needs [\d,]+ MB for checkpoints and models, 1 MB are free", said)


@pytest.mark.parametrize("name", PRESETS)
def test_any_preset_is_shortened_into_a_folder_of_its_own(name: str) -> None:
    config = train.parse([name, "--fast-dev-run", "--restartable"])
    short = fast_run.shortened(config)
    assert short.output == config.output.with_name(f"{name}.fast-dev-run")
    assert (short.model, short.optim, short.augmentation) == (config.model, config.optim, config.augmentation)


def test_the_first_images_of_a_data_set() -> None:
    whole = SyntheticShapes(5, 1, image_size=32)
    first = fast_run.FirstImages(whole, 2)
    assert len(first) == 2
    assert [image["id"] for image in first.ground_truth()["images"]] == [whole[0].image_id, whole[1].image_id]
    with pytest.raises(IndexError):
        first[2]
    assert len(fast_run.FirstImages(whole, 9)) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_says_what_memory_a_step_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.train(tiny(tmp_path / "run", fast_dev_run=True, device="cuda"))
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"memory: a step of 4 images of 64×64 px,.* takes \d+\.\d of the GPU's \d+\.\d GB", said)
