"""A run that is killed at any moment and resumed is, bit for bit, the run that was never interrupted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smca.gpu.training.log import read_metrics

KILLS = int(os.environ.get("SMCA_KILLS", "1"))
"""At random moments, for each of two numbers of workers; the nightly profile has a hundred."""
SCRIPT = Path(__file__).with_name("killed_run.py")


class Runner:
    """Runs of killed_run.py, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, output: Path, workers: int, end: Any = None) -> tuple[int, float]:
        """(exit status, seconds) of one."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(output), workers, end]) + "\n")
        self.process.stdin.flush()
        status, seconds = json.loads(self.process.stdout.readline())
        return status, seconds


@pytest.fixture(scope="module")
def runs() -> Iterator[Runner]:
    """A process that has imported everything, and forks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Runner(process)
        finally:
            process.kill()


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "second" not in name}


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points that TensorBoard shows, by tag."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "second" not in tag
    }


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves but times and pictures, by name: tensors, numbers, bytes."""
    state = without_times(torch.load(folder / "checkpoint.pt", weights_only=True))
    flat: dict[str, Any] = {}

    def flatten(value: Any, name: str) -> None:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
        )
        if items is None:
            flat[name] = value
        for key, item in items or ():
            flatten(item, f"{name}/{key}")

    flatten({k: v for k, v in state.items() if k not in ("settings", "job")}, "checkpoint")
    flatten([without_times(line) for line in read_metrics(folder / "metrics.jsonl")], "metrics")
    flatten(board(folder), "board")
    for file in (
        "priors.jsonl",
        "model/model.safetensors",
        "model/config.json",
        "model_last/model.safetensors",
        "model_last/config.json",
    ):
        flat[file] = (folder / file).read_bytes()
    return flat


def require_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        assert same, f"{name}: {str(got[name])[:200]} for {str(value)[:200]}"


@pytest.fixture(scope="module")
def whole(runs: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What the uninterrupted run leaves, without workers, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    status, seconds = runs.run(folder, 0)
    assert status == 0
    found = contents(folder)
    assert len([name for name in found if re.fullmatch(r"metrics/\d+/ap", name)]) == 3
    assert found["checkpoint/step"] == 18
    assert [step for step, _ in board(folder)["train/loss"]] == [10]
    return found, seconds


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_at_random_moments_is_the_run_that_never_was(
    workers: int, runs: Runner, whole: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    expected, seconds = whole
    rng = random.Random(workers)
    kills = finished = taken = 0
    while kills < KILLS or not finished:
        folder = tmp_path / str(finished)
        while kills < KILLS:
            status, _ = runs.run(folder, workers, rng.uniform(0.0, 0.6 * seconds))
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
        status, _ = runs.run(folder, workers)
        assert status == 0
        require_same(contents(folder), expected)
        finished += 1
        taken += folder.with_name(f"{folder.name}.steps").stat().st_size
    lost = taken - finished * expected["checkpoint/step"]
    print(f"{kills} kills in {finished} runs, {workers} workers: {lost} steps taken twice")
    assert lost <= kills  # a checkpoint follows each step


@pytest.mark.parametrize(
    "moments",
    [
        [
            ("between the optimiser and the average", (1, 4)),
            ("in a write, before it is on disk", (1, 4, 7)),
            ("before a file takes its place", (1, 3, 5, 6)),
        ],
        [
            ("in an evaluation", (1, 2)),
            ("after the metrics, before TensorBoard", (2,)),
            ("before the last pictures", (1,)),
        ],
    ],
    ids=["steps", "evaluations"],
)
def test_a_run_killed_at_the_worst_moments_is_too(
    moments: list[tuple[str, tuple[int, ...]]], runs: Runner, whole: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    """Each time at the call of that number, counted from where the run goes on."""
    for moment, calls in moments:
        for call in calls:
            status, _ = runs.run(tmp_path, 0, [moment, call])
            assert status == -signal.SIGKILL, f"{moment}, call {call}: it is never reached"
    assert runs.run(tmp_path, 0)[0] == 0
    require_same(contents(tmp_path), whole[0])
