"""Training on several processes of one machine: one set of files, with the numbers of the whole job."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from smca.datasets import SyntheticShapes
from smca.gpu import train
from smca.gpu.evaluation import detect, evaluate_detections, evaluation_loader
from smca.gpu.model import SMCADETR
from smca.gpu.model.synced_norm import synchronize_norms
from smca.gpu.training import processes
from smca.gpu.training.log import read_metrics
from smca.gpu.training.stop import StoppedError

PROCESSES = os.environ.get("SMCA_PROCESSES", "2")
"""The nightly profile has 4."""
NIGHTLY = pytest.mark.skipif(PROCESSES == "2", reason="one more start of torchrun: nightly, with SMCA_PROCESSES=4")
STARTS = int(os.environ.get("SMCA_STARTS", "0"))
"""Of a job that must not hang; the nightly profile has 20."""


OPTIONS = [
    "demo",
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--optim.ema-decay",
    "0.9",
    "--epochs",
    "4",
]
OPTIONS += ["--synthetic.train-images", "11", "--synthetic.val-images", "5", "--synthetic.image-size", "64"]
OPTIONS += ["--augmentation.zoom", "0.7", "1.0", "--optim.warmup-steps", "2", "--model.strides", "4"]
"""Norms that learn, noised queries, an epoch that does not come out even, and a stage of the network that nothing reads."""


def torchrun(output: Path, *more: str, script: Path = Path(train.__file__), restarts: int = 0) -> None:
    """Train on several processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
    command += ["--max-restarts", str(restarts), str(script), *OPTIONS, *more, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:4000]}\n…\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several processes."""
    folder = tmp_path_factory.mktemp("many")
    torchrun(folder)
    return folder


def test_several_processes_take_the_steps_of_one(many: Path, tmp_path: Path) -> None:
    """The same curve; and a run of one process goes on on several."""
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    train.train(train.parse([*OPTIONS, "--output", str(one)]))
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
            train.train(train.parse([*OPTIONS, "--output", str(mixed)]))
    torchrun(mixed, "--resume")
    lines = {folder: read_metrics(folder / "metrics.jsonl") for folder in (one, many, mixed)}
    losses = {folder: [line["loss"] for line in each] for folder, each in lines.items()}
    assert [line["step"] for line in lines[one]] == [2, 4, 6, 8]
    for folder in (many, mixed):
        assert losses[folder][0] == pytest.approx(losses[one][0], rel=2e-5)
        # Muon gives small differences of the gradient the size of large ones: rounding grows from step to step.
        assert losses[folder] == pytest.approx(losses[one], rel=2e-2)
    model = SMCADETR.from_pretrained(many / "model_last")
    data = SyntheticShapes(5, 1, image_size=64)
    results = detect(model, evaluation_loader(data, model.config, batch_size=5, workers=0))
    assert evaluate_detections(data.ground_truth(), results).ap == pytest.approx(lines[many][-1]["ap"], abs=1e-9)


@NIGHTLY
def test_several_processes_in_parts_take_the_step_of_one(tmp_path: Path) -> None:
    """Where norms do not learn."""
    more = ["--model.backbone.frozen-norm", "--epochs", "1"]
    torchrun(tmp_path / "parts", *more, "--accumulate", str(4 // int(PROCESSES)))
    train.train(train.parse([*OPTIONS, *more, "--output", str(tmp_path / "one")]))
    (parts,), (one,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("parts", "one"))
    assert parts["loss"] == pytest.approx(one["loss"], rel=1e-5)


EXACT = ["--optim.optimizer", "adamw", "--model.backbone.frozen-norm", "--optim.schedule", "step"]
EXACT += ["--synthetic.val-images", "1"]
"""With which rounding does not grow, a run may be made longer, and an evaluation has fewer images than there are processes."""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on one process."""
    folder = tmp_path_factory.mktemp("short")
    train.train(train.parse([*OPTIONS, *EXACT, "--epochs", "2", "--output", str(folder)]))
    return folder


@pytest.fixture(scope="module")
def longer(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and an epoch more."""
    folder = shutil.copytree(short, tmp_path_factory.mktemp("longer") / "run")
    train.train(train.parse([*OPTIONS, *EXACT, "--epochs", "3", "--resume", "--output", str(folder)]))
    return Path(folder)


def assert_alike(one: Path, other: Path) -> None:
    """The same curve, the same detections, and the same last model."""
    aps = [[line["ap"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (one, other)]
    assert aps[0] == pytest.approx(aps[1], abs=1e-3)
    curves = [[line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (one, other)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    weights = [load_file(folder / "model_last/model.safetensors") for folder in (one, other)]
    for name, value in weights[0].items():
        # Where a gradient is next to nothing, rounding decides what Adam makes of it, in a few numbers of many.
        assert (value - weights[1][name]).abs().float().mean() < 1e-6 * int(PROCESSES), name


def test_a_divided_model_takes_the_steps_of_a_whole_one(short: Path, longer: Path, tmp_path: Path) -> None:
    """Of its two epochs on several processes a checkpoint is left that one process goes on from, and that serves as a model."""
    run = tmp_path / "run"
    torchrun(run, *EXACT, "--epochs", "2", "--fsdp")
    assert_alike(run, short)
    shards = list(run.glob("checkpoint.shards.*/*.safetensors"))
    assert len(shards) == 2 * int(PROCESSES)  # of two checkpoints
    size = (short / "checkpoint.pt").stat().st_size
    assert all(0.9 * size < int(PROCESSES) * shard.stat().st_size < 1.1 * size for shard in shards)
    assert (run / "checkpoint.pt").stat().st_size < size / 10
    last = load_file(run / "model_last/model.safetensors")
    assert all(
        torch.equal(value, last[name])
        for name, value in SMCADETR.from_pretrained(run / "checkpoint.pt").state_dict().items()
    )
    train.train(train.parse([*OPTIONS, *EXACT, "--epochs", "3", "--resume", "--output", str(run)]))
    assert_alike(run, longer)
    assert len(list(run.glob("checkpoint.shards.*"))) == 1  # that of the checkpoint before


@NIGHTLY
def test_a_whole_model_is_divided_in_the_middle_of_its_training(short: Path, longer: Path, tmp_path: Path) -> None:
    shutil.copytree(short, tmp_path / "run")
    torchrun(tmp_path / "run", *EXACT, "--epochs", "3", "--fsdp", "--resume")
    assert_alike(tmp_path / "run", longer)


def test_a_model_is_divided_among_several_or_not_at_all(tmp_path: Path) -> None:
    config = train.parse([*OPTIONS, "--fsdp", "--output", str(tmp_path / "run")])
    with pytest.raises(
        ValueError, match=r"fsdp: expected several processes to divide the model over, got one: start them with"
    ):
        train.train(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"compile must be not given together with fsdp"):
        dataclasses.replace(config, compile=True)
    with pytest.raises(ValueError, match=r"precision must be bf16 or fp32 with fsdp, .* got 'fp16'"):
        dataclasses.replace(config, precision="fp16")


@pytest.mark.parametrize("options", [[], pytest.param(["--fsdp"], marks=NIGHTLY)], ids=["whole", "divided"])
def test_a_process_that_dies_is_started_again_and_nothing_is_lost(
    options: list[str], many: Path, tmp_path: Path
) -> None:
    """By torchrun, with all the others; as long as it dies once."""
    if options:
        many = tmp_path / "many"
        torchrun(many, *options)
    script = tmp_path / "train.py"
    script.write_text(
        """
import os, signal
from smca.gpu import train

def seed_step(device, seed, step, rank, of_all=train.seed_step):
    if step == 5 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    of_all(device, seed, step, rank)

train.seed_step = seed_step
train.main()
"""
    )
    torchrun(tmp_path / "run", "--overwrite", *options, script=script, restarts=1)
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (many, tmp_path / "run")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    weights = [(folder / "model_last/model.safetensors").read_bytes() for folder in (many, tmp_path / "run")]
    assert weights[0] == weights[1]


@NIGHTLY
def test_processes_agree_that_the_time_is_over(tmp_path: Path) -> None:
    """Whatever the clock of each says: the first one's holds."""
    script = tmp_path / "train.py"
    script.write_text(
        """
from smca.gpu import train

train.LOG_EVERY = 1
train.draw_run = lambda *_: None
train._is_time_over = lambda run: run.rank == 1 or run.step >= 3
train.main()
"""
    )
    torchrun(tmp_path / "run", "--max-minutes", "60", script=script)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [(line["step"], line.get("extra", False)) for line in lines] == [(2, False), (3, True)]


@pytest.mark.parametrize("start", range(STARTS))
def test_a_start_does_not_hang(start: int, tmp_path: Path) -> None:
    """Nor an end, whichever process comes last."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import os, time
from smca.gpu import train

time.sleep(({start} % 5) / 4 if os.environ["RANK"] == "{start % 2}" else 0)
train.draw_run = lambda *_: None
train.main()
"""
    )
    torchrun(tmp_path / "run", "--max-steps", "1", "--synthetic.val-images", "1", script=script)


def test_a_process_that_another_one_leaves_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of its own stay what they are."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    message = r"process 0 of 1 cannot go on, since another one has ended or does not answer: .*Connection reset by"
    with pytest.raises(ValueError, match=message), processes.process_group():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match="mine"), processes.process_group():
        raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "the environment says WORLD_SIZE=2 and no RANK: start several processes with torchrun"),
        ({"RANK": "0"}, "the environment says RANK=0 and no WORLD_SIZE"),
        ({"RANK": "1"}, "the environment says RANK=1, which cannot be: RANK counts from 0 to WORLD_SIZE − 1"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "the environment says RANK=3 WORLD_SIZE=2, which cannot be"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "the environment says RANK=one WORLD_SIZE=2: expected whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 promise 2 processes, which did not all come"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
            "RANK=0 and WORLD_SIZE=2 promise 2 processes, which did not all come",
        ),
    ],
    ids=str,
)
def test_processes_that_are_promised_and_do_not_come_are_missed(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "ALL_COME", timedelta(seconds=1))
    with pytest.raises(ValueError, match=message):
        train.train(train.parse([*OPTIONS, "--output", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def _norm_of_a_process(rank: int, file: str, x: Tensor, weight: Tensor) -> None:
    """Normalise every second image, send the gradient of a loss back, and save what came of it."""
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    norm = nn.BatchNorm2d(3).double()
    synchronize_norms(norm, torch.device("cpu"))
    part = x[rank::2].clone().requires_grad_()
    y = norm(part)
    (y * weight[rank::2]).sum().backward()
    assert norm.weight.grad is not None
    assert part.grad is not None
    tensors = {"y": y.detach(), "x": part.grad, "weight's": norm.weight.grad, **norm.state_dict()}
    torch.save(tensors, f"{file}.{rank}")
    distributed.destroy_process_group()


def test_norms_of_two_processes_are_those_of_all_images(tmp_path: Path) -> None:
    """Values, running statistics and gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(6, 3, 4, 5, dtype=torch.float64, generator=generator) * 3 + 7 for _ in range(2))
    torch.multiprocessing.spawn(_norm_of_a_process, (str(tmp_path / "store"), x, weight), nprocs=2)
    norm = nn.BatchNorm2d(3).double()
    x.requires_grad_()
    y = norm(x)
    (y * weight).sum().backward()
    parts = [torch.load(tmp_path / f"store.{rank}", weights_only=True) for rank in range(2)]
    assert x.grad is not None
    assert norm.weight.grad is not None
    for rank, part in enumerate(parts):
        assert torch.allclose(part["y"], y[rank::2], rtol=0, atol=1e-12)
        assert torch.allclose(part["x"], x.grad[rank::2], rtol=0, atol=1e-12)
        for name, value in norm.state_dict().items():
            assert torch.allclose(part[name], value, rtol=1e-12, atol=0), name
    # Each process has its own images' part of a parameter's gradient; they are added up later.
    assert torch.allclose(parts[0]["weight's"] + parts[1]["weight's"], norm.weight.grad, rtol=1e-12)
