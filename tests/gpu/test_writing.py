"""Writing of what a run leaves: whole or not at all, and what is said when it fails; metrics of a run that was killed."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from smca.gpu import files
from smca.gpu.config import ModelConfig
from smca.gpu.files import save_checkpoint, write_atomically
from smca.gpu.model import SMCADETR
from smca.gpu.presets import tiny_resnet
from smca.gpu.training.log import RunLog, read_metrics


def test_a_write_that_fails_says_why_and_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: torch.save and plain writes meet it alike."""
    path, large = tmp_path / "checkpoint.pt", torch.zeros(1_000_000)
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (
        lambda: write_atomically(path, lambda file: file.write(large.numpy().tobytes())),
        lambda: save_checkpoint(path, {"model": {"a": large}}),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"could not be written: File too large; [0-9,]+ MB are free in "
            ) as caught:
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(caught.value).startswith(str(path))
        assert path.read_bytes() == b"old"
        assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(OSError, match="could not be written: No such file or directory; there is no folder"):
        write_atomically(tmp_path / "nowhere" / "x", lambda file: file.write(b""))
    with pytest.raises(RuntimeError, match="of another kind"):
        write_atomically(path, lambda file: (_ for _ in ()).throw(RuntimeError("of another kind")))  # type: ignore[misc]
    assert not list(tmp_path.glob("*.partial"))


def test_saved_models_are_whole_and_have_the_usual_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(backbone=tiny_resnet(1), strides=(4,), hidden_dim=8, feedforward_dim=8, num_queries=3)
    model = SMCADETR(config)
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()} == {
        "config.json": 0o640,
        "model.safetensors": 0o640,
    }
    contents = {p: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"model\.safetensors could not be written: No space left on device; "):
        SMCADETR(config).save_pretrained(tmp_path / "model")
    assert {p: p.read_bytes() for p in (tmp_path / "model").iterdir()} == contents


def test_metrics_of_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [{"epoch": e, "step": 2 * e, "loss": 1.5, "ap": None if e == 1 else 0.25} for e in (1, 2, 3)]
    lines = [json.dumps(m) + "\n" for m in whole]
    path.write_text("".join(lines))
    assert read_metrics(path) == whole
    path.write_text("".join(lines)[:-10])
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 3, the last, is cut and is left out"):
        assert read_metrics(path) == whole[:2]
    with pytest.warns(UserWarning, match="is cut"):
        RunLog(tmp_path, 10, first_step=4, main_process=True).__exit__(None, None, None)
    assert path.read_text() == "".join(lines[:2])
    assert not list(tmp_path.glob("*.partial"))
    for bad in ("{", "[1]", '{"epoch": 1}', '{"epoch": "1", "step": 2, "loss": 1, "ap": 0}', "\0\0"):
        path.write_text(lines[0] + bad + "\n" + lines[2])
        with pytest.raises(
            ValueError, match=r"line 2: expected an object with the numbers epoch, step, loss and ap, got "
        ) as caught:
            read_metrics(path)
        assert str(caught.value).startswith(f"{path}, line 2: ")
