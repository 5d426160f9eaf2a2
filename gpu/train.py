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

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from smca.datasets import DetectionDataset
from smca.gpu.config import RunConfig
from smca.gpu.evaluation import detect, evaluate_detections
from smca.gpu.model.summary import summarize
from smca.gpu.pictures.run import draw_run
from smca.gpu.presets import PRESETS
from smca.gpu.training.checkpoint import CHECKPOINT_FILE, save_checkpoint
from smca.gpu.training.log import RunLog
from smca.gpu.training.optimizer import learning_rate_factor, set_learning_rates, update_average
from smca.gpu.training.setup import Criterion, Run, checkpoint_of, gather, most_objects, process_group, set_up

LOG_EVERY = 10
"""Steps between updates of the progress bar and TensorBoard."""


def train(
    config: RunConfig,
    *,
    train_data: DetectionDataset | None = None,
    val_data: DetectionDataset | None = None,
    criterion: Criterion | None = None,
) -> Path:
    """Train as `config` says (docs/extending.md has an example of each argument).

    Args:
        config: the run; a preset with changes (``smca.gpu.presets``), or ``parse`` of a command line.
        train_data: images to train on, in place of those that ``config.data`` names.
        val_data: held-out images, likewise; with the same categories.
        criterion: the loss, in place of ``SetCriterion(config.loss)``: (outputs, targets) → its terms, scalars by name, of which
            "loss" is minimised. outputs: "logits" [M, B, N, K], "boxes" [M, B, N, 4] cxcywh in 0–1, for M decoder layers.

    Returns:
        Folder of the final model (``SMCADETR.from_pretrained`` takes it).

    Raises:
        ValueError: configuration, data and loss that do not fit, found before anything is trained.
        NonFiniteError: loss or gradient is not finite; names term and layer. The last checkpoint stays as it was.
    """
    with process_group() as (rank, world):
        run = set_up(config, rank, world, train_data, val_data, criterion)
        with RunLog(
            run.config.output, run.total_steps, first_step=run.step, first_epoch=run.epoch, main_process=rank == 0
        ) as log:
            _announce(run, log)
            while run.step < run.total_steps:
                loss, images_per_second = _train_epoch(run, log)
                if run.epoch % run.config.eval_every == 0 or run.step >= run.total_steps:
                    _evaluate(run, log, loss, images_per_second)
                if rank == 0:
                    save_checkpoint(run.config.output / CHECKPOINT_FILE, checkpoint_of(run))
            if rank == 0:
                run.trained.save_pretrained(run.config.output / "model")
                draw_run(run.trained, run.val_data, log.metrics, run.config.output)
                log.say(_closing_message(run.config, log.metrics[-1]))
        del run.parallel  # it holds the process group, which ends next
        return run.config.output / "model"


def _train_epoch(run: Run, log: RunLog) -> tuple[float, float]:
    """Pass over the training images once, or up to the last step; returns the mean loss and images per second."""
    config, criterion, optimizer, check = run.config, run.criterion, run.optimizer, run.check
    run.augmented.set_epoch(run.epoch)
    run.sampler.set_epoch(run.epoch)
    run.parallel.train()
    first_step, sum_of_losses, start = run.step, torch.zeros((), device=run.device), time.perf_counter()
    for host_batch in itertools.islice(run.loader, run.total_steps - run.step):
        set_learning_rates(
            optimizer, run.base_lrs, learning_rate_factor(config.optim, run.step, run.epoch, run.total_steps)
        )

        # From here to the end of the step nothing waits for the GPU.
        batch = host_batch.to(run.device, non_blocking=True)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            outputs = run.parallel(
                batch.images.contiguous(memory_format=torch.channels_last),
                batch.padding_mask if host_batch.padding_mask.any() else None,
            )
        with check.keep_bad_batch(host_batch):
            terms = criterion(outputs, batch.targets)
        check.raise_if_not_finite()
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.optim.clip_norm)
        check.record(terms, norm, host_batch, optimizer)
        optimizer.step()
        if run.average is not None:
            update_average(run.average, run.model, min(config.optim.ema_decay, (1 + run.step) / (10 + run.step)))

        run.step += 1
        sum_of_losses += terms["loss"].detach()
        if run.step % LOG_EVERY == 0:
            speed = (run.step - first_step) * config.batch_size / (time.perf_counter() - start)
            log.step(f"epoch {run.epoch + 1}", run.step, check.values, optimizer.param_groups[0]["lr"], speed)
    check.raise_if_not_finite()
    run.epoch += 1
    steps, seconds = run.step - first_step, time.perf_counter() - start
    run.train_seconds += seconds
    return sum_of_losses.item() / max(steps, 1), steps * config.batch_size / seconds


def _evaluate(run: Run, log: RunLog, loss: float, images_per_second: float) -> None:
    """COCO's metrics of the held-out images, of which each process takes its part."""
    results = gather(detect(run.trained, run.val_loader), run.world)
    if run.rank != 0:
        return
    metrics = evaluate_detections(run.val_data.ground_truth(), results)
    log.evaluation(
        {
            "epoch": run.epoch,
            "step": run.step,
            "loss": loss,
            **metrics.as_dict(),
            "train_seconds": round(run.train_seconds, 1),
            "images_per_second": images_per_second,
        }
    )


def _announce(run: Run, log: RunLog) -> None:
    """What is about to be trained, on what."""
    config, world = run.config, run.world
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    log.say(f"training images: {run.train_data.report}\nheld-out images: {run.val_data.report}")
    log.say(
        f"{config.model.cross_attention} · {parameters:.1f} M parameters · {len(run.loader)} steps per epoch, "
        f"{run.total_steps} in all · {run.device} · {world} process{'es' * (world > 1)} · {torch.get_num_threads()} threads"
    )
    if (most := most_objects(run.train_data)) > config.model.num_queries:
        log.say(
            f"warning: an image has {most} objects, but the model has {config.model.num_queries} queries, one for each "
            f"object it can find: set --model.num-queries to {most * 3 // 2} or so"
        )


def _closing_message(config: RunConfig, last: dict[str, Any]) -> str:
    ap, ap50 = ("–" if last[k] is None else f"{last[k]:.3f}" for k in ("ap", "ap50"))
    data = "" if config.data == "synthetic" else f" --data {config.data}"
    evaluate = f"  smca evaluate {config.output}/model{data}\n" if config.data else ""
    return (
        f"\ndone: AP {ap}, AP50 {ap50} on the held-out images after {last['train_seconds']:.0f} s of training.\n"
        f"In {config.output}:\n"
        f"  model/            config.json + model.safetensors\n"
        f"  predictions.png   detections beside the truth\n"
        f"  curves.png        loss and AP by epoch (metrics.jsonl, tensorboard/)\n"
        f"  checkpoint.pt     everything that --resume needs\n"
        f"next:\n"
        f"{evaluate}"
        f"  smca predict {config.output}/model YOUR_IMAGES\n"
        f"  smca train small --data YOUR_COCO_FOLDER"
    )


def parse(
    argv: list[str], presets: Mapping[str, Callable[[], RunConfig]] = PRESETS, prog: str = "smca train"
) -> RunConfig:
    """Command line → configuration: a preset's name (if none, "small" or else the first), then single fields.

    Raises:
        ValueError: a preset, or a combination of fields, that does not exist.
        SystemExit: --help, and fields that do not exist or are not of their type.
    """
    default = "small" if "small" in presets else next(iter(presets))
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (default, argv)
    if name not in presets:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(presets)}")
    width = max(map(len, presets))
    listing = "\n".join(f"  {n:{width}} {(f.__doc__ or '').strip()}" for n, f in presets.items())
    return tyro.cli(
        RunConfig,
        args=rest,
        default=presets[name](),
        prog=f"{prog} {name}",
        description=f"Train a detector.\n\n{prog} [preset] [options]; the presets:\n{listing}",
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
