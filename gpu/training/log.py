"""What a training run tells: a progress bar (or plain lines), metrics.jsonl, trackers such as TensorBoard."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from smca.gpu.config_json import cut
from smca.gpu.files import write_atomically
from smca.gpu.training.priors import PRIORS_PICTURE, numbers_at
from smca.gpu.training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Reports one run; silent on every process but the first."""

    def __init__(
        self,
        output: Path,
        total_steps: int,
        *,
        first_step: int,
        main_process: bool,
        logged: Mapping[str, float] | None = None,
        trackers: Sequence[Tracker] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the logs of `output`.

        Args:
            output: the run's folder.
            total_steps: steps of the whole run.
            first_step: steps done already; more than 0 when a run goes on. What the logs have of later ones, from a run that was
                cut off, is dropped.
            main_process: False on processes that must stay silent.
            logged: what ``step`` was given at `first_step`; None if it was not called then.
            trackers: are told everything, too.
            settings: of the run, as plain values, for the trackers.
        """
        self.metrics: list[dict[str, Any]] = []
        self.main_process, self._warned = main_process, False
        if not main_process:
            return
        self._path = output / METRICS_FILE
        if first_step and self._path.is_file():
            self.metrics = [m for m in read_metrics(self._path) if m["step"] <= first_step]
        self._write_metrics()
        self._console = Console()
        self._trackers = list(trackers)
        self._tell("start", first_step, settings or {})
        self._draw_step(first_step, logged or {})
        if self.metrics and self.metrics[-1]["step"] == first_step:
            self._draw_evaluation(self.metrics[-1])
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn(
                "loss {task.fields[loss]:.2f} · AP {task.fields[ap]} · {task.fields[speed]:.1f} images/s · "
                "{task.fields[waiting]:.0%} waiting for images ·"
            ),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        ap = f"{self.metrics[-1]['ap']:.3f}" if self.metrics and self.metrics[-1]["ap"] is not None else "–"
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, loss=float("nan"), ap=ap, speed=0.0, waiting=0.0
        )

    def __enter__(self) -> RunLog:
        if self.main_process:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.main_process:
            self._progress.stop()
            self._tell("finish", kind is not None)

    def step(
        self, description: str, step: int, values: Mapping[str, float], images_per_second: float, waiting: float
    ) -> None:
        """After a logged step: move the bar, tell trackers `values`, the terms of the loss and the rate.

        waiting: the share of the epoch's time so far in which steps waited for images.
        """
        if not self.main_process:
            return
        shown: dict[str, Any] = {"loss": values["loss"], "speed": images_per_second, "waiting": waiting}
        self._progress.update(self._task, description=description, completed=step, **shown)
        self._draw_step(step, values)

    def _draw_step(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self._tell("log", {f"train/{name}": value for name, value in values.items()}, step)

    def _draw_evaluation(self, metrics: Mapping[str, Any]) -> None:
        step, folder = metrics["step"], self._path.parent
        numbers = {f"eval/{name}": value for name, value in metrics.items() if isinstance(value, float)}
        priors = numbers_at(folder, step)
        self._tell("log", {**numbers, **priors}, step)
        if priors and (folder / PRIORS_PICTURE).is_file():
            self._tell("picture", "priors", folder / PRIORS_PICTURE, step)

    def _tell(self, what: str, *values: Any) -> None:
        """Call a method of every tracker; one that fails is left alone from then on. Not every tracker takes pictures."""
        for tracker in tuple(self._trackers):
            if what == "picture" and not hasattr(tracker, what):
                continue
            try:
                getattr(tracker, what)(*values)
            except Exception as error:  # whatever the tool of others raises
                self._trackers.remove(tracker)
                name = type(tracker).__name__.strip("_")
                self.say(
                    f"warning: {name} is told nothing more, since it failed ({type(error).__name__}: {cut(error)})"
                )

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(m) + "\n" for m in self.metrics)
        write_atomically(self._path, lambda file: file.write(lines.encode()))

    def flush(self) -> None:
        """Put everything on disk: before a checkpoint, after which it is not told again."""
        if self.main_process:
            self._tell("flush")

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """After an evaluation: one line on the terminal, one in metrics.jsonl, one point for each tracker."""
        if not self.main_process:
            return
        self.metrics.append(metrics)
        self._write_metrics()
        shown = {k: "–" if metrics[k] is None else f"{metrics[k]:.3f}" for k in ("ap", "ap50")}
        self._progress.update(self._task, ap=shown["ap"])
        waiting = metrics["data_seconds"] / metrics["train_seconds"] if metrics["train_seconds"] else 0.0
        self.say(
            f"epoch {metrics['epoch']:4d}  step {metrics['step']:6d}  loss {metrics['loss']:7.3f}  AP {shown['ap']}  "
            f"AP50 {shown['ap50']}  {metrics['images_per_second']:6.1f} images/s  {metrics['train_seconds']:6.0f} s of training, "
            f"{waiting:.0%} of it waiting for images"
        )
        self._draw_evaluation(metrics)

    def warn_of_waiting(self, share: float, workers: int, cache: bool) -> None:
        """Once: for this share of an epoch steps waited for images."""
        if not self._warned:
            remedy = "" if cache else "; --cache-images keeps decoded images in memory"
            self.say(
                f"warning: for {share:.0%} of the epoch training waited for images, which come from "
                + (f"{workers} processes" if workers else "the training process itself")
                + f": --workers {max(2 * workers, 4)} loads more of them at a time, as far as there are CPU cores{remedy}"
            )
        self._warned = True

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.main_process:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl. A last line that is cut, as by the end of the run, is left out with a warning.

    Raises:
        ValueError: another line is not an evaluation; names it.
    """
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    metrics = []
    for number, line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and _is_evaluation(values):
            metrics.append(values)
        elif number == lines[-1][0]:
            warnings.warn(f"{path}: line {number}, the last, is cut and is left out", stacklevel=2)
        else:
            raise ValueError(
                f"{path}, line {number}: expected an object with the numbers epoch, step, loss and ap, "
                f"got {cut(line.decode(errors='replace'))}: correct or remove the line"
            )
    return metrics


def _is_evaluation(values: dict[str, Any]) -> bool:
    """AP is None where there is nothing to find."""
    numbers = [values.get(key) for key in ("epoch", "step", "loss")]
    return all(isinstance(v, int | float) for v in numbers) and isinstance(values.get("ap", ""), int | float | None)
