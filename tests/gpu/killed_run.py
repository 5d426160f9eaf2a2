"""Trains, is killed, and says so: a process for test_resume.py that forks a child for each line of its input.

A line is a JSON list [output folder, number of loader workers, how the child ends]. The end is a number of seconds after which it
is killed, or [name, n]: it kills itself where it calls `name` of MOMENTS for the n-th time; or null. Answers each with a line:
the child's exit status, below 0 for the signal that ended it, and the seconds that it took. A file beside the output folder, of its
name and ".steps", has a byte for each step that was taken in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smca.gpu import train
from smca.gpu.training import priors, step
from smca.gpu.training.log import RunLog
from tiny_run import tiny

MOMENTS: dict[str, tuple[Any, str]] = {
    "between the optimiser and the average": (step, "update_average"),
    "in a write, before it is on disk": (os, "fsync"),
    "before a file takes its place": (os, "replace"),
    "in an evaluation": (train, "evaluate_detections"),
    "after the metrics, before TensorBoard": (RunLog, "_draw_evaluation"),
    "before the last pictures": (train, "draw_run"),
}


def config_of(output: str, workers: int) -> Any:
    """Three epochs of six steps, with all that draws random numbers or has a state of its own; a checkpoint after every step."""
    run = tiny(Path(output), epochs=3, workers=workers, batch_size=2, checkpoint_every=0.0, restartable=True)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, dropout=0.1),
        optim=dataclasses.replace(run.optim, ema_decay=0.9, lr=2e-3, backbone_lr=2e-3),
        augmentation=dataclasses.replace(run.augmentation, zoom=(0.7, 1.0)),
    )


def killed_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose call number `call` kills this process."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def counting(steps: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which each call adds a byte to the file `steps`."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        os.write(steps, b".")
        return function(*args, **kwargs)

    return counted


def child(output: str, workers: int, end: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    steps = os.open(f"{output}.steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    priors.draw_priors = lambda *given: Image.new("RGB", (8, 8)).save(given[-1], "PNG")  # in a hundredth of the time
    step.update_average = counting(steps, step.update_average)
    if isinstance(end, list):
        owner, name = MOMENTS[end[0]]
        setattr(owner, name, killed_at(end[1], getattr(owner, name)))
    train.train(config_of(output, workers))


def main() -> None:
    for line in sys.stdin:
        output, workers, end = json.loads(line)
        start = time.monotonic()
        process = os.fork()
        if not process:
            status = 1
            try:
                child(output, workers, end)
                status = 0
            finally:
                os._exit(status)
        if isinstance(end, float | int):
            time.sleep(end)
            os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps([status, time.monotonic() - start]), flush=True)


if __name__ == "__main__":
    main()
