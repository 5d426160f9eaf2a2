"""A run's folder: claimed, cleared, and gone on with, under the settings that the run was started with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smca.datasets.settings import shown
from smca.gpu.config import ModelConfig, RunConfig
from smca.gpu.files import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    LAST_FOLDER,
    MODEL_FOLDER,
    PREVIOUS_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
    with_shards,
)
from smca.gpu.shards import (
    SHARDS_FOLDERS,
    described,
    free_folder,
    places_in,
    put_back,
    read_shards,
    remove_others,
    sync_folder,
    take_sharded,
    write_shards,
)
from smca.gpu.training.log import METRICS_FILE
from smca.gpu.training.priors import PRIORS_FILE, PRIORS_PICTURE
from smca.gpu.training.processes import as_the_first_says
from smca.gpu.training.setup import Run
from smca.gpu.training.sharding import sharded_like
from smca.gpu.training.trackers import TRACKERS_FILE

_CHECKPOINTS = (CHECKPOINT_FILE, PREVIOUS_FILE)
_WRITTEN = (
    *_CHECKPOINTS,
    *(f"{folder}/*.safetensors" for folder in SHARDS_FOLDERS),
    METRICS_FILE,
    "curves.png",
    "predictions.png",
    PRIORS_FILE,
    PRIORS_PICTURE,
    "pictures/*.png",
    "tensorboard/events.out.tfevents.*",
    TRACKERS_FILE,
    "*bad_step.safetensors",
    *(f"{folder}/{name}" for folder in (MODEL_FOLDER, LAST_FOLDER) for name in (CONFIG_FILE, WEIGHTS_FILE)),
)
"""What runs write into their folder; nothing else is removed from it."""
_FREE = {
    "output",
    "data",  # the data are compared, not where they lie
    "more_data",
    "train_json",
    "train_images",
    "val_json",
    "val_images",
    "annotations",
    "synthetic",
    "eval_every",
    "best_by",
    "patience",
    "max_minutes",
    "eval_batch_size",
    "workers",
    "cache_images",
    "device",
    "attention",
    "gradient_checkpointing",
    "fsdp",
    "compile",
    "init",  # a run that goes on has its weights, and knows what they came from
    "init_parts",
    "dry_run",
    "fast_dev_run",
    "replay",
    "checkpoint_every",
    "trackers",
    "resume",
    "restartable",
    "resume_changed",
    "overwrite",
}
"""Settings that do not change what is learned, or that other comparisons cover."""


def claim(config: RunConfig) -> RunConfig:
    """The configuration, settled on whether it resumes: as it says, or because it is started again. Then a batch size that was
    found when it was started is taken from its checkpoint.

    Raises:
        ValueError: the folder holds a run that the configuration neither resumes nor overwrites.
    """
    # A metrics file is empty until there is an evaluation: a run that was ended before its first checkpoint leaves one.
    present = [
        name for name in (*_CHECKPOINTS, METRICS_FILE, MODEL_FOLDER, LAST_FOLDER) if (config.output / name).exists()
    ]
    held = [name for name in present if name != METRICS_FILE or (config.output / name).stat().st_size]
    if not config.resume and any(name in held for name in _CHECKPOINTS):
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        # What --overwrite is to replace may still lie there, if the job failed early.
        if config.restartable or (
            restarted and (not config.overwrite or _is_this_jobs(config.output / CHECKPOINT_FILE))
        ):
            config = dataclasses.replace(config, resume=True, restartable=False, overwrite=False)
    if config.resume and config.batch_size == "auto":
        found = load_latest_checkpoint(config.output / CHECKPOINT_FILE).get("settings", {}).get("batch_size", "auto")
        config = dataclasses.replace(config, batch_size=found)
    if held and not (config.resume or config.overwrite):
        raise ValueError(
            f"{config.output} already holds a run ({', '.join(held)}): --resume goes on with it, --overwrite starts anew, "
            "--output puts it elsewhere"
        )
    return config


def _is_this_jobs(path: Path) -> bool:
    return bool(load_latest_checkpoint(path).get("job") == os.environ.get("TORCHELASTIC_RUN_ID"))


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


def save(run: Run) -> None:
    """Write a checkpoint. Every process must ask; the first one writes it, of a model that is divided each writes its own part."""
    path = run.config.output / CHECKPOINT_FILE
    if not run.config.fsdp:
        if run.rank == 0:
            save_checkpoint(path, {**_facts_of(run), **state_of(run)})
            if any((path.parent / name).exists() for name in SHARDS_FOLDERS):  # of the run before it was resumed
                remove_others(path.parent, _shards_of(path))
        return
    state = state_of(run)
    shards = take_sharded(state)
    folder = path.parent / as_the_first_says(free_folder(path.parent, _shards_of(path)) if run.rank == 0 else "", run)
    write_shards(folder, shards)
    if run.rank == 0:
        sync_folder(folder)
        save_checkpoint(path, {**_facts_of(run), **state, "shards": described(folder)})
        remove_others(path.parent, _shards_of(path))


def _shards_of(path: Path) -> set[str]:
    """The folders that the checkpoint at `path` and the one before it have their shards in."""
    folders = set()
    for file in (path, path.with_name(PREVIOUS_FILE)):
        with contextlib.suppress(ValueError):  # one that is not there, or damaged
            folders.add(load_checkpoint(file).get("shards", {}).get("folder"))
    return folders - {None}


def state_of(run: Run) -> dict[str, Any]:
    """What changes from step to step: all that the next one depends on. ``restore`` takes it."""
    optimizer = run.optimizer.state_dict()
    optimizer["state"] = {number: dict(values) for number, values in optimizer["state"].items()}  # not the ones in use
    return {
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average is not None else None,
        "optimizer": optimizer,
        "scaler": run.scaler.state_dict(),
        "skipped": (run.check.skipped, run.check.skipped_in_a_row),
        "step": run.step,
        "epoch": run.epoch,
        "batch": run.batch,
        "sum_of_losses": run.sum_of_losses.cpu(),
    }


def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Put a run where ``state_of`` was taken; learning rates and the like stay those of this run's settings.

    Raises:
        RuntimeError, ValueError, TypeError, KeyError: the state is that of another model or optimiser.
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    _lay_out_as_parameters(run.optimizer)
    if state.get("scaler"):  # there is none but of float16
        run.scaler.load_state_dict(state["scaler"])
    run.check.skipped, run.check.skipped_in_a_row = state.get("skipped", (0, 0))
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    run.step, run.epoch, run.batch = state["step"], state["epoch"], state["batch"]
    run.sum_of_losses.copy_(state["sum_of_losses"])
    for group, settings in zip(run.optimizer.param_groups, groups, strict=True):
        group.update(settings)


def _facts_of(run: Run) -> dict[str, Any]:
    """What ``resume`` needs to go on from here, beside ``state_of``."""
    config = dataclasses.replace(run.config.model, backbone=run.model.backbone.resolved(run.config.model.backbone))
    return {
        "config": run.config.model.to_json(),
        "model_config": config.to_json(),  # which needs no published weights to be built
        "settings": settings_of(run.config),
        "job": os.environ.get("TORCHELASTIC_RUN_ID"),
        "data": run.fingerprints,
        "logged": run.logged,
        "evaluate_now": run.evaluate_now,
        "total_steps": run.total_steps,
        "train_seconds": run.train_seconds,
        "data_seconds": run.data_seconds,
        "loss": run.loss,
        "images_per_second": run.images_per_second,
        **({} if run.start is None else {"start": run.start}),
    }


def resume(run: Run) -> None:
    """Put a run where its checkpoint was written.

    Raises:
        ValueError: the checkpoint is missing or damaged, belongs to another model, or was written under other settings or data and
            ``config.resume_changed`` does not allow it.
    """
    path = run.config.output / CHECKPOINT_FILE
    state = load_latest_checkpoint(path)
    before = ModelConfig.from_json(state["config"], str(path)).to_json()  # with the fields that there are by now
    if before != run.config.model.to_json():
        changed = differences(json.loads(before), json.loads(run.config.model.to_json()), "model.")
        raise ValueError(
            f"{path} belongs to a model configured otherwise ({'; '.join(changed[:10])}): resume with the settings it was started "
            "with, or use --overwrite"
        )
    if (state["average"] is None) != (run.average is None):
        raise ValueError(
            f"{path} was trained {'without' if state['average'] is None else 'with'} optim.ema_decay: resume likewise"
        )
    changed = differences(_as_written_now(state.get("settings", {})), settings_of(run.config))
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
    try:
        state = _divided(state, run) if run.config.fsdp else with_shards(state, path)
        restore(run, state)
        run.logged, run.evaluate_now = dict(state["logged"]), state.get("evaluate_now", False)
        run.start = state.get("start")
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not fit this run ({shown(error)}): start anew with --overwrite") from error
    run.train_seconds, run.saved_step, run.saved_at = state["train_seconds"], run.step, time.monotonic()
    if run.step != run.epoch * len(run.batches) + run.batch:  # batches or data were changed
        _recount(run, state["settings"]["batch_size"])
    run.data_seconds = state.get("data_seconds", 0.0)
    run.loss, run.images_per_second = state.get("loss", float("nan")), state.get("images_per_second", 0.0)


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give state of a parameter's shape its order in memory too: a fused optimiser goes through both number by number."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter).copy_(value)


def _divided(state: dict[str, Any], run: Run) -> dict[str, Any]:
    """A checkpoint whose tensors are divided as the run's are, whatever they were when it was written; `state` itself, in place."""
    parameters: list[Tensor] = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    own = {f"model/{name}": value for name, value in run.model.state_dict().items()}
    own |= (
        {f"average/{name}": value for name, value in run.average.state_dict().items()}
        if run.average is not None
        else {}
    )

    def like(name: str) -> Tensor:
        place, *key = name.split("/")
        return parameters[int(key[0])] if place == "optimizer" else own[name]

    if "shards" in state:
        put_back(state, read_shards(run.config.output / state.pop("shards")["folder"], like))
        return state
    for place, values in places_in(state):
        for name, value in values.items():
            of_run = like(f"{place}/{name}")
            if value.shape == of_run.shape:  # not the optimiser's count of steps
                values[name] = sharded_like(value, of_run)
    return state


def _recount(run: Run, batch_size: int) -> None:
    """Go on in the epoch after as many images as were seen of it in batches of `batch_size`, up to the same number of epochs."""
    run.batch = run.batch * batch_size // run.batches.batch_size
    if run.batch >= len(run.batches):
        run.epoch, run.batch = run.epoch + 1, 0
    run.sum_of_losses.zero_()
    left = (run.config.epochs - run.epoch) * len(run.batches) - run.batch
    run.total_steps = min(run.step + max(0, left), run.config.max_steps or sys.maxsize)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What decides what is learned, as plain values; the model apart, and what the data are."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in {*_FREE, "model"}}
    if config.optim.schedule == "step":  # a constant rate: training longer changes nothing of what was done
        values = {name: value for name, value in values.items() if name not in ("epochs", "max_steps")}
    if config.model.backbone.frozen_norm:  # otherwise norms see a part of a step at a time
        del values["accumulate"]
    return plain(values)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def _as_written_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint from the time when schedule="step" dropped the rates once, and had a number for it."""
    optim = settings.get("optim", {})
    one_drop = {"drop_epoch": [optim["drop_epoch"]]} if isinstance(optim.get("drop_epoch"), int) else {}
    return {**settings, "optim": {**optim, **one_drop}}


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
