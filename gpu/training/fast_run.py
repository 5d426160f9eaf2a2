"""``--fast-dev-run``: all that a run does, once, in well under a minute; and what the whole run would take.

    a trial      steps of the largest batch that can come, undone
    training     STEPS steps
    evaluation   of EVALUATED held-out images
    files        checkpoint, models, pictures, metrics and trackers, in a folder of their own

Where there is no GPU, steps that would take long have one image, and the whole run's time is reckoned from those.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence

import torch

from smca.datasets import Category, DetectionDataset, Report, Sample
from smca.gpu.config import RunConfig
from smca.gpu.evaluation import detect, evaluation_loader
from smca.gpu.files import CHECKPOINT_FILE, LAST_FOLDER, WEIGHTS_FILE
from smca.gpu.training.batch_size import TrainEpoch, fits, worst_shape
from smca.gpu.training.setup import Run, set_batch_size

STEPS = 3
MINUTES = 0.4
"""After which no further step is taken."""
EVALUATED = 8
EVALUATED_ON_A_CPU = 2
QUICK = 10.0
"""Seconds that STEPS steps of the run's own size may take on a CPU. Else steps have as few images as they can."""
LOADED = 4
"""Images whose loading is timed."""


class FirstImages(DetectionDataset):
    """The first images of a data set."""

    def __init__(self, whole: DetectionDataset, count: int) -> None:
        self.whole, self._count = whole, min(count, len(whole))

    @property
    def categories(self) -> tuple[Category, ...]:
        """Those of the whole."""
        return self.whole.categories

    @property
    def report(self) -> Report:
        """That of the whole."""
        return self.whole.report

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self.whole[index]


def shortened(config: RunConfig) -> RunConfig:
    """The run, in short and in a folder of its own, which an earlier one of its kind may have filled."""
    return dataclasses.replace(
        config,
        output=config.output.with_name(f"{config.output.name}.fast-dev-run"),
        max_steps=STEPS,
        max_minutes=MINUTES,
        eval_every=1,
        patience=None,
        resume=False,
        resume_changed=False,
        restartable=False,
        overwrite=True,
    )


def prepare(run: Run, train_epoch: TrainEpoch) -> str:
    """Let evaluations have few images, and steps, too, where they take long; try the largest step. In words, what came of that."""
    config, cuda, images = run.config, run.device.type == "cuda", run.batches.batch_size
    run.val_data = FirstImages(run.val_data, EVALUATED if cuda else EVALUATED_ON_A_CPU)
    indices = range(run.rank, len(run.val_data), run.world)
    run.val_loader = evaluation_loader(run.val_data, config.model, config.eval_batch_size, config.workers, indices)
    least = run.world * config.accumulate
    if not cuda:
        set_batch_size(run, least)
    if run.world > 1:
        return "memory: not tried on several processes; --fast-dev-run on one of them says what a step takes"
    start = time.perf_counter()
    fit, said = _try_worst_step(run, train_epoch)
    seconds = (time.perf_counter() - start) / run.batches.batch_size
    if not fit:
        set_batch_size(run, least)  # all else is tried
    elif not cuda and STEPS * images * seconds < QUICK:
        set_batch_size(run, images)
    return said


def _try_worst_step(run: Run, train_epoch: TrainEpoch) -> tuple[bool, str]:
    """Take a step as large as any can be, and undo it. It also warms up what the first step of a process makes ready.

    Returns:
        Whether there is memory for it; and in words, how much it takes.
    """
    height, width = worst_shape(run)
    objects = f"with {run.most_objects} objects each"
    what = f"{_images(run.batches.batch_size)} of {height}×{width} px, the largest there can be, {objects}"
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    if not fits(run, run.batches.batch_size // run.config.accumulate, train_epoch):
        return False, (
            f"PROBLEM: a step of {what} takes more than nine tenths of the GPU's free memory: lower --batch-size (auto finds "
            "what fits) or raise --accumulate; --precision bf16 takes less"
        )
    if not cuda:
        return True, f"largest batch: a step of {what} works"
    taken, total = torch.cuda.max_memory_reserved(run.device), torch.cuda.mem_get_info(run.device)[1]
    return True, f"memory: a step of {what} takes {taken / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB"


def report(run: Run, whole: RunConfig, notes: Sequence[str]) -> str:
    """What was done, what the whole run would take at this speed, and what stands in its way."""
    output, images = run.config.output, run.batches.batch_size
    batch_size = images if whole.batch_size == "auto" else whole.batch_size
    per_epoch = max(1, len(run.augmented) // batch_size)
    steps = min(whole.epochs * per_epoch, whole.max_steps or whole.epochs * per_epoch)
    evaluations = -(-steps // (per_epoch * whole.eval_every))
    held_out = len(run.val_data.whole) if isinstance(run.val_data, FirstImages) else len(run.val_data)

    computing = (run.train_seconds - run.data_seconds) / run.step / images
    loading = _seconds_to_load(run)
    if whole.workers:
        loading /= min(whole.workers, os.cpu_count() or 1)
        of_image = max(computing, loading)
    else:
        of_image = computing + loading
    training, evaluating = steps * batch_size * of_image, evaluations * held_out * _seconds_to_detect(run)
    lines = [
        f"\nfast dev run: {run.step} of {STEPS} steps, of {_images(images)}, an evaluation of {len(run.val_data)} of "
        f"{held_out:,} held-out images, checkpoint, models, pictures: all in {output}; {whole.output} is untouched",
        f"the whole run at this speed: {steps:,} steps of {_images(batch_size)} in {_duration(training)}, and {evaluations:,} "
        f"evaluations in {_duration(evaluating)} or more (metrics not counted)"
        + ("" if images == batch_size else "; probably far less, since few steps of few images cost much for each"),
        f"an image: {1000 * computing:.0f} ms of computing, {1000 * loading:.0f} ms of loading"
        + (f" (--workers {whole.workers})" if whole.workers else ""),
        *notes,
    ]
    if loading > (computing if whole.workers else computing / 2):
        lines.append(
            "PROBLEM: training would wait for images: raise --workers, as far as there are CPU cores, or keep them with "
            "--cache-images"
        )
    files = [output / CHECKPOINT_FILE, output / LAST_FOLDER / WEIGHTS_FILE]
    needed, free = 3 * files[0].stat().st_size + 3 * files[1].stat().st_size, shutil.disk_usage(output).free
    if needed > free:
        lines.append(
            f"PROBLEM: the run needs {needed / 1e6:,.0f} MB for checkpoints and models, {free / 1e6:,.0f} MB are free"
        )
    return "\n".join(lines)


def _seconds_to_load(run: Run) -> float:
    """For an image of the training data, in this process."""
    dataset = run.loader.dataset
    indices = range(0, len(run.augmented), max(1, len(run.augmented) // LOADED))[:LOADED]
    seconds = 0.0
    for _ in range(2 if run.config.cache_images else 1):
        start = time.perf_counter()
        run.loader.collate_fn([dataset[index] for index in indices])
        seconds = time.perf_counter() - start
    return seconds / len(indices)


def _seconds_to_detect(run: Run) -> float:
    """For an image of the held-out data, without loading it."""
    count = min(len(run.val_data), run.config.eval_batch_size)
    batch = run.val_loader.collate_fn([run.val_loader.dataset[index] for index in range(count)])
    start = time.perf_counter()
    detect(run.trained, [batch])
    return (time.perf_counter() - start) / count


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
