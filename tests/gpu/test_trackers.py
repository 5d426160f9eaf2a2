"""Who is told of a run: each point once, whatever ends the run; and a tracker that fails ends nothing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from smca.gpu import train
from smca.gpu.training.log import RunLog
from tiny_run import tiny

Points = dict[int, dict[str, float]]


class FakeRun:
    """A run of W&B or of trackio, as far as the trainer asks."""

    def __init__(self, drops: bool) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.drops = drops
        self.ends: list[dict[str, int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        if not (self.drops and self.points and step < self.points[-1][0]):  # W&B warns, and takes nothing
            self.points.append((step, values))

    def finish(self, **how: int) -> None:
        self.ends.append(how)


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, FakeRun] = {}
        self.configs: list[Any] = []

    def init(
        self, *, project: str, name: str, id: str, resume: str, config: Any, dir: str, allow_val_change: bool
    ) -> FakeRun:
        assert (project, resume, allow_val_change) == ("smca-detr", "allow", True)
        self.configs.append(config)
        return self.runs.setdefault(id, FakeRun(drops=True))


class FakeTrackio(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: dict[str, FakeRun] = {}

    def init(self, project: str, *, name: str, config: Any, resume: str) -> FakeRun:
        assert (project, resume) == ("smca-detr", "allow")
        return self.runs.setdefault(name, FakeRun(drops=False))


class FakeMLflow(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.parameters: dict[str, dict[str, str]] = {}
        self.ends: list[str] = []
        self.now = ""

    def start_run(self, run_id: str | None, run_name: str | None) -> Any:
        assert (run_id is None) != (run_name is None)
        assert run_id is None or run_id in self.runs
        self.now = run_id or f"run {len(self.runs)}"
        self.runs.setdefault(self.now, [])
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.now))

    def log_params(self, values: dict[str, str]) -> None:
        assert self.now not in self.parameters, "MLflow refuses other values for what it has"
        self.parameters[self.now] = values

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.runs[self.now].append((step, values))

    def MlflowClient(self) -> FakeMLflow:
        return self

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [types.SimpleNamespace(step=step) for step, values in self.runs[run_id] if key in values]

    def end_run(self, status: str) -> None:
        self.ends.append(status)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands in for the tools, which are not installed."""
    made: dict[str, Any] = {"wandb": FakeWandb(), "trackio": FakeTrackio(), "mlflow": FakeMLflow()}
    for name, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return made


def by_step(points: list[tuple[int, dict[str, float]]], *, once: bool = True) -> Points:
    """The points but for times; each one once, or, if not `once`, each time the same."""
    found: Points = {}
    for step, values in points:
        for name in (name for name in values if "second" not in name):
            assert not (once and name in found.get(step, {})), f"{name} of step {step} is there twice"
            assert found.setdefault(step, {}).setdefault(name, values[name]) == values[name]
    return found


def fail_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    taken, step = 0, torch.optim.AdamW.step

    def counted(self: Any, *args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == number:
            raise OSError("the end")
        return step(self, *args)

    patch.setattr(torch.optim.AdamW, "step", counted)


def test_trackers_have_each_point_once_whatever_ends_a_run(
    tmp_path: Path, tools: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run fails in its sixth step, two steps after its checkpoint, and goes on from there."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    names = tuple(tools)
    train.train(tiny(tmp_path / "whole", trackers=names))
    with pytest.MonkeyPatch.context() as patch:
        fail_in_step(6, patch)
        with pytest.raises(OSError, match="the end"):
            train.train(tiny(tmp_path / "cut", trackers=names))
    train.train(tiny(tmp_path / "cut", trackers=names, resume=True))
    for name in ("wandb", "mlflow", "trackio"):
        runs = tools[name].runs
        assert len(runs) == 2, name
        whole, cut = (by_step(getattr(run, "points", run), once=name == "mlflow") for run in runs.values())
        assert whole == cut, name
        assert [step for step, values in whole.items() if "train/lr" in values] == [1, 2, 3, 4, 5, 6]
        assert [step for step, values in whole.items() if "eval/ap" in values] == [3, 6]
    wandb, mlflow = tools["wandb"], tools["mlflow"]
    assert [config["optim"]["optimizer"] for config in wandb.configs] == ["muon"] * 3
    steps = [step for step, _ in list(wandb.runs.values())[1].points]
    assert steps == sorted(steps)
    assert [run.ends for run in wandb.runs.values()] == [[{"exit_code": 0}], [{"exit_code": 1}, {"exit_code": 0}]]
    assert mlflow.ends == ["FINISHED", "FAILED", "FINISHED"]
    assert {parameters["optim.optimizer"] for parameters in mlflow.parameters.values()} == {"muon"}
    assert next(iter(tools["trackio"].runs)).startswith("whole-")
    assert not (tmp_path / "whole/tensorboard").exists(), "only those that are asked for"


def test_a_run_that_replaces_another_is_another(tmp_path: Path, tools: dict[str, Any]) -> None:
    for overwrite in (False, True):
        train.train(tiny(tmp_path, max_steps=1, trackers=("wandb",), overwrite=overwrite))
    assert len(tools["wandb"].runs) == 2


class Mine:
    """A tracker of one's own, which may fail."""

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in, self.told = fails_in, list[str]()

    def _note(self, what: str) -> None:
        self.told.append(what)
        if what == self.fails_in:
            raise ConnectionError(f"no {what}\nat all")

    def start(self, first_step: int, settings: Mapping[str, Any]) -> None:
        self._note(f"start at {first_step} with {settings.get('epochs')} epochs")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._note(f"{sorted(values)[0].split('/')[0]} {step}")

    def flush(self) -> None:
        self._note("flush")

    def finish(self, failed: bool) -> None:
        self._note("finish")


def test_a_tracker_that_fails_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady = Mine()
    failing = {moment: Mine(moment) for moment in ("start at 0 with 1 epochs", "flush", "eval 3", "finish")}
    train.train(tiny(tmp_path, epochs=1, trackers=()), trackers=[*failing.values(), steady])
    assert steady.told == ["start at 0 with 1 epochs", "flush", "flush", "eval 3", "finish"]
    said = " ".join(capsys.readouterr().out.split())
    for moment, tracker in failing.items():
        assert tracker.told == steady.told[: steady.told.index(moment) + 1], "it is told nothing more"
        warning = f"warning: Mine is told nothing more, since it failed (ConnectionError: no {moment} at all)"
        assert said.count(warning) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_only_the_first_process_tracks(tmp_path: Path) -> None:
    tracker = Mine()
    with RunLog(tmp_path, 10, first_step=0, main_process=False, trackers=[tracker]) as log:
        log.step("", 1, {"loss": 1.0}, 1.0, 0.0)
        log.flush()
    assert tracker.told == []


def test_tensorboard_need_not_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    train.train(tiny(tmp_path, max_steps=1))
    assert not (tmp_path / "tensorboard").exists()
    assert "tensorboard/" not in capsys.readouterr().out
    for name in ("tensorboard", "wandb"):
        with pytest.raises(
            ValueError, match=f"--trackers {name}: expected that it is installed, .* pip install {name}"
        ):
            train.train(tiny(tmp_path, overwrite=True, trackers=(name,)))
    assert (tmp_path / "checkpoint.pt").exists()


def test_trackers_are_named_on_the_command_line() -> None:
    assert train.parse(["demo", "--trackers", "tensorboard", "wandb"]).trackers == ("tensorboard", "wandb")
    assert train.parse(["demo"]).trackers is None
    assert train.parse(["demo", "--trackers"]).trackers == ()
    with pytest.raises(ValueError, match="trackers must be different names"):
        tiny(Path("nowhere"), trackers=("mlflow", "mlflow"))
