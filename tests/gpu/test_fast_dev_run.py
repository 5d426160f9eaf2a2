"""--fast-dev-run: everything once, beside the real run, and what that would take."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from smca.datasets import SyntheticShapes
from smca.gpu import train
from smca.gpu.pictures import run as pictures
from smca.gpu.presets import PRESETS
from smca.gpu.training import batch_size, fast_run
from smca.gpu.training.log import read_metrics

SPEC: Any = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
shared: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shared)
tiny = shared.tiny


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take longer than the rest."""
    monkeypatch.setattr(pictures, "training_curves", lambda metrics, path: path.touch())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_that_a_run_does_is_done_once_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice, since an earlier one may have filled its folder; the real run, which it names, stays as it is, and takes as long as it
    says: within a factor of three, on a machine that others use, too."""
    output = tmp_path / "real"
    train.train(tiny(output, epochs=3, batch_size=2, eval_every=3))
    (real,) = read_metrics(output / "metrics.jsonl")
    before = contents(output)
    capsys.readouterr()
    for _ in range(2):
        train.train(tiny(output, epochs=30, batch_size=2, fast_dev_run=True, resume=True))
    own = tmp_path / "real.fast-dev-run"
    assert contents(output) == before
    assert set(tmp_path.iterdir()) == {output, own}
    written = {name for name in contents(own) if "tensorboard" not in name and "pictures" not in name}
    assert written == before.keys() - {n for n in before if "tensorboard" in n or "pictures" in n} | {
        "checkpoint.previous.pt"
    }
    assert len(list((own / "pictures").iterdir())) == 2
    (line,) = read_metrics(own / "metrics.jsonl")
    assert line["step"] == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "fast dev run: 3 steps of 2 images, an evaluation of 2 of 6 held-out images" in said
    assert f"all in {own}; {output} is untouched" in said
    (seconds,) = re.findall(
        r"the whole run at this speed: 180 steps of 2 images in ([\d.]+) seconds, and 30 eval", said
    )
    assert 1 / 3 < float(seconds) / (10 * real["train_seconds"]) < 3
    assert "largest batch: a step of 2 images of 64×64 px, the largest there can be, with 6 objects each works" in said


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
    assert "PROBLEM: the GPU has no memory for a step of 2 images of 64×64 px" in said
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
