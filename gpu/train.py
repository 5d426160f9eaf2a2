"""Train a detector.

    smca train demo                                   the built-in data on a CPU, a few minutes
    smca train small --data DIR                       your COCO-format data, from scratch, on a laptop
    smca train smca_r50 --data coco --device cuda     the published setting on one GPU
    torchrun --nproc-per-node 8 gpu/train.py smca_r50 --data coco
    smca train small --data DIR --fast-dev-run        everything once, within a minute, beside the real run
    smca train small --data DIR --resume              go on where it stopped
    smca train --replay runs/x/bad_step.safetensors   the step that stopped a run at a NaN, again, and where it arises
    smca train small --data DIR --init runs/x         start from a trained model: this project's, DETR's …
    smca train smca_r50_multiscale --dry-run          parameters and multiply-adds; trains nothing
    smca train small --help                           every knob with its default

``python gpu/train.py`` and ``smca train`` are the same. A run leaves in its --output folder: model/, of the best evaluation, and
model_last/ (config.json + model.safetensors, what ``smca predict`` takes); metrics.jsonl, tensorboard/, curves.png and
predictions.png; priors.png (of priors.jsonl: where queries look and how wide, drawn anew at every evaluation); checkpoint.pt.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import tyro
from torch import Tensor

from smca.datasets import Batch, DetectionDataset
from smca.gpu.config import RunConfig
from smca.gpu.evaluation import detect, evaluate_detections, warnings_of, why_ap_is_zero
from smca.gpu.evaluation.operating_point import operating_points, thresholds_of
from smca.gpu.files import LAST_FOLDER, MODEL_FOLDER, write_thresholds
from smca.gpu.model import SMCADETR
from smca.gpu.model.summary import summarize
from smca.gpu.pictures.run import draw_run
from smca.gpu.presets import PRESETS
from smca.gpu.training.batch_size import find_batch_size, found_message
from smca.gpu.training.determinism import deterministic, without_denormals
from smca.gpu.training.fast_run import prepare, report, shortened
from smca.gpu.training.lock import only_run_in
from smca.gpu.training.log import RunLog
from smca.gpu.training.optimizer import learning_rate_factor, set_learning_rates
from smca.gpu.training.order import seed_step
from smca.gpu.training.priors import PRIORS_PICTURE, note_priors
from smca.gpu.training.processes import (
    as_the_first_says,
    gather,
    mean_over_processes,
    process_group,
    share_buffers,
    wait_for_all,
)
from smca.gpu.training.replay import replay
from smca.gpu.training.resume import claim, clear, plain, resume, save
from smca.gpu.training.setup import Criterion, Run, set_batch_size, set_up
from smca.gpu.training.sharding import unsharded, whole_weights
from smca.gpu.training.step import take_step
from smca.gpu.training.stop import Stop, StoppedError
from smca.gpu.training.trackers import Tracker, make_trackers
from smca.gpu.weights import open_source, plan_start

LOG_EVERY = 10
"""Steps between updates of the progress bar and of trackers."""
MUCH_WAITING = 1 / 3
"""Of an epoch's time: if steps wait longer for images, training says so."""


def train(
    config: RunConfig,
    *,
    train_data: DetectionDataset | None = None,
    val_data: DetectionDataset | None = None,
    criterion: Criterion | None = None,
    trackers: Sequence[Tracker] = (),
) -> Path:
    """Train as `config` says (docs/extending.md has an example of each argument).

    Args:
        config: the run; a preset with changes (``smca.gpu.presets``), or ``parse`` of a command line.
        train_data: images to train on, in place of those that ``config.data`` names.
        val_data: held-out images, likewise; with the same categories.
        criterion: the loss, in place of ``SetCriterion(config.loss)``: (outputs, targets) → its terms, scalars by name, of which
            "loss" is minimised. outputs: "logits" [M, B, N, K], "boxes" [M, B, N, 4] cxcywh in 0–1, for M decoder layers. The
            losses of a dense head and of noised queries are added to it, unless it returns them itself.
        trackers: of your own, beside those that ``config.trackers`` names.

    Returns:
        Folder of the best model (``SMCADETR.from_pretrained`` takes it).

    Raises:
        ValueError: configuration, data and loss that do not fit, found before anything is trained.
        NonFiniteError: loss or gradient is not finite; names term and layer. The last checkpoint stays as it was.
        OSError: the folder cannot be written to, or a file in it; says which, why, and how much space is left.
    """
    started, whole = time.monotonic(), config
    config = claim(shortened(config) if config.fast_dev_run else config)
    trackers = [*make_trackers(config.trackers, config.output), *trackers]
    with (
        Stop() as stop,
        deterministic(config.deterministic),
        without_denormals(),
        process_group() as (rank, world),
        only_run_in(config.output) if rank == 0 else nullcontext(),
    ):
        run = set_up(config, rank, world, train_data, val_data, criterion)
        run.ends_at = started + 60 * (config.max_minutes or math.inf)
        if rank == 0:
            _require_boxes(run)
        notes = []
        if config.batch_size == "auto":
            set_batch_size(run, find_batch_size(run, _train_epoch))
            notes.append(found_message(run))
        if config.fast_dev_run:
            notes.append(prepare(run, _train_epoch))
        if config.resume:
            resume(run)
        elif rank == 0:
            clear(config.output)
        with RunLog(
            config.output,
            run.total_steps,
            first_step=run.step,
            main_process=rank == 0,
            logged=run.logged,
            trackers=trackers,
            settings=plain(asdict(run.config)),
        ) as log:
            for note in () if config.fast_dev_run else notes:
                log.say(note)
            try:
                _train(run, log, stop)
            except StoppedError as error:
                log.say(_stopped_message(run, error))
                raise
            if rank == 0:
                best = SMCADETR.from_pretrained(config.output / MODEL_FOLDER).to(run.device)
                draw_run(best, run.val_data, log.metrics, config.output)
                log.say(report(run, whole, notes) if config.fast_dev_run else _closing_message(run, log.metrics))
        del run.parallel  # it holds the process group, which ends next
        return config.output / MODEL_FOLDER


def _train(run: Run, log: RunLog, stop: Stop) -> None:
    """All epochs that are left. What is needed to go on, and a model, are on disk before anything else can go wrong."""
    if run.rank == 0:
        _announce(run, log)
    if not run.config.resume:
        _save(run, log)
    if run.step and _is_due(run):
        evaluated = bool(log.metrics) and log.metrics[-1]["step"] == run.step
        if not as_the_first_says(evaluated, run):
            _evaluate(run, log)  # the run was stopped between its checkpoint and its evaluation
    while run.step < run.total_steps and not as_the_first_says(_is_patience_over(run, log), run):
        stop.waits = True
        _train_epoch(run, log, stop)
        share_buffers(run)
        run.evaluate_now = as_the_first_says(_is_time_over(run), run)
        _save(run, log)
        stop.waits = False
        if number := stop.agreed(run.world, run.device):
            _stop(run, log, number)
        if _is_due(run):
            _evaluate(run, log)
            if run.step < run.total_steps and as_the_first_says(_is_time_over(run), run):
                over = f"ended at step {run.step} of {run.total_steps}: {run.config.max_minutes} minutes are over (--max-minutes)"
                log.say(over if run.config.fast_dev_run else f"{over}; `smca train … --resume` goes on from there")
                return


def _is_due(run: Run) -> bool:
    """Whether the weights are to be evaluated as they are."""
    return run.evaluate_now or _is_planned(run)


def _is_planned(run: Run) -> bool:
    """Whether they are in any run with these settings, however long its starts take."""
    return run.step >= run.total_steps or (run.batch == 0 and run.epoch % run.config.eval_every == 0)


def _is_time_over(run: Run) -> bool:
    return time.monotonic() >= run.ends_at


def _is_patience_over(run: Run, log: RunLog) -> bool:
    """Whether the last evaluations were no better than one before them. (The first process alone knows.)"""
    planned = [line for line in log.metrics if not line.get("extra")]
    patience, best = run.config.patience, _best(planned, run.config.best_by)
    if patience is None or best is None:
        return False
    later = len([line for line in planned if line["step"] > best["step"]])
    if later >= patience:
        log.say(f"ended at step {run.step}: {later} evaluations in a row without a better one (--patience {patience})")
    return later >= patience


def _save(run: Run, log: RunLog) -> None:
    """Put everything on disk that going on from here takes."""
    run.check.raise_if_not_finite()
    if run.rank == 0:
        log.flush()
    save(run)
    run.saved_step, run.saved_at = run.step, time.monotonic()


def _whole_weights(run: Run) -> dict[str, Tensor] | None:
    """Of what is evaluated and saved: what the first process is to write, if it does not have them all. Every process must ask."""
    return whole_weights(run.trained, keep=run.rank == 0) if run.config.fsdp else None


def _stop(run: Run, log: RunLog, number: int) -> NoReturn:
    """End the run after a signal, at a step that all processes have done."""
    if run.saved_step != run.step:
        _save(run, log)
    if run.step:
        weights = _whole_weights(run)
        if run.rank == 0:
            run.trained.save_pretrained(run.config.output / LAST_FOLDER, state_dict=weights)
    wait_for_all(run)  # torchrun ends the others as soon as one has ended
    raise StoppedError(number)


def _train_epoch(run: Run, log: RunLog, stop: Stop) -> None:
    """Take the steps of an epoch that are left, up to the last step of all or the end of the time."""
    config, optimizer, check = run.config, run.optimizer, run.check
    run.evaluate_now = False
    run.augmented.set_epoch(run.epoch)
    run.batches.start_at(run.epoch, run.batch)
    run.parallel.train()
    first_step, start, skipped = run.step, time.perf_counter(), check.skipped
    before, waits = run.train_seconds, list[float]()
    loaded = _in_parts(run.loader, config.accumulate, waits)
    for parts in itertools.islice(_saving_first(loaded, run, log), run.total_steps - run.step):
        run.data_seconds += waits[-1]
        lr_factor = learning_rate_factor(config.optim, run.step, run.epoch, run.total_steps)
        set_learning_rates(optimizer, run.base_lrs, lr_factor)
        seed_step(run.device, config.seed, run.step, run.rank)
        terms, _ = take_step(run, parts, lr_factor)

        run.step, run.batch, run.logged = run.step + 1, run.batch + 1, {}
        run.sum_of_losses += terms["loss"]
        elapsed = time.perf_counter() - start
        run.train_seconds = before + elapsed
        if run.step % LOG_EVERY == 0:
            means = mean_over_processes({**check.values, "": run.sum_of_losses.item()}, run)
            run.sum_of_losses.fill_(means.pop(""))
            run.logged = {**means, "lr": optimizer.param_groups[0]["lr"]}
            speed = (run.step - first_step) * run.batches.batch_size / elapsed
            log.step(f"epoch {run.epoch + 1}", run.step, run.logged, speed, sum(waits) / elapsed)
        # Several processes agree now and then, one need not; the end of an epoch is saved anyway.
        if (run.world == 1 or run.step % LOG_EVERY == 0) and run.batch < len(run.batches):
            if number := stop.agreed(run.world, run.device):
                _stop(run, log, number)
            if as_the_first_says(_is_time_over(run), run):
                break
            if as_the_first_says(time.monotonic() - run.saved_at >= 60 * config.checkpoint_every, run):
                _save(run, log)
    check.raise_if_not_finite()
    if check.skipped > skipped:
        log.say(f"epoch {run.epoch + 1}: {check.skipped - skipped} steps left out, whose gradients overflowed float16")
    steps, seconds = run.step - first_step, time.perf_counter() - start
    run.train_seconds = before + seconds
    run.images_per_second = steps * run.batches.batch_size / seconds
    # The first wait is for the processes that load images to start.
    local = {"loss": run.sum_of_losses.item() / max(run.batch, 1), "waiting": sum(waits[1:]) / seconds}
    means = mean_over_processes(local, run)
    run.loss = means["loss"]
    if means["waiting"] > MUCH_WAITING and steps >= LOG_EVERY:
        log.warn_of_waiting(means["waiting"], config.workers, config.cache_images)
    if run.batch == len(run.batches):
        run.epoch, run.batch = run.epoch + 1, 0
        run.sum_of_losses.zero_()


def _in_parts(loader: Iterable[Batch], parts: int, waits: list[float]) -> Iterator[tuple[Batch, ...]]:
    """As many batches of the loader as a step has parts. The seconds until they have come are added to `waits`."""
    batches, start = iter(loader), time.perf_counter()
    while len(step := tuple(itertools.islice(batches, parts))) == parts:
        waits.append(time.perf_counter() - start)
        yield step
        start = time.perf_counter()


def _saving_first(steps: Iterator[tuple[Batch, ...]], run: Run, log: RunLog) -> Iterator[tuple[Batch, ...]]:
    """`steps`; if one cannot be loaded, all steps before it are saved before its error is raised. (Of several processes, the others
    are in the middle of that step.)"""
    try:
        yield from steps
    except Exception:  # whatever a dataset raises
        if run.world == 1 and run.saved_step != run.step:
            _save(run, log)
            log.say(f"step {run.step} is saved: `smca train … --resume` goes on from there once the cause is removed")
        raise


def _evaluate(run: Run, log: RunLog) -> None:
    """COCO's metrics of the held-out images, of which each process takes its part. The model is saved before, and again if it is
    the best so far; both get the score thresholds of best F1 before the metrics are logged: a run that goes on evaluates anew what
    is not."""
    output, weights = run.config.output, _whole_weights(run)
    if run.rank == 0:
        run.trained.save_pretrained(output / LAST_FOLDER, state_dict=weights)
    with unsharded(run.trained):
        results = gather(detect(run.trained, run.val_loader), run.world)
        if run.rank == 0:
            note_priors(run, [line["step"] for line in log.metrics])
    if run.rank != 0:
        return
    evaluated = evaluate_detections(run.val_truth, results)
    thresholds = thresholds_of(operating_points(run.val_truth, results), run.config.model.category_ids)
    write_thresholds(output / LAST_FOLDER, thresholds)
    metrics = {
        "epoch": run.epoch + (run.batch > 0),
        "step": run.step,
        "loss": run.loss,
        **evaluated.as_dict(),
        "train_seconds": round(run.train_seconds, 1),
        "data_seconds": round(run.data_seconds, 1),
        "images_per_second": run.images_per_second,
    }
    if not _is_planned(run):
        metrics["extra"] = True
    if _best([*log.metrics, metrics], run.config.best_by) is metrics:
        run.trained.save_pretrained(output / MODEL_FOLDER, state_dict=weights)
        write_thresholds(output / MODEL_FOLDER, thresholds)
    log.evaluation(metrics)
    if not run.config.fast_dev_run:  # after a handful of steps it is
        for cause in why_ap_is_zero(run.config, log.metrics, run.val_truth, results, run.train_table, run.val_table):
            log.say(f"AP is zero: {cause}")
    if run.step >= run.total_steps:
        for note in evaluated.notes:
            log.say(f"note: {note}")


def _best(metrics: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The evaluation in which a metric is highest, the first of equals; the last if there is nothing to find in any."""
    found = [line for line in metrics if line.get(name) is not None]
    return max(found, key=lambda line: line[name]) if found else metrics[-1] if metrics else None


def _require_boxes(run: Run) -> None:
    if not run.train_report.boxes:
        raise ValueError(
            f"there is no box to train on (training images: {run.train_report}): a detector that never sees an object learns "
            "to find none; is this the right annotation file, and do its annotations have boxes?"
        )


def _stopped_message(run: Run, error: StoppedError) -> str:
    where = f"stopped by {error} at step {run.step}"
    if run.saved_step is None:
        return f"{where}: nothing was saved yet"
    saved = "everything is saved" if run.saved_step == run.step else f"saved is step {run.saved_step}"
    return f"{where}: {saved}; `smca train … --resume` goes on from there"


def _announce(run: Run, log: RunLog) -> None:
    """What is about to be trained, on what."""
    config, world, threads = run.config, run.world, torch.get_num_threads()
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    log.say(f"training images: {run.train_report}\nheld-out images: {run.val_report}")
    log.say(
        f"{config.model.cross_attention} · {parameters:.1f} M parameters · {len(run.batches)} steps per epoch, "
        f"{run.total_steps} in all · {run.device} · {world} process{'es' * (world > 1)} · {threads} thread{'s' * (threads > 1)}"
    )
    if run.start is not None:
        log.say(run.start)
    for warning in warnings_of(config, run.train_table, run.val_table, run.train_data.categories):
        log.say(f"warning: {warning}")


def _closing_message(run: Run, metrics: list[dict[str, Any]]) -> str:
    config, last, best = run.config, metrics[-1], _best(metrics, run.config.best_by)
    ended = "done" if run.step >= run.total_steps else f"ended after {run.step:,} of {run.total_steps:,} steps"
    ap, ap50 = ("–" if last[k] is None else f"{last[k]:.3f}" for k in ("ap", "ap50"))
    evaluate = f"  smca evaluate {config.output}/model{_held_out(config)}\n" if config.data or config.val_json else ""
    shards = "with checkpoint.shards.*: " if config.fsdp else ""
    of_best, board = "", ", tensorboard/" if (config.output / "tensorboard").is_dir() else ""
    priors = (
        "  priors.png        where the queries look, and how wide, by epoch\n"
        * (config.output / PRIORS_PICTURE).is_file()
    )
    if best is not None and best[config.best_by] is not None:
        name = config.best_by.upper().replace("_", " of ")
        of_best = f": the best, {name} {best[config.best_by]:.3f} after step {best['step']:,}"
    return (
        f"\n{ended}: AP {ap}, AP50 {ap50} on the held-out images after {last['train_seconds']:.0f} s of training.\n"
        f"In {config.output}:\n"
        f"  model/            config.json + model.safetensors{of_best}\n"
        f"  model_last/       likewise: the last\n"
        f"  predictions.png   detections of model/ beside the truth\n"
        f"  curves.png        loss and AP by epoch (metrics.jsonl{board})\n{priors}"
        f"  checkpoint.pt     {shards}everything that --resume needs\n"
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
    if config.dry_run:
        print(summarize(config.model))
        if config.init is not None:
            print(plan_start(open_source(config.init), config.model, config.init_parts).report)
    elif config.replay is not None:
        raise SystemExit(0 if replay(config.replay, device=config.device) else 1)
    else:
        train(config)


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
