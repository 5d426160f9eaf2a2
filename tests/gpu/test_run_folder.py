"""What a run leaves in its folder, whatever ends it: what is saved is what the log says, and what is resumed is the same run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from smca.datasets import AnnotationOptions, SyntheticShapes
from smca.gpu import train
from smca.gpu.evaluation import detect, evaluate_detections, evaluation_loader
from smca.gpu.model import SMCADETR
from smca.gpu.training.log import read_metrics
from smca.gpu.training.resume import differences, settings_of
from smca.gpu.training.stop import StoppedError
from tiny_run import tiny


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name
    }


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Let the optimiser's step number `steps` + 1 raise."""
    taken = 0
    step = torch.optim.AdamW.step

    def counted(self: Any, *args: Any) -> Any:
        nonlocal taken
        if taken == steps:
            raise error
        taken += 1
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)


def test_the_log_the_saved_model_and_the_best_model_have_one_ap(tmp_path: Path) -> None:
    """To the last digit, read back from disk and evaluated in batches of another size."""
    config = tiny(tmp_path, epochs=3, optim=dataclasses.replace(tiny(tmp_path).optim, lr=3e-3, backbone_lr=3e-3))
    train.train(config)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    best = max(lines, key=lambda line: line["ap"])
    assert best["ap"] > 0
    data = SyntheticShapes(config.synthetic.val_images, 1, image_size=64)
    for folder, line in (("model_last", lines[-1]), ("model", best)):
        model = SMCADETR.from_pretrained(tmp_path / folder)
        results = detect(model, evaluation_loader(data, model.config, batch_size=5, workers=0))
        assert evaluate_detections(data.ground_truth(), results).ap == pytest.approx(line["ap"], abs=1e-6)


def test_which_evaluation_is_the_best_is_a_setting_and_patience_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an AP that rises, falls and would rise again, and an AP50 that is highest first; across a resumption."""
    aps = [(0.1, 0.9), (0.3, 0.2), (0.2, 0.3), (0.2, 0.1), (0.8, 0.1)]

    def evaluated(*_: Any, of_all: Any = train.evaluate_detections) -> Any:
        epoch = len(read_metrics(folder / "metrics.jsonl"))
        shutil.copytree(folder / "model_last", folder / "seen" / str(3 * epoch + 3))
        metrics = of_all(*_)
        return dataclasses.replace(metrics, ap=aps[epoch][0], ap50=aps[epoch][1])

    monkeypatch.setattr(train, "evaluate_detections", evaluated)
    for best_by, steps, best in (("ap", [3, 6, 9, 12], 6), ("ap50", [3, 6, 9], 3)):
        folder = tmp_path / best_by
        config = tiny(folder, epochs=5, patience=2, best_by=best_by)
        with pytest.MonkeyPatch.context() as patch:
            signal_in_step(8, patch, signal.SIGTERM)
            with pytest.raises(StoppedError):
                train.train(config)
        train.train(dataclasses.replace(config, resume=True))
        said = " ".join(capsys.readouterr().out.split())
        assert f"ended at step {steps[-1]}: 2 evaluations in a row without a better one (--patience 2)" in said
        assert f"the best, {best_by.upper()} {aps[best // 3 - 1][best_by == 'ap50']:.3f} after step {best}" in said
        assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == steps
        for name, step in (("model", best), ("model_last", steps[-1])):
            saved = (folder / "seen" / str(step) / "model.safetensors").read_bytes()
            assert (folder / name / "model.safetensors").read_bytes() == saved


def test_a_model_and_a_checkpoint_are_on_disk_before_the_first_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("a picture that cannot be read")

    monkeypatch.setattr(train, "detect", fail)
    with pytest.raises(ValueError, match="cannot be read"):
        train.train(tiny(tmp_path))
    assert {"model_last/config.json", "model_last/model.safetensors", "checkpoint.pt"} <= files(tmp_path)
    trained = load_file(tmp_path / "model_last/model.safetensors")
    monkeypatch.undo()
    train.train(tiny(tmp_path, resume=True))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2], "the evaluation that failed is made up for"
    whole = tmp_path / "whole"
    train.train(tiny(whole))
    without_time = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    assert without_time == [
        {k: v for k, v in line.items() if "second" not in k} for line in read_metrics(whole / "metrics.jsonl")
    ]
    assert trained.keys() == load_file(whole / "model_last/model.safetensors").keys()


def signal_in_step(number: int, monkeypatch: pytest.MonkeyPatch, *signals: signal.Signals) -> None:
    """Let signals come in the middle of the step that is the run's `number`-th."""
    taken = 0
    step = torch.optim.AdamW.step

    def counted(self: Any, *args: Any) -> Any:
        nonlocal taken
        taken += 1
        for each in signals if taken == number else ():
            signal.raise_signal(each)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)


@pytest.mark.parametrize(("stopped_at", "by"), [(3, signal.SIGINT), (4, signal.SIGHUP), (6, signal.SIGTERM)])
def test_a_stopped_run_loses_nothing(
    tmp_path: Path,
    stopped_at: int,
    by: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three steps make an epoch, six the run: stopped within an epoch, and at the end of one, which is not yet evaluated."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.train(tiny(whole))
    signal_in_step(stopped_at, monkeypatch, by)
    before = signal.getsignal(by)
    with pytest.raises(StoppedError) as error:
        train.train(tiny(stopped))
    assert signal.getsignal(by) is before
    monkeypatch.undo()
    assert error.value.status == 128 + by
    said = " ".join(capsys.readouterr().out.split())
    assert f"stopped by {by.name} at step {stopped_at}: everything is saved" in said
    for source in (stopped / "checkpoint.pt", stopped, stopped / "model_last"):
        SMCADETR.from_pretrained(source)
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] == stopped_at
    train.train(tiny(stopped, resume=True))
    for name, tensor in load_file(whole / "model_last/model.safetensors").items():
        assert torch.equal(tensor, load_file(stopped / "model_last/model.safetensors")[name]), name
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (whole, stopped)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


def test_a_second_signal_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal_in_step(2, monkeypatch, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM"):
        train.train(tiny(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped by SIGTERM at step 1: saved is step 0; `smca train … --resume` goes on from there" in said


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_in_step(1, monkeypatch, signal.SIGHUP)
        train.train(tiny(tmp_path, max_steps=1))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_scheduler_ends_the_whole_job(tmp_path: Path) -> None:
    """SIGTERM to all processes, those that load images too: the step is finished, and the exit status says what ended it."""
    options = ["demo", "--synthetic.image-size", "64", "--synthetic.val-images", "2", "--batch-size", "2"]
    options += ["--workers", "2", "--device", "cpu", "--output", str(tmp_path), "--checkpoint-every", "0"]
    with subprocess.Popen(
        [sys.executable, train.__file__, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while (
                process.poll() is None and not (tmp_path / "checkpoint.previous.pt").exists()
            ):  # that of the first step
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143, err[-2000:]
    assert re.search(r"stopped by SIGTERM at step \d+: everything is saved", " ".join(out.split())), out
    assert err.strip() == "stopped"


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_named(tmp_path: Path, damage: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        train.train(tiny(folder))
    path = cut / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    named = "checkpoint.pt is damaged" if damage == "cut" else "there is no .*checkpoint.pt"
    with pytest.warns(UserWarning, match=rf"{named}.* Going on from the one before it, .*previous.pt, of step 3"):
        train.train(tiny(cut, resume=True))
    expected, got = (load_file(folder / "model_last/model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    for file in cut.glob("checkpoint*.pt"):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        train.train(tiny(cut, resume=True))


def test_a_command_that_is_given_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, restartable=True)
    signal_in_step(2, monkeypatch, signal.SIGTERM)
    with pytest.raises(StoppedError):
        train.train(config)
    monkeypatch.undo()
    train.train(config)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3, 6]
    with pytest.raises(ValueError, match="restartable must be given without resume and overwrite"):
        tiny(tmp_path, restartable=True, overwrite=True)


@pytest.mark.parametrize(("job", "first"), [("this", 2), ("another", 0)])
def test_what_torchrun_restarts_goes_on_but_not_with_another_jobs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, first: int
) -> None:
    """With --overwrite, which may have failed before it replaced anything."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(2, patch, signal.SIGTERM)
        with pytest.raises(StoppedError):
            train.train(tiny(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    seeded: list[int] = []
    monkeypatch.setattr(train, "seed_step", lambda device, seed, step, rank: seeded.append(step))
    train.train(tiny(tmp_path, overwrite=True))
    assert seeded == list(range(first, 6))


def test_overwrite_removes_what_it_replaces_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(tiny(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model" / "mine.txt").write_text("mine")
    old = (tmp_path / "checkpoint.pt").read_bytes()
    stop_after(0, monkeypatch)
    other = tiny(tmp_path, overwrite=True, seed=5)
    with pytest.raises(KeyboardInterrupt):
        train.train(other)
    monkeypatch.undo()
    assert files(tmp_path) == {"checkpoint.pt", "metrics.jsonl", "notes.txt", "model/mine.txt"}
    assert (tmp_path / "checkpoint.pt").read_bytes() != old
    assert len(list((tmp_path / "tensorboard").glob("*"))) == 1
    train.train(dataclasses.replace(other, overwrite=False, resume=True))
    train.train(tiny(tmp_path / "fresh", seed=5))
    resumed, fresh = (load_file(folder / "model_last/model.safetensors") for folder in (tmp_path, tmp_path / "fresh"))
    assert all(torch.equal(resumed[name], fresh[name]) for name in fresh), "nothing of the old run came back"


def test_a_mistake_leaves_the_old_run_alone(tmp_path: Path) -> None:
    train.train(tiny(tmp_path))
    before = files(tmp_path)
    with pytest.raises(FileNotFoundError):
        train.train(tiny(tmp_path, overwrite=True, data=str(tmp_path / "nowhere")))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 2}, "--batch-size is 2, was 4"),
        ({"seed": 3}, "--seed is 3, was 0"),
        ({"accumulate": 2}, "--accumulate is 2, was 1"),
        ({"epochs": 4}, "--epochs is 4, was 2"),
        ({"max_steps": 5}, "--max-steps is 5, was None"),
        ({"precision": "bf16"}, "--precision is 'bf16', was 'fp32'"),
        ({"optim": {"weight_decay": 0.5}}, "--optim.weight-decay is 0.5, was 0.0001"),
        ({"optim": {"optimizer": "adamw"}}, "--optim.optimizer is 'adamw', was 'muon'"),
        ({"loss": {"giou_weight": 9.0}}, "--loss.giou-weight is 9.0, was 2.0"),
        ({"augmentation": {"zoom": (0.5, 1.0)}}, r"--augmentation.zoom is \[0.5, 1.0\], was \[1.0, 1.0\]"),
        ({"synthetic": {"train_images": 16}}, "the training images or their boxes are others .*16 images.*12 images"),
        ({"synthetic": {"max_objects": 2}}, "the held-out images or their boxes are others"),
        ({"model": {"num_queries": 9}}, "--model.num-queries is 9, was 8"),
    ],
    ids=str,
)
def test_other_settings_are_seen_on_resume(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    config = tiny(tmp_path, max_steps=None)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(0, patch)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
    inner = {k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=named) as refused:
        train.train(dataclasses.replace(config, resume=True, **inner))
    assert ("--resume-changed" in str(refused.value)) == ("model" not in changes)


def test_settings_that_change_nothing_of_what_is_learned_may_differ(tmp_path: Path) -> None:
    train.train(tiny(tmp_path))
    train.train(tiny(tmp_path, resume=True, eval_every=2, eval_batch_size=3, cache_images=False))


def test_parts_of_a_step_are_no_change_where_norms_do_not_learn(tmp_path: Path) -> None:
    for frozen in (False, True):
        config = tiny(tmp_path)
        backbone = dataclasses.replace(config.model.backbone, frozen_norm=frozen)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
        parts = dataclasses.replace(config, accumulate=2)
        assert differences(settings_of(config), settings_of(parts)) == ["--accumulate is 2, was 1"] * (not frozen)


def test_changed_settings_hold_from_then_on(tmp_path: Path) -> None:
    train.train(tiny(tmp_path, epochs=1))
    optim = dataclasses.replace(tiny(tmp_path).optim, weight_decay=0.5, lr=1e-3)
    train.train(tiny(tmp_path, epochs=2, resume=True, resume_changed=True, optim=optim))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups if "weight_decay" in group] == [0.5, 0.5], "Muon's have none"
    assert state["settings"]["optim"]["lr"] == 1e-3
    train.train(tiny(tmp_path, epochs=2, resume=True, optim=optim))  # which are now the run's own


def test_longer_training_at_a_constant_rate_is_no_change(tmp_path: Path) -> None:
    optim = dataclasses.replace(tiny(tmp_path).optim, schedule="step")
    train.train(tiny(tmp_path, epochs=1, optim=optim))
    train.train(tiny(tmp_path, epochs=2, optim=optim, resume=True))
    assert [line["epoch"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


# Data


def coco(root: Path) -> Path:
    for split, count, seed in (("train", 8, 0), ("val", 4, 1)):
        SyntheticShapes(count, seed, image_size=64).export_coco(root, split)  # type: ignore[arg-type]
    return root


def edit(file: Path, change: Any) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    root = coco(tmp_path / "data")
    edit(root / "annotations/train.json", lambda data: data.update(annotations=[]))
    with pytest.raises(ValueError, match=r"no box to train on \(training images: 8 images \(8 empty\)"):
        train.train(tiny(tmp_path / "run", data=str(root)))
    assert not (tmp_path / "run").exists()
    edit(root / "annotations/val.json", lambda data: data.update(annotations=[]))
    with pytest.raises(ValueError, match="no box to train on"):
        train.train(tiny(tmp_path / "run", data=str(root)))


def test_a_bad_held_out_image_is_found_before_training(tmp_path: Path) -> None:
    root = coco(tmp_path / "data")
    Image.new("RGB", (60, 60)).save(root / "val/000003.png")
    with pytest.raises(ValueError, match=r"000003\.png is 60×60 pixels"):
        train.train(tiny(tmp_path / "run", data=str(root)))
    assert not (tmp_path / "run").exists()


def test_files_named_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco(tmp_path / "data")
    (root / "annotations/train.json").rename(tmp_path / "a.json")
    (root / "val").rename(tmp_path / "pictures")
    edit(tmp_path / "a.json", lambda data: [a.update(iscrowd=1) for a in data["annotations"]])
    config = tiny(
        tmp_path / "run",
        data=str(root),
        train_json=tmp_path / "a.json",
        train_images=root / "train",
        val_images=tmp_path / "pictures",
        max_steps=1,
    )
    with pytest.raises(ValueError, match=r"a\.json: all .* --annotations.crowd objects"):
        train.train(config)
    train.train(dataclasses.replace(config, annotations=AnnotationOptions(crowd="objects")))
    advice = (
        f"smca evaluate {tmp_path}/run/model --data {root} --images {tmp_path}/pictures --annotations.crowd objects"
    )
    assert advice in " ".join(capsys.readouterr().out.split())


def test_options_have_the_names_that_messages_give_them(tmp_path: Path) -> None:
    options = ["--train-json", "a.json", "--train-images", "a", "--val-json", "b.json", "--val-images", "b"]
    options += ["--annotations.frame", "stored", "--annotations.box-format", "cxcywh-fractions"]
    options += ["--annotations.crowd", "objects", "--annotations.sizes", "scaled", "--resume", "--resume-changed"]
    config = train.parse(["small", *options])
    assert config.annotations == AnnotationOptions("stored", "cxcywh-fractions", "objects", "scaled")
    assert (config.train_json, config.val_images, config.resume_changed) == (Path("a.json"), Path("b"), True)
    with pytest.raises(SystemExit):
        train.parse(["small", "--resume-changed"])
