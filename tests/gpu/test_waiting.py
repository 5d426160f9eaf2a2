"""Training says when images are what it waits for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from smca.datasets import Sample, SyntheticShapes
from smca.gpu import train
from smca.gpu.training.log import RunLog, read_metrics
from tiny_run import tiny


class Slow(SyntheticShapes):
    """Images that take a tenth of a second each."""

    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.1)
        return super().__getitem__(index)


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_a_run_that_waits_for_images_says_so(slow: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = (Slow if slow else SyntheticShapes)(11, 0, image_size=64)
    train.train(tiny(tmp_path, epochs=1, batch_size=1, cache_images=False), train_data=images)
    said = " ".join(capsys.readouterr().out.split())
    warning = "of the epoch training waited for images, which come from the training process itself: --workers 4 loads"
    assert said.count(warning) == slow
    assert ("--cache-images keeps" in said) == slow
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    share = line["data_seconds"] / line["train_seconds"]
    assert (share > 1 / 3) == slow, f"{share:.0%}"
    assert f"{share:.0%} of it waiting for images" in said


def test_it_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 1, first_step=0, main_process=True) as log:
        for _ in range(2):
            log.warn_of_waiting(0.5, 3, True)
    (said,) = capsys.readouterr().out.splitlines()
    assert (
        "for 50% of the epoch training waited for images, which come from 3 processes: --workers 6 loads more" in said
    )
    assert "--cache-images" not in said


def test_waiting_counts_what_is_waited_for_and_nothing_else() -> None:
    """Each wait is up to the batch, not what is done with it."""

    def batches() -> Any:
        for number in range(4):
            time.sleep(0.02)
            yield number

    waits: list[float] = []
    for _ in train._in_parts(batches(), 2, waits):
        time.sleep(0.1)
    assert len(waits) == 2
    assert all(0.04 <= wait < 0.1 for wait in waits)
