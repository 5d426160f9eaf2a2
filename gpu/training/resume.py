"""A run's folder: claimed, cleared, and gone on with, under the settings that the run was started with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smca.datasets.settings import shown
from smca.gpu.config import RunConfig
from smca.gpu.files import CHECKPOINT_FILE, CONFIG_FILE, MODEL_FOLDER, WEIGHTS_FILE, load_checkpoint
from smca.gpu.training.log import METRICS_FILE
from smca.gpu.training.setup import Run

BEST_FOLDER = "best"
"""Of a run: the model of the highest AP so far."""
_WRITTEN = (
    CHECKPOINT_FILE,
    METRICS_FILE,
    "curves.png",
    "predictions.png",
    "pictures/*.png",
    "tensorboard/events.out.tfevents.*",
    "*bad_batch.safetensors",
    *(f"{folder}/{name}" for folder in (MODEL_FOLDER, BEST_FOLDER) for name in (CONFIG_FILE, WEIGHTS_FILE)),
)
"""What runs write into their folder; nothing else is removed from it."""
_FREE = {
    "output",
    "data",  # the data are compared, not where they lie
    "train_json",
    "train_images",
    "val_json",
    "val_images",
    "annotations",
    "synthetic",
    "eval_every",
    "eval_batch_size",
    "workers",
    "cache_images",
    "device",
    "attention",
    "compile",
    "dry_run",
    "resume",
    "resume_changed",
    "overwrite",
}
"""Settings that do not change what is learned, or that other comparisons cover."""


def claim(config: RunConfig) -> None:
    """Raise ValueError if the folder holds a run that the configuration neither resumes nor overwrites."""
    held = [name for name in (CHECKPOINT_FILE, METRICS_FILE, MODEL_FOLDER) if (config.output / name).exists()]
    if held and not (config.resume or config.overwrite):
        raise ValueError(
            f"{config.output} already holds a run ({', '.join(held)}): --resume goes on with it, --overwrite starts anew, "
            "--output puts it elsewhere"
        )


def clear(output: Path) -> None:
    """Make the folder, without what an earlier run wrote: nothing of it is to be taken for the new one's."""
    output.mkdir(parents=True, exist_ok=True)
    folders = set()
    partial = [f"{pattern}.partial" for pattern in _WRITTEN]  # which a killed process leaves
    for pattern in (*_WRITTEN, *partial):
        for file in output.glob(pattern):
            file.unlink()
            folders.add(file.parent)
    for folder in folders - {output}:
        if not any(folder.iterdir()):
            folder.rmdir()


def checkpoint_of(run: Run) -> dict[str, Any]:
    """What ``resume`` needs to go on from here."""
    config = dataclasses.replace(run.config.model, backbone=run.model.backbone.resolved(run.config.model.backbone))
    return {
        "config": run.config.model.to_json(),
        "model_config": config.to_json(),  # which needs no published weights to be built
        "settings": settings_of(run.config),
        "data": run.fingerprints,
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average is not None else None,
        "optimizer": run.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "step": run.step,
        "epoch": run.epoch,
        "total_steps": run.total_steps,
        "train_seconds": run.train_seconds,
        "loss": run.loss,
        "images_per_second": run.images_per_second,
    }


def resume(run: Run) -> None:
    """Put a run where its checkpoint was written.

    Raises:
        ValueError: the checkpoint is missing or damaged, belongs to another model, or was written under other settings or data and
            ``config.resume_changed`` does not allow it.
    """
    path = run.config.output / CHECKPOINT_FILE
    state = load_checkpoint(path)
    if state["config"] != run.config.model.to_json():
        changed = differences(json.loads(state["config"]), json.loads(run.config.model.to_json()), "model.")
        raise ValueError(
            f"{path} belongs to a model configured otherwise ({'; '.join(changed[:10])}): resume with the settings it was started "
            "with, or use --overwrite"
        )
    if (state["average"] is None) != (run.average is None):
        raise ValueError(
            f"{path} was trained {'without' if state['average'] is None else 'with'} optim.ema_decay: resume likewise"
        )
    changed = differences(state.get("settings", {}), settings_of(run.config))
    if run.rank == 0:
        changed += [
            f"the {name} images or their boxes are others ({run.fingerprints[name]['report']}; they were: {before['report']})"
            for name, before in state.get("data", {}).items()
            if before["digest"] != run.fingerprints[name]["digest"]
        ]
    if changed and not run.config.resume_changed:
        raise ValueError(
            f"{path} was written under other settings: {'; '.join(changed)}. Resume with those it was started with; or go on with "
            "the new ones from here on, as no uninterrupted run would: --resume --resume-changed"
        )
    groups = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    try:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.average is not None:
            run.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        run.step, run.epoch, run.train_seconds = int(state["step"]), int(state["epoch"]), float(state["train_seconds"])
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not fit this run ({shown(error)}): start anew with --overwrite") from error
    for group, settings in zip(run.optimizer.param_groups, groups, strict=True):
        group.update(settings)  # of the optimiser, too, this run's settings hold
    run.loss, run.images_per_second = state.get("loss", float("nan")), state.get("images_per_second", 0.0)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What decides what is learned, as plain values; the model apart, and what the data are."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in {*_FREE, "model"}}
    if config.optim.schedule == "step":  # a constant rate: training longer changes nothing of what was done
        values = {name: value for name, value in values.items() if name not in ("epochs", "max_steps")}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """In words, with the names that the command line uses; a setting that only one of the two knows is left out."""
    found: list[str] = []
    for name in before.keys() & now.keys():
        key = f"{prefix}{name}".replace("_", "-")
        if isinstance(before[name], dict) and isinstance(now[name], dict):
            found += differences(before[name], now[name], f"{key}.")
        elif before[name] != now[name]:
            found.append(f"--{key} is {shown(now[name])}, was {shown(before[name])}")
    return sorted(found)
