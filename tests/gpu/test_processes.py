"""Training on several processes of one machine: one set of files, with the numbers of the whole job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smca.datasets import SyntheticShapes
from smca.gpu import train
from smca.gpu.evaluation import detect, evaluate_detections, evaluation_loader
from smca.gpu.model import SMCADETR
from smca.gpu.training.log import read_metrics
from smca.gpu.training.stop import StoppedError

PROCESSES = os.environ.get("SMCA_PROCESSES", "2")
"""The nightly profile has 4."""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """torchrun with two CPU processes: the same loop, batch split in two, one set of files, with the numbers of the whole job. The
    network has trained batch norms and, read at stride 4 only, a stage that nothing reads."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [
        "demo",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--model.strides",
        "4",
    ]
    options += ["--synthetic.train-images", "12", "--synthetic.val-images", "5", "--synthetic.image-size", "64"]
    options += ["--optim.lr", "3e-3", "--optim.backbone-lr", "3e-3", "--optim.warmup-steps", "1"]
    done = subprocess.run(
        [*command, train.__file__, *options, "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert line["step"] == 3
    model = SMCADETR.from_pretrained(tmp_path / "two" / "model")
    data = SyntheticShapes(5, 1, image_size=64)
    results = detect(model, evaluation_loader(data, model.config, batch_size=5, workers=0))
    assert evaluate_detections(data.ground_truth(), results).ap == pytest.approx(line["ap"], abs=1e-9)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """With norms that learn, noised queries, augmentation and an epoch that does not come out even: the same curve, and a run of
    one process goes on on two."""
    options = ["demo", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--optim.ema-decay", "0.9"]
    options += ["--synthetic.train-images", "11", "--synthetic.val-images", "2", "--synthetic.image-size", "64"]
    options += ["--augmentation.zoom", "0.7", "1.0", "--optim.warmup-steps", "2", "--epochs", "4"]

    def torchrun(folder: str, *more: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
        done = subprocess.run(
            [*command, train.__file__, *options, *more, "--output", str(tmp_path / folder)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    torchrun("many")
    train.train(train.parse([*options, "--output", str(tmp_path / "one")]))
    with pytest.MonkeyPatch.context() as patch:
        taken = 0

        def stop_in_the_fourth(*args: Any, of_one: Any = train.seed_step) -> None:
            nonlocal taken
            taken += 1
            of_one(*args)
            if taken == 4:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(train, "seed_step", stop_in_the_fourth)
        with pytest.raises(StoppedError):
            train.train(train.parse([*options, "--output", str(tmp_path / "mixed")]))
    torchrun("mixed", "--resume")
    one, many, mixed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "many", "mixed"))
    assert [line["step"] for line in one] == [2, 4, 6, 8]
    for lines in (many, mixed):
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    expected = load_file(tmp_path / "one/model/model.safetensors")
    for name in ("many", "mixed"):
        got = load_file(tmp_path / name / "model/model.safetensors")
        for key, value in expected.items():
            assert torch.allclose(got[key], value, rtol=1e-3, atol=2e-3), (
                f"{name}: {key}, {(got[key] - value).abs().max()}"
            )
