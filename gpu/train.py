"""Train a detector.

    smca train demo                                   the built-in data on a CPU, a few minutes
    smca train small --data DIR                       your COCO-format data, from scratch, on a laptop
    smca train smca_r50 --data coco --device cuda     the published setting on one GPU
    torchrun --nproc-per-node 8 gpu/train.py smca_r50 --data coco
    smca train small --data DIR --resume              go on where it stopped
    smca train smca_r50_multiscale --dry-run          parameters and multiply-adds; trains nothing
    smca train small --help                           every knob with its default

``python gpu/train.py`` and ``smca train`` are the same. A run leaves in its --output folder: checkpoint.pt, metrics.jsonl,
tensorboard/, curves.png, predictions.png, model/ and best/ (config.json + model.safetensors, what ``smca predict`` takes).
"""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from smca.datasets import DetectionDataset
from smca.gpu.config import RunConfig
from smca.gpu.evaluation import detect, evaluate_detections
from smca.gpu.files import CHECKPOINT_FILE, MODEL_FOLDER, save_checkpoint
from smca.gpu.model.summary import summarize
from smca.gpu.pictures.run import draw_run
from smca.gpu.presets import PRESETS
from smca.gpu.training.log import RunLog
from smca.gpu.training.optimizer import learning_rate_factor, set_learning_rates, update_average
from smca.gpu.training.resume import BEST_FOLDER, checkpoint_of, claim, clear, resume
from smca.gpu.training.setup import (
    Criterion,
    Run,
    as_the_first_says,
    gather,
    mean_over_processes,
    process_group,
    set_up,
    share_buffers,
)

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
            "loss" is minimised. outputs: "logits" [M, B, N, K], "boxes" [M, B, N, 4] cxcywh in 0–1, for M decoder layers. The
            losses of a dense head and of noised queries are added to it, unless it returns them itself.

    Returns:
        Folder of the final model (``SMCADETR.from_pretrained`` takes it).

    Raises:
        ValueError: configuration, data and loss that do not fit, found before anything is trained.
        NonFiniteError: loss or gradient is not finite; names term and layer. The last checkpoint stays as it was.
    """
    claim(config)
    with process_group() as (rank, world):
        run = set_up(config, rank, world, train_data, val_data, criterion)
        if rank == 0:
            _require_boxes(run)
        if config.resume:
            resume(run)
        elif rank == 0:
            clear(config.output)
        with RunLog(
            config.output, run.total_steps, first_step=run.step, first_epoch=run.epoch, main_process=rank == 0
        ) as log:
            try:
                _train(run, log)
            except KeyboardInterrupt:
                if rank == 0:
                    log.say(_keep_interrupted(run))
                raise
            if rank == 0:
                draw_run(run.trained, run.val_data, log.metrics, config.output)
                log.say(_closing_message(run.config, log.metrics))
        del run.parallel  # it holds the process group, which ends next
        return config.output / MODEL_FOLDER


def _train(run: Run, log: RunLog) -> None:
    """All epochs that are left. What is needed to go on, and a model, are on disk before anything else can go wrong."""
    first, path = run.rank == 0, run.config.output / CHECKPOINT_FILE
    if first:
        _announce(run, log)
        if not run.config.resume:
            save_checkpoint(path, checkpoint_of(run))
    if run.epoch and _is_due(run):
        evaluated = first and bool(log.metrics) and log.metrics[-1]["epoch"] == run.epoch
        if not as_the_first_says(evaluated, run):
            _evaluate(run, log)  # the run was stopped between its checkpoint and its evaluation
    while run.step < run.total_steps:
        _train_epoch(run, log)
        share_buffers(run)
        if first:
            save_checkpoint(path, checkpoint_of(run))
        if _is_due(run):
            _evaluate(run, log)


def _is_due(run: Run) -> bool:
    """Whether the epoch that has just ended is to be evaluated."""
    return run.epoch % run.config.eval_every == 0 or run.step >= run.total_steps


def _train_epoch(run: Run, log: RunLog) -> None:
    """Pass over the training images once, or up to the last step."""
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
                batch.targets,
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
            terms_of_all = mean_over_processes(check.values, run)
            log.step(f"epoch {run.epoch + 1}", run.step, terms_of_all, optimizer.param_groups[0]["lr"], speed)
    check.raise_if_not_finite()
    run.epoch += 1
    steps, seconds = run.step - first_step, time.perf_counter() - start
    run.train_seconds += seconds
    run.images_per_second = steps * config.batch_size / seconds
    run.loss = mean_over_processes({"loss": sum_of_losses.item() / max(steps, 1)}, run)["loss"]


def _evaluate(run: Run, log: RunLog) -> None:
    """COCO's metrics of the held-out images, of which each process takes its part. The model is saved before, and again if it is
    the best so far."""
    output = run.config.output
    if run.rank == 0:
        run.trained.save_pretrained(output / MODEL_FOLDER)
    results = gather(detect(run.trained, run.val_loader), run.world)
    if run.rank != 0:
        return
    evaluated = evaluate_detections(run.val_truth, results)
    metrics = evaluated.as_dict()
    best = _best(log.metrics)
    if metrics["ap"] is not None and (best is None or metrics["ap"] > best["ap"]):
        run.trained.save_pretrained(output / BEST_FOLDER)
    log.evaluation(
        {
            "epoch": run.epoch,
            "step": run.step,
            "loss": run.loss,
            **metrics,
            "train_seconds": round(run.train_seconds, 1),
            "images_per_second": run.images_per_second,
        }
    )
    if run.step >= run.total_steps:
        for note in evaluated.notes:
            log.say(f"note: {note}")


def _best(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation of the highest AP, the first of equals; None without any AP."""
    return max((line for line in metrics if line["ap"] is not None), key=lambda line: line["ap"], default=None)


def _require_boxes(run: Run) -> None:
    if not run.train_report.boxes:
        raise ValueError(
            f"there is no box to train on (training images: {run.train_report}): a detector that never sees an object learns "
            "to find none; is this the right annotation file, and do its annotations have boxes?"
        )


def _keep_interrupted(run: Run) -> str:
    """Save the model as it is; what to say."""
    if run.step:
        run.trained.save_pretrained(run.config.output / MODEL_FOLDER)
    saved = f"{run.config.output / MODEL_FOLDER} has its weights; " if run.step else ""
    return f"stopped at step {run.step}: {saved}`smca train … --resume` continues from the end of epoch {run.epoch}"


def _announce(run: Run, log: RunLog) -> None:
    """What is about to be trained, on what."""
    config, world = run.config, run.world
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    log.say(f"training images: {run.train_report}\nheld-out images: {run.val_report}")
    log.say(
        f"{config.model.cross_attention} · {parameters:.1f} M parameters · {len(run.loader)} steps per epoch, "
        f"{run.total_steps} in all · {run.device} · {world} process{'es' * (world > 1)} · {torch.get_num_threads()} threads"
    )
    if (most := run.most_objects) > config.model.num_queries:
        log.say(
            f"warning: an image has {most} objects, but the model has {config.model.num_queries} queries, one for each "
            f"object it can find: set --model.num-queries to {most * 3 // 2} or so"
        )


def _closing_message(config: RunConfig, metrics: list[dict[str, Any]]) -> str:
    last, best = metrics[-1], _best(metrics)
    ap, ap50 = ("–" if last[k] is None else f"{last[k]:.3f}" for k in ("ap", "ap50"))
    evaluate = f"  smca evaluate {config.output}/model{_held_out(config)}\n" if config.data or config.val_json else ""
    of_best = (
        ""
        if best is None
        else f"  best/             that of the highest AP, {best['ap']:.3f} after epoch {best['epoch']}\n"
    )
    return (
        f"\ndone: AP {ap}, AP50 {ap50} on the held-out images after {last['train_seconds']:.0f} s of training.\n"
        f"In {config.output}:\n"
        f"  model/            config.json + model.safetensors\n"
        f"{of_best}"
        f"  predictions.png   detections beside the truth\n"
        f"  curves.png        loss and AP by epoch (metrics.jsonl, tensorboard/)\n"
        f"  checkpoint.pt     everything that --resume needs\n"
        f"next:\n"
        f"{evaluate}"
        f"  smca predict {config.output}/model YOUR_IMAGES\n"
        f"  smca train small --data YOUR_COCO_FOLDER"
    )


def _held_out(config: RunConfig) -> str:
    """Options of ``smca evaluate`` that name the held-out images and say how to understand their annotations."""
    options: dict[str, object] = {"data": None if config.data == "synthetic" or config.val_json else config.data}
    options |= {"json": config.val_json, "images": config.val_images}
    options |= {f"annotations.{k.replace('_', '-')}": v for k, v in asdict(config.annotations).items() if v != "auto"}
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop: as Ctrl-C
    if config.dry_run:
        print(summarize(config.model))
    else:
        train(config)


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
