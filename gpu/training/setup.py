"""Everything that training needs before its first step: data, model, loss, optimiser."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from smca.datasets import Augmented, DetectionDataset, Joined, Report, Targets, collate, require_same_categories
from smca.datasets.batch import CocoDict
from smca.datasets.settings import shown
from smca.datasets.table import AnnotationTable, table_of
from smca.gpu.config import LossConfig, RunConfig
from smca.gpu.evaluation import evaluation_loader, open_split, pick_device
from smca.gpu.loading import Loader
from smca.gpu.loss import SetCriterion, further_losses
from smca.gpu.model import SMCADETR
from smca.gpu.model.recompute import recompute
from smca.gpu.model.synced_norm import synchronize_norms
from smca.gpu.training.bad_step import Origin
from smca.gpu.training.determinism import arrange_gradients
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.optimizer import make_optimizer
from smca.gpu.training.order import GlobalBatches
from smca.gpu.training.sharding import shard
from smca.gpu.weights import Plan, open_source, plan_start

Criterion = Callable[[dict[str, Tensor], Targets], Mapping[str, Tensor]]
"""(outputs, targets) → terms of the loss, scalars by name; "loss" is what is minimised. ``SetCriterion``, or one of your own."""

HALVES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision of a run → what the network is computed in under autocast, if anything."""
TARGET_BUCKET = 16
"""Targets are padded to multiples of this if images are padded to multiples of ``RunConfig.shape_bucket``: COCO's images have
7 objects on average and 63 at most."""


def _fingerprint(data: DetectionDataset, report: object) -> dict[str, str]:
    """What tells one data set from another, and a line about it."""
    return {"digest": data.digest, "report": shown(str(report))}


@dataclass
class Run:
    """One training run, on one process of it."""

    config: RunConfig
    """With the classes of the data."""
    rank: int
    """Of this process; 0 writes files and speaks."""
    world: int
    """Number of processes."""
    device: torch.device
    train_data: DetectionDataset
    val_data: DetectionDataset
    augmented: Augmented
    """`train_data` as `loader` reads it."""
    batches: GlobalBatches
    """Which images `loader` reads."""
    loader: DataLoader[Any]
    """Training batches of this process."""
    val_loader: DataLoader[Any]
    """Held-out batches of this process."""
    total_steps: int
    model: SMCADETR
    parallel: nn.Module
    """`model`, wrapped so that processes share their gradients."""
    average: SMCADETR | None
    """Moving average of the model, which is then what is evaluated and saved."""
    terms_of: Callable[[dict[str, Tensor], Targets, Tensor], Mapping[str, Tensor]]
    """(outputs, targets, objects per process) → what a part of a step adds to the terms of the loss."""
    optimizer: torch.optim.Optimizer
    base_lrs: list[float]
    """Of each parameter group, before the schedule."""
    check: FiniteCheck
    half: torch.dtype | None
    """What the network computes in, if not in float32."""
    scaler: torch.amp.GradScaler
    """Of the loss, in float16; otherwise it does nothing."""
    step: int = 0
    """Steps done."""
    epoch: int = 0
    """Whole epochs done."""
    batch: int = 0
    """Steps done of the epoch after those."""
    sum_of_losses: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Of those steps, of this process."""
    logged: dict[str, float] = field(default_factory=dict)
    """What the log was told of the last step, if it was told of it."""
    ends_at: float = math.inf
    """When the time that this start has is over, by the monotonic clock."""
    evaluate_now: bool = False
    """Whether the weights are to be evaluated as they are, since the time was over."""
    saved_step: int | None = None
    """That of the checkpoint on disk, as far as this process wrote it."""
    saved_at: float = 0.0
    """When, by the monotonic clock."""
    train_seconds: float = 0.0
    """Seconds spent on training so far, evaluations not counted."""
    data_seconds: float = 0.0
    """Of those, seconds in which this process waited for images."""
    loss: float = float("nan")
    """Mean of the last epoch, or of what was done of it, over all processes."""
    images_per_second: float = 0.0
    """Of the last epoch, all processes together."""
    start: str | None = None
    """What of which trained model the run started from, if from one."""

    @property
    def trained(self) -> SMCADETR:
        """What is evaluated and saved."""
        return self.average or self.model

    @cached_property
    def val_truth(self) -> CocoDict:
        """Ground truth of the held-out images."""
        return self.val_data.ground_truth()

    @cached_property
    def train_report(self) -> Report:
        """What is in the training images, read once likewise."""
        return self.train_data.report

    @cached_property
    def val_report(self) -> Report:
        """What is in the held-out images."""
        return self.val_data.report

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """What tells these data from others."""
        return {
            "training": _fingerprint(self.train_data, self.train_report),
            "held-out": _fingerprint(self.val_data, self.val_report),
        }

    @cached_property
    def train_table(self) -> AnnotationTable:
        """The annotations of the training images as arrays."""
        return table_of(self.train_data)

    @property
    def most_objects(self) -> int:
        """Objects in the fullest training image, crowds not counted."""
        return int(self.train_table.objects_per_image.max(initial=0))

    @cached_property
    def val_table(self) -> AnnotationTable:
        """Those of the held-out images."""
        return table_of(self.val_data)


def set_up(
    config: RunConfig,
    rank: int,
    world: int,
    train_data: DetectionDataset | None,
    val_data: DetectionDataset | None,
    criterion: Criterion | None,
) -> Run:
    """Build a run at its first step.

    Raises:
        ValueError: configuration, data and loss that do not fit each other.
    """
    device = pick_device(config.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    half = HALVES[config.precision]
    if half is torch.float16 and device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"precision fp16 needs an optimiser that can leave out a step, which there is on cuda and cpu, not on {device.type}: "
            "take --precision bf16 or fp32"
        )
    if config.fsdp and world == 1:
        raise ValueError(
            "fsdp: expected several processes to divide the model over, got one: start them with torchrun, or leave it out"
        )
    _seed(config.seed)
    # Data; the model's classes follow from it.
    named = partial(open_split, synthetic=config.synthetic, options=config.annotations, cache=config.cache_images)
    if train_data is None:
        train_data = named(config.data, "train", json_file=config.train_json, images_dir=config.train_images)
        if config.more_data:
            train_data = Joined([train_data, *(named(folder, "train") for folder in config.more_data)])
    if val_data is None:
        val_data = named(config.data, "val", json_file=config.val_json, images_dir=config.val_images)
    else:
        config = dataclasses.replace(config, data=None)  # which is not what the model is measured on
    config = _with_classes(config, train_data, val_data)
    augmented = Augmented(train_data, config.augmentation, config.seed)
    batches, loader, total_steps = _batches_of(config, augmented, rank, world, device)
    val_loader = evaluation_loader(
        val_data, config.model, config.eval_batch_size, config.workers, range(rank, len(val_data), world)
    )

    # Model, loss, optimiser.
    model, plan = _model(config)
    model.to(device)
    if not config.fsdp:  # which divides no weights in another order than the usual one
        model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model).requires_grad_(False) if config.optim.ema_decay else None
    own_criterion = criterion is not None
    if criterion is None:
        criterion = SetCriterion(config.loss)
    if isinstance(criterion, nn.Module):
        if trained := [name for name, p in criterion.named_parameters() if p.requires_grad]:
            raise ValueError(
                f"criterion: expected a loss without parameters to train, got {trained}; make them buffers"
            )
        criterion.to(device)
    if world > 1:
        synchronize_norms(model, device)
    recompute(model, config.gradient_checkpointing)
    if config.compile:
        model.compile()
        if isinstance(criterion, nn.Module):
            criterion.compile()
    if config.fsdp:
        for module in (model, average):
            if module is not None:
                shard(module, device, world)
    optimizer = make_optimizer(model, config.optim, device)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    # After the optimiser, which may freeze the backbone: only what is trained is synchronised.
    parallel: nn.Module = model
    if world > 1 and not config.fsdp:
        # A loss of one's own may leave outputs unused, and with them parameters.
        devices = [device] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, devices, find_unused_parameters=own_criterion)
        if device.type == "cpu" or config.deterministic:
            arrange_gradients(parallel)
    rebuilt = dataclasses.replace(config.model, backbone=model.backbone.resolved(config.model.backbone))
    name = getattr(criterion, "__qualname__", type(criterion).__qualname__) if own_criterion else None
    origin = Origin(dataclasses.replace(config, model=rebuilt), rank, world, device.type, name)
    check = FiniteCheck(model, config.output, delayed=device.type == "cuda", skips=half is torch.float16, origin=origin)
    return Run(
        config=config,
        rank=rank,
        world=world,
        device=device,
        train_data=train_data,
        val_data=val_data,
        augmented=augmented,
        batches=batches,
        loader=loader,
        val_loader=val_loader,
        total_steps=total_steps,
        model=model,
        parallel=parallel,
        average=average,
        terms_of=completed(criterion, config.loss, config.accumulate),
        optimizer=optimizer,
        base_lrs=base_lrs,
        check=check,
        half=half,
        scaler=torch.amp.GradScaler(device.type, enabled=half is torch.float16),
        sum_of_losses=torch.zeros((), device=device),
        start=None if plan is None else plan.report,
    )


def _model(config: RunConfig) -> tuple[SMCADETR, Plan | None]:
    """The model, with what it takes from ``config.init``. One that is to go on gets its weights from its checkpoint: no others are
    read or downloaded for it."""
    plan = None
    if config.init is not None and not config.resume:
        plan = plan_start(open_source(config.init), config.model, config.init_parts)
    own = config.resume or (plan is not None and plan.brings_backbone)
    model = SMCADETR(config.model, attention_backend=config.attention, download=not own)
    if plan is not None:
        plan.apply(model)
    return model, plan


def completed(
    criterion: Criterion, loss: LossConfig, parts: int
) -> Callable[[dict[str, Tensor], Targets, Tensor], Mapping[str, Tensor]]:
    """What gives the terms of a part of a step: ``SetCriterion``; or a user's own `criterion`, whose terms are looked at,
    as the mean over the parts, with the losses of cells and noised queries, which it may not know of, unless it has them."""
    if type(criterion) is SetCriterion:  # one that inherits from it takes two arguments
        return lambda outputs, targets, num_boxes: criterion(outputs, targets, num_boxes, parts)

    def terms_of(outputs: dict[str, Tensor], targets: Targets, num_boxes: Tensor) -> Mapping[str, Tensor]:
        terms = dict(criterion(outputs, targets))
        shapes = {name: tuple(value.shape) for name, value in terms.items()}
        if "loss" not in shapes or any(shapes.values()):
            raise ValueError(f'criterion: expected scalar tensors by name, one of them "loss", got the shapes {shapes}')
        if parts > 1:
            terms = {name: value / parts for name, value in terms.items()}
        further = further_losses(outputs, targets, loss.weights, loss.classification, num_boxes)
        missing = {name: value for name, value in further.items() if name not in terms}
        return {**terms, **missing, "loss": torch.stack([terms["loss"], *missing.values()]).sum()} if missing else terms

    return terms_of


def set_batch_size(run: Run, images: int) -> None:
    """Let each step have so many images, over all processes; before the first one."""
    run.config = dataclasses.replace(run.config, batch_size=images)
    parts = _batches_of(run.config, run.augmented, run.rank, run.world, run.device)
    run.batches, run.loader, run.total_steps = parts


def _batches_of(
    config: RunConfig, augmented: Augmented, rank: int, world: int, device: torch.device
) -> tuple[GlobalBatches, DataLoader[Any], int]:
    """Which images make which step, a loader of them, and the number of steps. A batch size yet to be found is the least."""
    batch_size = world * config.accumulate if config.batch_size == "auto" else config.batch_size
    batches = GlobalBatches(len(augmented), batch_size, rank, world, config.seed, config.accumulate)
    all_steps = config.epochs * len(batches)
    return batches, _training_loader(config, augmented, batches, device), min(all_steps, config.max_steps or all_steps)


def _training_loader(
    config: RunConfig, augmented: Augmented, batches: GlobalBatches, device: torch.device
) -> DataLoader[Any]:
    target_divisor = TARGET_BUCKET if config.shape_bucket > 1 else 1
    return Loader(
        augmented,
        workers=config.workers,
        batch_sampler=batches,
        collate_fn=partial(collate, size_divisor=config.shape_bucket, target_divisor=target_divisor),
        generator=torch.Generator().manual_seed(config.seed),  # else it draws from the one that the network draws from
        persistent_workers=config.workers > 0,
        pin_memory=device.type == "cuda",
    )


def _with_classes(config: RunConfig, train_data: DetectionDataset, val_data: DetectionDataset) -> RunConfig:
    """Set the head's size and names from the data; training and held-out data must agree."""
    categories = train_data.categories
    require_same_categories(categories, val_data.categories)
    model = dataclasses.replace(
        config.model,
        num_classes=len(categories),
        class_names=tuple(c.name for c in categories),
        category_ids=tuple(c.id for c in categories),
        score_thresholds=None,  # of another model, if any
    )
    return dataclasses.replace(config, model=model)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for libraries that still draw from it
    random.seed(seed)
