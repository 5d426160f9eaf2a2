"""The most images per step that a GPU has memory for, by trying the worst batches that training can meet."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from smca.datasets import Batch, Targets
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.log import RunLog
from smca.gpu.training.order import GlobalBatches
from smca.gpu.training.setup import TARGET_BUCKET, Run
from smca.gpu.training.stop import Stop

TrainEpoch = Callable[[Run, RunLog, Stop], None]
"""The trainer's own loop over the batches of an epoch."""
STEPS = 2
"""Of a trial on a GPU: the first one makes the optimiser's state, the second one has it beside all else."""
SHARE = 0.9
"""Of the memory that is free: what a trial may take. The rest is for what varies."""


def find_batch_size(run: Run, train_epoch: TrainEpoch) -> int:
    """The most images per step, of 1, 2, 3, 4, 6, 8, 12 … for each of ``config.accumulate`` parts, that fit into the GPU's memory.

    The run, at its first step, is left as it was.

    Raises:
        ValueError: there is no GPU, there are several processes, or not even one image fits.
    """
    if not _has_memory_of_its_own(run.device):
        raise ValueError(
            "--batch-size auto: expected a CUDA GPU, whose memory says what fits, got the device "
            f"{str(run.device)!r}: give a number"
        )
    if run.world > 1:
        raise ValueError(
            f"--batch-size auto: expected one process, got {run.world}: find it on one GPU (smca train … --batch-size auto "
            f"--fast-dev-run), then give --batch-size {run.world} times that"
        )
    parts = run.config.accumulate
    most = max(1, len(run.augmented) // parts)
    fitting = list(itertools.takewhile(lambda images: images <= most and fits(run, images, train_epoch), _sizes()))
    if not fitting:
        height, width = worst_shape(run)
        raise ValueError(
            f"--batch-size auto: not even one image of {height}×{width} px with {run.most_objects} objects fits into the GPU's "
            "memory: train on smaller images (--augmentation.short-sides, --augmentation.max-size), or --precision bf16"
        )
    return fitting[-1] * parts


def found_message(run: Run) -> str:
    """What was chosen, and that the learning rate was not."""
    height, width = worst_shape(run)
    return (
        f"--batch-size auto: {run.batches.batch_size} images per step, which fit at {height}×{width} px with {run.most_objects} "
        f"objects each. Learning rates stay as they are (--optim.lr {run.config.optim.lr:g}); the presets' are for 16 images, "
        "those of demo and small for 8: for many more, try a higher one"
    )


def fits(run: Run, images: int, train_epoch: TrainEpoch) -> bool:
    """Whether a step whose parts have so many images leaves a tenth of the GPU's free memory, at the worst."""
    try:
        with _limited_memory(run.device):
            take_worst_steps(run, images, train_epoch)
    except torch.cuda.OutOfMemoryError:
        fit = False
    else:
        fit = True
    if run.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return fit


def take_worst_steps(run: Run, images: int, train_epoch: TrainEpoch) -> None:
    """Take steps of the worst batches, whose parts have so many images, and undo them."""
    parts, batch = run.config.accumulate, worst_batch(run, images)
    per_step, steps = images * parts, STEPS if run.device.type == "cuda" else 1
    trial = dataclasses.replace(
        run,
        config=dataclasses.replace(run.config, batch_size=per_step, checkpoint_every=math.inf),
        batches=GlobalBatches(per_step * (steps + 1), per_step, parts=parts),  # never at the end of an epoch
        loader=[batch] * (steps * parts),  # type: ignore[arg-type]
        total_steps=steps,
        sum_of_losses=torch.zeros_like(run.sum_of_losses),
        ends_at=math.inf,
        scaler=copy.deepcopy(run.scaler),
        check=FiniteCheck(run.model, run.config.output, delayed=run.check.delayed, skips=run.check.skips),
    )
    silent = RunLog(run.config.output, steps, first_step=0, main_process=False)
    with unchanged(run):
        train_epoch(trial, silent, Stop())


def worst_shape(run: Run) -> tuple[int, int]:
    """(height, width) in pixels of the largest batch that augmentation makes of the training images."""
    height, width = run.config.augmentation.largest_size(
        (height, width) for height, width in np.unique(run.train_table.sizes, axis=0).tolist()
    )
    bucket = run.config.shape_bucket
    return -(-height // bucket) * bucket, -(-width // bucket) * bucket


def worst_batch(run: Run, images: int) -> Batch:
    """So many images of ``worst_shape``, each with as many objects as the fullest of the training images."""
    height, width = worst_shape(run)
    objects, bucket = max(1, run.most_objects), TARGET_BUCKET if run.config.shape_bucket > 1 else 1
    objects = -(-objects // bucket) * bucket
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, generator=generator)
    padded = torch.zeros(images, height, width, dtype=torch.bool)
    padded[:, -1:] = True
    boxes = torch.cat(
        [torch.full((images, objects, 2), 0.5), torch.rand(images, objects, 2, generator=generator)], dim=-1
    )
    labels = torch.zeros(images, objects, dtype=torch.int64)
    batch = Batch(
        images=pixels.permute(0, 3, 1, 2),
        padding_mask=padded,
        targets=Targets(labels, boxes.clamp(min=0.05), torch.ones_like(labels, dtype=torch.bool)),
        image_ids=torch.arange(images),
        original_sizes=torch.tensor([[height, width]] * images),
        seeds=torch.arange(images),
    )
    return batch.pin_memory() if run.device.type == "cuda" else batch


@contextmanager
def unchanged(run: Run) -> Iterator[None]:
    """Undo what steps do to a run at its first step: to weights, average, optimiser, and the state of random generators. The copies
    are on the host, so that the device's memory is what training finds."""
    modules: list[nn.Module] = [module for module in (run.model, run.average) if module is not None]
    states = [{name: value.to("cpu", copy=True) for name, value in module.state_dict().items()} for module in modules]
    rates = [group["lr"] for group in run.optimizer.param_groups]
    drawn = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - other libraries draw from it
    on_device = torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None
    try:
        yield
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        run.optimizer.state.clear()
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
        torch.set_rng_state(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        random.setstate(drawn[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, run.device)


@contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """Let torch run out of memory when SHARE of what is free on a GPU is taken."""
    if device.type != "cuda":
        yield
        return
    free, total = torch.cuda.mem_get_info(device)
    # By its number: a device that is called "cuda" and no more is refused here.
    torch.cuda.set_per_process_memory_fraction(
        SHARE * (free + torch.cuda.memory_reserved(device)) / total, device.index
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def _has_memory_of_its_own(device: torch.device) -> bool:
    return device.type == "cuda"


def _sizes() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 …"""
    yield 1
    for power in itertools.count(1):
        yield from (2**power, 3 * 2 ** (power - 1))
