"""``--init``: a run starts from a trained model, says so, and does not need it again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from published_models import draw_checkpoint, save_checkpoint
from smca.gpu import train
from smca.gpu.config import RunConfig
from smca.gpu.config_json import read_json
from smca.gpu.files import load_checkpoint
from smca.gpu.model import SMCADETR
from smca.gpu.training.bad_step import _plain
from smca.gpu.training.log import read_metrics
from smca.gpu.training.setup import set_up
from tiny_run import tiny

PROCESSES = os.environ.get("SMCA_PROCESSES", "2")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> SMCADETR:
    """A model of a tiny run's configuration, none of whose weights is as they start."""
    run = set_up(tiny(tmp_path_factory.mktemp("there")), 0, 1, None, None, None)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return run.model


@pytest.fixture
def source(there: SMCADETR, tmp_path: Path) -> str:
    there.save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


def test_a_run_starts_from_another_model_and_its_average_too(there: SMCADETR, source: str, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", init=source)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema_decay=0.9))
    run = set_up(config, 0, 1, None, None, None)
    assert run.average is not None
    for model in (run.model, run.average):
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in there.state_dict().items())
    assert run.start is not None
    assert run.start.startswith(f"start: {source}, a model of this project: 1 + 2 layers, 8 queries")
    fewer = set_up(dataclasses.replace(config, init_parts=("encoder",)), 0, 1, None, None, None)
    names = [name for name, value in fewer.model.named_parameters() if torch.equal(value, there.state_dict()[name])]
    assert names
    assert {name.split(".")[0] for name in names if "norm" not in name} >= {"encoder"}
    assert not torch.equal(
        fewer.model.state_dict()["decoder.query_content"], there.state_dict()["decoder.query_content"]
    )


def test_a_run_says_what_it_started_from_and_goes_on_without_it(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the log and in every checkpoint; what is resumed is what would have been trained in one go."""
    whole = tiny(tmp_path / "whole", init=source, max_steps=4)
    train.train(whole)
    assert capsys.readouterr().out.count(f"start: {source}, a model of this project") == 1
    part = dataclasses.replace(whole, output=tmp_path / "part", optim=dataclasses.replace(whole.optim, schedule="step"))
    train.train(dataclasses.replace(part, max_steps=2))
    shutil.rmtree(source)
    capsys.readouterr()
    for changes in ({"init": source}, {"init": None}, {"init": "elsewhere", "init_parts": ("encoder",)}):
        resumed = dataclasses.replace(part, resume=True, **changes)
        train.train(resumed)
        assert f"start: {source}, a model of this project" in capsys.readouterr().out
    start = load_checkpoint(part.output / "checkpoint.pt")["start"]
    assert start.startswith(f"start: {source}, a model of this project")
    uninterrupted = [line["loss"] for line in read_metrics(whole.output / "metrics.jsonl")]
    assert read_metrics(part.output / "metrics.jsonl")[0]["step"] == 2
    assert len(uninterrupted) == 2


def test_published_weights_of_a_backbone_are_not_read_where_others_follow(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("published weights were asked for")

    monkeypatch.setattr("smca.gpu.model.backbone._load_weights", refuse)
    config = tiny(tmp_path / "run", init=source)
    backbone = dataclasses.replace(config.model.backbone, weights="somebody/resnet")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone), max_steps=1)
    set_up(config, 0, 1, None, None, None)
    with pytest.raises(AssertionError, match="published weights were asked for"):
        set_up(dataclasses.replace(config, init_parts=("encoder",)), 0, 1, None, None, None)
    train.train(config)
    train.train(dataclasses.replace(config, resume=True, max_steps=2, resume_changed=True))


def test_a_dry_run_and_a_fast_run_say_what_fits(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_checkpoint(tmp_path / "c.pth", "type3", draw_checkpoint("type3"))
    given = ["--dry-run", "--init", source, "--model.hidden-dim", "32"]
    train.main(["demo", *given, "--model.num-heads", "2"])
    out = capsys.readouterr().out
    assert f"start: {source}, a model of this project: 1 + 2 layers" in out
    assert "  backbone     whole\n" in out
    assert (
        "  encoder      not taken; num_heads is 4 there, 2 here: --model.num-heads 4; feedforward_dim is 32 there"
        in out
    )
    with pytest.raises(ValueError, match="neither backbone nor encoder nor decoder of"):
        train.main(["smca_r50", "--dry-run", "--init", file])
    train.train(tiny(tmp_path / "run", init=source, fast_dev_run=True))
    out = capsys.readouterr().out
    assert out.count(f"start: {source}") == 1
    assert "fast dev run: 3 of 3 steps" in out
    assert not (tmp_path / "run").exists()


def test_parts_are_of_something_and_different(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init_parts must be given together with init, the model that they are of"):
        tiny(tmp_path, init_parts=("encoder",))
    with pytest.raises(ValueError, match="init_parts must be different parts"):
        tiny(tmp_path, init="x", init_parts=("encoder", "encoder"))


def test_a_kept_step_needs_no_source(source: str, tmp_path: Path) -> None:
    """It has the weights themselves."""
    kept = read_json(RunConfig, json.dumps(_plain(tiny(tmp_path, init=source, init_parts=("encoder",)))), "step")
    assert (kept.init, kept.init_parts) == (None, ())


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(
            ["--fsdp"], marks=pytest.mark.skipif(PROCESSES == "2", reason="one more start of torchrun: nightly")
        ),
    ],
)
def test_several_processes_start_from_it_alike(options: list[str], source: str, tmp_path: Path) -> None:
    """And take the steps of one."""
    given = ["demo", "--init", source, "--batch-size", "4", "--workers", "0", "--device", "cpu", "--max-steps", "2"]
    given += ["--synthetic.train-images", "8", "--synthetic.val-images", "2", "--synthetic.image-size", "64"]
    given += ["--model.hidden-dim", "32", "--model.num-queries", "8", "--model.feedforward-dim", "32"]
    given += ["--model.image-short-side", "64", "--augmentation.short-sides", "64", "--optim.warmup-steps", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
    command += [str(Path(train.__file__)), *given, *options, "--output", str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:4000]}\n…\n{done.stderr[-2000:]}"
    assert done.stdout.count(f"start: {source}") == 1
    train.train(train.parse([*given, "--output", str(tmp_path / "one")]))
    one, many = (read_metrics(tmp_path / name / "metrics.jsonl")[-1]["loss"] for name in ("one", "many"))
    assert many == pytest.approx(one, rel=1e-4)
