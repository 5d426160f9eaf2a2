"""Where a run is told as it goes, beside its own metrics.jsonl: TensorBoard, W&B, MLflow, trackio, or one's own ``Tracker``.

A run that goes on after it was stopped or killed goes on in the same place, whose name is kept in the run's folder. What it tells a
second time, since its last checkpoint, are the same numbers for the same steps. TensorBoard drops the first, W&B drops the second,
MLflow is asked what it has; trackio keeps both.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from smca.datasets.settings import shortened
from smca.gpu.files import write_atomically

TRACKERS_FILE = "trackers.json"
"""Of a run's folder: what each tracker calls the run."""
PROJECT = "smca-detr"
"""Name of the project that W&B and trackio put runs into; WANDB_PROJECT and TRACKIO_PROJECT say otherwise."""
_LONGEST_PARAMETER = 250
"""Characters of a setting that any version of MLflow takes."""


class Tracker(Protocol):
    """What a run tells, on its first process. What raises an error is told nothing more; training goes on.

    One that has a method ``picture(name: str, path: Path, step: int)`` is told of each picture, too: of priors.png, whenever it was
    drawn anew.
    """

    def start(self, first_step: int, settings: Mapping[str, Any]) -> None:
        """Before the first point.

        Args:
            first_step: steps done already; more than 0 when a run goes on, from where it tells everything again.
            settings: the run's configuration, as plain values, nested.
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """After some steps: "train/…", the terms of the loss and the rate. After an evaluation: "eval/…", its numbers, and
        "priors/…", where the queries' Gaussians are and how wide (``smca.gpu.training.priors``)."""

    def flush(self) -> None:
        """Before a checkpoint, after which nothing of before is told again: put everything on disk."""

    def finish(self, failed: bool) -> None:
        """At the end of this start; failed: by an error or a signal."""


class _TensorBoard:
    """Files in the run's folder."""

    def __init__(self, output: Path) -> None:
        self._folder = output / "tensorboard"

    def start(self, first_step: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops a point of the very step that a run goes on from, and of every later one.
        self._board = SummaryWriter(str(self._folder), purge_step=first_step)
        if first_step == 0:
            self._board.add_text(
                "settings", "\n".join(f"    {name}: {value}" for name, value in flat(settings).items())
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        self._board.flush()

    def finish(self, failed: bool) -> None:
        self._board.close()


class _Wandb:
    """W&B; or trackio, which has its functions, but knows a run by its name."""

    def __init__(self, output: Path, tool: str) -> None:
        self._output, self._tool = output, tool

    def start(self, first_step: int, settings: Mapping[str, Any]) -> None:
        known = _names_in(self._output).get(self._tool) or uuid.uuid4().hex[:8]
        _keep_name(self._output, self._tool, known)
        options: dict[str, Any] = {"name": f"{self._output.name}-{known}"}
        if self._tool == "wandb":
            options |= {"id": known, "dir": str(self._output), "allow_val_change": True}
        project = os.environ.get(f"{self._tool.upper()}_PROJECT", PROJECT)
        module = importlib.import_module(self._tool)
        self._run = module.init(project=project, config=dict(settings), resume="allow", **options)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Both write in a process or thread of their own."""

    def finish(self, failed: bool) -> None:
        if self._tool == "wandb":
            self._run.finish(exit_code=int(failed))
        else:
            self._run.finish()


class _MLflow:
    """MLflow, wherever MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def start(self, first_step: int, settings: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        known = _names_in(self._output).get("mlflow")
        run = self._mlflow.start_run(run_id=known, run_name=None if known else self._output.name)
        self._id, self._goes_on = run.info.run_id, known is not None
        self._last: dict[str, int] = {}
        if not known:
            _keep_name(self._output, "mlflow", self._id)
            self._mlflow.log_params({k: shortened(str(v), _LONGEST_PARAMETER) for k, v in flat(settings).items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        new = {name: value for name, value in values.items() if step > self._last_step_of(name)}
        if new:
            self._mlflow.log_metrics(new, step=step)

    def _last_step_of(self, name: str) -> int:
        """The last step for which MLflow had `name` at the start."""
        if name not in self._last:
            history = self._mlflow.MlflowClient().get_metric_history(self._id, name) if self._goes_on else []
            self._last[name] = max((point.step for point in history), default=-1)
        return self._last[name]

    def flush(self) -> None:
        """It has everything as soon as it is told."""

    def finish(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def make_trackers(names: Sequence[str] | None, output: Path) -> list[Tracker]:
    """Those of the names, for the run in `output`; None: TensorBoard, if it is installed.

    Raises:
        ValueError: one is not installed.
    """
    if names is None:
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if absent := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"--trackers {absent[0]}: expected that it is installed, but Python finds no {absent[0]}: pip install {absent[0]}"
        )
    made: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            made.append(_TensorBoard(output))
        else:
            made.append(_MLflow(output) if name == "mlflow" else _Wandb(output, name))
    return made


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that the command line gives them, such as "optim.lr"."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _names_in(output: Path) -> dict[str, str]:
    path = output / TRACKERS_FILE
    if not path.is_file():
        return {}
    names = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(names, dict):
        raise ValueError(
            f"{path}: expected the name of the run by tracker, got {shortened(repr(names))}: remove the file"
        )
    return names


def _keep_name(output: Path, tool: str, name: str) -> None:
    names = {**_names_in(output), tool: name}
    write_atomically(output / TRACKERS_FILE, lambda file: file.write(json.dumps(names).encode()))
