"""Training on several processes of one machine: one set of files, with the numbers of the whole job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from smca.datasets import SyntheticShapes
from smca.gpu import train
from smca.gpu.evaluation import detect, evaluate_detections, evaluation_loader
from smca.gpu.model import SMCADETR
from smca.gpu.training.log import read_metrics


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


def test_the_loss_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """With fixed norms both take the same steps: the loss in the log is that of the whole batch, not of the first one's part."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train.__file__]
    options = ["demo", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    options += ["--synthetic.train-images", "8", "--synthetic.val-images", "2", "--synthetic.image-size", "64"]
    options += ["--model.backbone.frozen-norm", "--model.denoising-groups", "0"]  # each process draws noise of its own
    done = subprocess.run(
        [*command, *options, "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    train.train(train.parse([*options, "--output", str(tmp_path / "one")]))
    two, one = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("two", "one"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
