"""Train a detector.

    smca train demo                                   the built-in data on a CPU, a few minutes
    smca train small --data DIR                       your COCO-format data, from scratch, on a laptop
    smca train smca_r50 --data coco --device cuda     the published setting on one GPU
    torchrun --nproc-per-node 8 gpu/train.py smca_r50 --data coco
    smca train small --data DIR --resume              go on where it stopped
    smca train smca_r50_multiscale --dry-run          parameters and multiply-adds; trains nothing
    smca train small --help                           every knob with its default

``python gpu/train.py`` and ``smca train`` are the same. A run leaves in its --output folder: checkpoint.pt, metrics.jsonl,
tensorboard/, curves.png, predictions.png, model/ (config.json + model.safetensors, what ``smca predict`` takes).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from smca.datasets import Augmented, collate, require_same_categories
from smca.gpu.config import RunConfig
from smca.gpu.evaluation import (
    DetectionData,
    detect,
    evaluate_detections,
    evaluation_loader,
    open_split,
    pick_device,
)
from smca.gpu.loss import SetCriterion
from smca.gpu.model import SMCADETR
from smca.gpu.model.summary import summarize
from smca.gpu.pictures.run import draw_run
from smca.gpu.presets import PRESETS
from smca.gpu.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from smca.gpu.training.guard import BAD_BATCH_FILE, FiniteCheck
from smca.gpu.training.log import RunLog
from smca.gpu.training.optimizer import lr_factor, make_optimizer, update_average

LOG_EVERY = 10
"""Steps between updates of the progress bar and TensorBoard."""
TARGET_BUCKET = 16
"""Targets are padded to multiples of this if images are padded to multiples of ``RunConfig.shape_bucket``: COCO's images have
7 objects on average and 63 at most."""


def train(config: RunConfig) -> Path:
    """Train as `config` says; returns the folder of the final model (``SMCADETR.from_pretrained`` takes it).

    Raises:
        ValueError: configuration and data that do not fit, found before anything is trained.
        NonFiniteError: loss or gradient is not finite; names term and layer. The last checkpoint stays as it was.
    """
    with _process_group() as (rank, world):
        device = pick_device(config.device)
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        _prepare_output(config, rank)
        _seed(config.seed)

        # Data; the model's classes follow from it.
        train_data = open_split(config.data, "train", config.synthetic, cache=config.cache_images)
        val_data = open_split(config.data, "val", config.synthetic, cache=config.cache_images)
        config = _with_classes(config, train_data, val_data)
        augmented = Augmented(train_data, config.augmentation, config.seed)
        sampler: DistributedSampler[Any] = DistributedSampler(augmented, world, rank, shuffle=True, seed=config.seed)
        if config.batch_size % world:
            raise ValueError(f"batch_size = {config.batch_size} images a step cannot be split over {world} processes")
        per_process = config.batch_size // world
        loader = DataLoader(
            augmented,
            per_process,
            sampler=sampler,
            collate_fn=partial(
                collate,
                size_divisor=config.shape_bucket,
                target_divisor=TARGET_BUCKET if config.shape_bucket > 1 else 1,
            ),
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            pin_memory=device.type == "cuda",
            drop_last=len(sampler) >= per_process,
        )
        val_loader = evaluation_loader(
            val_data, config.model, config.eval_batch_size, config.workers, range(rank, len(val_data), world)
        )
        total_steps = config.epochs * len(loader)
        if config.max_steps is not None:
            total_steps = min(total_steps, config.max_steps)

        # Model, loss, optimiser.
        model = SMCADETR(config.model, attention_backend=config.attention).to(device)
        model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        average = copy.deepcopy(model).requires_grad_(False) if config.optim.ema_decay else None
        criterion = SetCriterion(config.loss)
        if config.compile:
            model.compile()
            criterion.compile()
        optimizer = make_optimizer(model, config.optim, device)
        base_lrs = [group["lr"] for group in optimizer.param_groups]
        # After the optimiser, which may freeze the backbone: only what is trained is synchronised.
        parallel = DistributedDataParallel(model, [device] if device.type == "cuda" else None) if world > 1 else model

        step, epoch, train_seconds = 0, 0, 0.0
        checkpoint_path = config.output / CHECKPOINT_FILE
        if config.resume:
            state = load_checkpoint(checkpoint_path)
            _check_resumable(state, config, checkpoint_path)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if average is not None:
                average.load_state_dict(state["average"])
            torch.set_rng_state(state["rng"])
            step, epoch, train_seconds = state["step"], state["epoch"], state["train_seconds"]

        file_name = BAD_BATCH_FILE if rank == 0 else f"rank{rank}_{BAD_BATCH_FILE}"
        check = FiniteCheck(model, config.output, delayed=device.type == "cuda", file_name=file_name)
        with RunLog(config.output, total_steps, first_step=step, first_epoch=epoch, main_process=rank == 0) as log:
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            log.say(f"training images: {train_data.report}\nheld-out images: {val_data.report}")
            log.say(
                f"{config.model.cross_attention} · {parameters:.1f} M parameters · {len(loader)} steps an epoch, "
                f"{total_steps} in all · {device} · {world} process{'es' * (world > 1)} · {torch.get_num_threads()} threads"
            )
            if (most := _most_objects(train_data)) > config.model.num_queries:
                log.say(
                    f"warning: an image has {most} objects, but the model has {config.model.num_queries} queries, one for each "
                    f"object it can find: set --model.num-queries to {most * 3 // 2} or so"
                )
            while step < total_steps:
                augmented.set_epoch(epoch)
                sampler.set_epoch(epoch)
                parallel.train()
                epoch_loss, epoch_steps, epoch_start = torch.zeros((), device=device), 0, time.perf_counter()
                for host_batch in loader:
                    if step >= total_steps:
                        break
                    factor = lr_factor(config.optim, step, epoch, total_steps)
                    for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
                        group["lr"] = base * factor

                    # From here to the end of the step nothing waits for the GPU.
                    batch = host_batch.to(device, non_blocking=True)
                    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                        outputs = parallel(
                            batch.images.contiguous(memory_format=torch.channels_last),
                            batch.padding_mask if host_batch.padding_mask.any() else None,
                        )
                    with check.keeping(host_batch):
                        terms = criterion(outputs, batch.targets)
                    check.look()
                    optimizer.zero_grad(set_to_none=True)
                    terms["loss"].backward()
                    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
                    check.watch(terms, norm, host_batch, optimizer)
                    optimizer.step()
                    if average is not None:
                        update_average(average, model, min(config.optim.ema_decay, (1 + step) / (10 + step)))

                    step += 1
                    epoch_steps += 1
                    epoch_loss += terms["loss"].detach()
                    if step % LOG_EVERY == 0:
                        speed = epoch_steps * config.batch_size / (time.perf_counter() - epoch_start)
                        log.step(f"epoch {epoch + 1}", step, check.values, optimizer.param_groups[0]["lr"], speed)
                check.look()
                epoch += 1
                seconds = time.perf_counter() - epoch_start
                train_seconds += seconds

                if epoch % config.eval_every == 0 or step >= total_steps:
                    results = _gather(detect(average or model, val_loader), world)
                    if rank == 0:
                        metrics = evaluate_detections(val_data.ground_truth(), results)
                        log.evaluation(
                            {
                                "epoch": epoch,
                                "step": step,
                                "loss": epoch_loss.item() / max(epoch_steps, 1),
                                **metrics.as_dict(),
                                "train_seconds": round(train_seconds, 1),
                                "images_per_second": epoch_steps * config.batch_size / seconds,
                            }
                        )
                if rank == 0:
                    save_checkpoint(
                        checkpoint_path,
                        {
                            "config": config.model.to_json(),
                            "model": model.state_dict(),
                            "average": average.state_dict() if average is not None else None,
                            "optimizer": optimizer.state_dict(),
                            "rng": torch.get_rng_state(),
                            "step": step,
                            "epoch": epoch,
                            "total_steps": total_steps,
                            "train_seconds": train_seconds,
                        },
                    )

            model_dir = config.output / "model"
            if rank == 0:
                final = average or model
                final.save_pretrained(model_dir)
                draw_run(final, val_data, log.metrics, config.output)
                log.say(_closing_message(config, log.metrics[-1]))
        del parallel  # it holds the process group, which ends next
        return model_dir


def _with_classes(config: RunConfig, train_data: DetectionData, val_data: DetectionData) -> RunConfig:
    """Set the head's size and names from the data; training and held-out data must agree."""
    categories = train_data.categories
    require_same_categories(categories, val_data.categories)
    model = dataclasses.replace(
        config.model,
        num_classes=len(categories),
        class_names=tuple(c.name for c in categories),
        category_ids=tuple(c.id for c in categories),
    )
    return dataclasses.replace(config, model=model)


def _most_objects(data: DetectionData) -> int:
    """Objects in the fullest image, crowds not counted."""
    counts = Counter(a["image_id"] for a in data.ground_truth()["annotations"] if not a["iscrowd"])
    return max(counts.values(), default=0)


def _prepare_output(config: RunConfig, rank: int) -> None:
    checkpoint = config.output / CHECKPOINT_FILE
    if checkpoint.exists() and not (config.resume or config.overwrite):
        raise ValueError(
            f"{config.output} already holds a run: --resume goes on with it, --overwrite starts anew, --output puts it elsewhere"
        )
    if rank == 0:
        config.output.mkdir(parents=True, exist_ok=True)


def _check_resumable(state: dict[str, Any], config: RunConfig, path: Path) -> None:
    if state["config"] != config.model.to_json():
        raise ValueError(
            f"{path} belongs to a model configured otherwise: resume with the settings it was started with, or use --overwrite"
        )
    if (state["average"] is None) != (config.optim.ema_decay == 0):
        raise ValueError(
            f"{path} was trained {'without' if state['average'] is None else 'with'} optim.ema_decay: resume likewise"
        )


@contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """(rank, world size); joins the group that torchrun set up, if it did."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
        distributed.barrier()  # the others wait for what the first writes: a group that ends by halves may hang
    finally:
        distributed.destroy_process_group()


def _gather(results: list[dict[str, Any]], world: int) -> list[dict[str, Any]]:
    if world == 1:
        return results
    parts: list[list[dict[str, Any]] | None] = [None] * world
    distributed.all_gather_object(parts, results)
    return [result for part in parts for result in part or []]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for libraries that still draw from it
    random.seed(seed)


def _closing_message(config: RunConfig, last: dict[str, Any]) -> str:
    ap, ap50 = ("–" if last[k] is None else f"{last[k]:.3f}" for k in ("ap", "ap50"))
    data = "" if config.data == "synthetic" else f" --data {config.data}"
    return (
        f"\ndone: AP {ap}, AP50 {ap50} on the held-out images after {last['train_seconds']:.0f} s of training.\n"
        f"In {config.output}:\n"
        f"  model/            config.json + model.safetensors\n"
        f"  predictions.png   detections beside the truth\n"
        f"  curves.png        loss and AP by epoch (metrics.jsonl, tensorboard/)\n"
        f"  checkpoint.pt     everything that --resume needs\n"
        f"next:\n"
        f"  smca evaluate {config.output}/model{data}\n"
        f"  smca predict {config.output}/model YOUR_IMAGES\n"
        f"  smca train small --data YOUR_COCO_FOLDER"
    )


def parse(argv: list[str]) -> RunConfig:
    """Command line → configuration: a preset's name (default "small"), then single fields."""
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("small", argv)
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    width = max(map(len, PRESETS))
    listing = "\n".join(f"  {n:{width}} {(f.__doc__ or '').strip()}" for n, f in PRESETS.items())
    return tyro.cli(
        RunConfig,
        args=rest,
        default=PRESETS[name](),
        prog=f"smca train {name}",
        description=f"Train a detector.\n\nsmca train [preset] [options]; the presets:\n{listing}",
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca train``."""
    config = parse(sys.argv[1:] if argv is None else argv)
    if config.dry_run:
        print(summarize(config.model))
    else:
        train(config)


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
