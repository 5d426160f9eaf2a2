"""--max-minutes: a run that is given its time in pieces."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from smca.gpu import train
from smca.gpu.training.log import read_metrics
from tiny_run import tiny


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if "second" not in name}


def test_a_run_in_pieces_of_one_step_learns_what_the_whole_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each start takes one step, and leaves an evaluation and a model; one is ended in that evaluation."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train.train(tiny(whole, batch_size=6, max_minutes=60))
    assert "minutes are over" not in capsys.readouterr().out
    config = tiny(pieces, batch_size=6, max_minutes=1e-6, restartable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_detections", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(config)
    for step in range(2, 5):
        train.train(config)
        said = " ".join(capsys.readouterr().out.split())
        ended = f"ended at step {step} of 4: 1e-06 minutes are over (--max-minutes); `smca train … --resume` goes on"
        assert (ended in said) == (step < 4)
        assert ("done: AP" in said) == (step == 4)
        assert (f"ended after {step} of 4 steps: AP" in said) == (step < 4)
        assert (pieces / "model/model.safetensors").is_file()
    lines = read_metrics(pieces / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "extra" in line] == [1, 3]
    planned = [without_times(line) for line in lines if "extra" not in line]
    assert planned == [without_times(line) for line in read_metrics(whole / "metrics.jsonl")]
    for name in ("model_last/model.safetensors", "model_last/config.json"):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes()


def test_evaluations_at_the_end_of_the_time_are_nothing_to_lose_patience_over(tmp_path: Path) -> None:
    run: Any = types.SimpleNamespace(config=tiny(tmp_path, patience=2), step=5)
    aps = [(3, 0.5, False), (4, 0.9, True), (5, 0.1, True), (6, 0.2, False), (7, 0.2, True)]
    lines = [{"step": step, "ap": ap, **({"extra": True} if extra else {})} for step, ap, extra in aps]
    log: Any = types.SimpleNamespace(metrics=lines, say=lambda text: None)
    assert not train._is_patience_over(run, log)
    lines.append({"step": 9, "ap": 0.3})
    assert train._is_patience_over(run, log)


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_minutes must be positive, got 0"):
        tiny(tmp_path, max_minutes=0)
