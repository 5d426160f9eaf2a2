"""What a training run tells: a progress bar (or plain lines), metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from smca.gpu.config_json import cut
from smca.gpu.files import naming, write_atomically

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
    ) -> None:
        """Open the logs of `output`.

        Args:
            output: the run's folder.
            total_steps: steps of the whole run.
            first_step: steps done already; more than 0 when a run goes on. What the logs have of later ones, from a run that was
                cut off, is dropped.
            main_process: False on processes that must stay silent.
            logged: what ``step`` was given at `first_step`; None if it was not called then.
        """
        self.metrics: list[dict[str, Any]] = []
        self.main_process = main_process
        if not main_process:
            return
        self._path = output / METRICS_FILE
        if first_step and self._path.is_file():
            self.metrics = [m for m in read_metrics(self._path) if m["step"] <= first_step]
        self._write_metrics()
        # TensorBoard drops a point of the very step that a run goes on from, and of every later one.
        with self._naming_the_board():
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step)
        self._draw_step(first_step, logged or {})
        if self.metrics and self.metrics[-1]["step"] == first_step:
            self._draw_evaluation(self.metrics[-1])
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.2f} · AP {task.fields[ap]} · {task.fields[speed]:.1f} images/s ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        ap = f"{self.metrics[-1]['ap']:.3f}" if self.metrics and self.metrics[-1]["ap"] is not None else "–"
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, loss=float("nan"), ap=ap, speed=0.0
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
            # An error on the way out must not take the place of the one that ends the run.
            with contextlib.suppress(OSError) if error is not None else self._naming_the_board():
                self._board.close()

    def step(self, description: str, step: int, values: Mapping[str, float], images_per_second: float) -> None:
        """After a logged step: move the bar, write `values`, the terms of the loss and the rate, to TensorBoard."""
        if not self.main_process:
            return
        self._progress.update(
            self._task, description=description, completed=step, loss=values["loss"], speed=images_per_second
        )
        self._draw_step(step, values)

    def _draw_step(self, step: int, values: Mapping[str, float]) -> None:
        with self._naming_the_board():
            for name, value in values.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def _draw_evaluation(self, metrics: Mapping[str, Any]) -> None:
        with self._naming_the_board():
            for name, value in metrics.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"eval/{name}", value, metrics["step"])

    def _naming_the_board(self) -> AbstractContextManager[None]:
        """TensorBoard writes in a thread of its own, whose error comes out at a later call, without a name."""
        return naming(self._path.parent / "tensorboard")

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(m) + "\n" for m in self.metrics)
        write_atomically(self._path, lambda file: file.write(lines.encode()))

    def flush(self) -> None:
        """Put everything on disk: before a checkpoint, after which it is not told again."""
        if self.main_process:
            with self._naming_the_board():
                self._board.flush()

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """After an evaluation: one line on the terminal, one in metrics.jsonl, one point in TensorBoard."""
        if not self.main_process:
            return
        self.metrics.append(metrics)
        self._write_metrics()
        shown = {k: "–" if metrics[k] is None else f"{metrics[k]:.3f}" for k in ("ap", "ap50")}
        self._progress.update(self._task, ap=shown["ap"])
        self.say(
            f"epoch {metrics['epoch']:4d}  step {metrics['step']:6d}  loss {metrics['loss']:7.3f}  AP {shown['ap']}  "
            f"AP50 {shown['ap50']}  {metrics['images_per_second']:6.1f} images/s  {metrics['train_seconds']:6.0f} s of training"
        )
        self._draw_evaluation(metrics)

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
