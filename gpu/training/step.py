"""One training step: from the images of a process to the next weights and their average.

In the terms of ``smca.reference.training_step``: (R1) to (R7). How parameters are grouped, (R8), is ``make_optimizer``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smca.datasets import Batch
from smca.gpu.loss import boxes_per_process
from smca.gpu.training.bad_step import Step
from smca.gpu.training.optimizer import average_decay, clip_gradient, update_average
from smca.gpu.training.setup import Run
from smca.gpu.training.sharding import adding_up, whole


def take_step(run: Run, parts: Sequence[Batch], lr_factor: float) -> tuple[dict[str, Tensor], Tensor]:
    """Take a step; nothing in it waits for the GPU. Learning rates are those that the optimiser has. ``run.step`` stays as it is.

    Args:
        run: whose weights, optimiser and average move.
        parts: of this process, one after the other.
        lr_factor: of the schedule at this step, to be kept with it if a number in it is not finite.

    Returns:
        The terms of the loss, of all parts of this process, without gradient; and the norm of the gradient before it was clipped.

    Raises:
        NonFiniteError: as ``FiniteCheck.record``, and from the matching.
    """
    config, optimizer, scaler, check = run.config, run.optimizer, run.scaler, run.check
    batches = [part.to(run.device, non_blocking=True) for part in parts]
    num_boxes = boxes_per_process(torch.stack([batch.targets.valid.sum() for batch in batches]).sum())
    step = Step(parts, run.step, run.epoch, lr_factor, num_boxes)
    terms: dict[str, Tensor] = {}
    for number, (host_batch, batch) in enumerate(zip(parts, batches, strict=True)):
        with adding_up(run.parallel, now=number + 1 == len(parts)):
            # Of a divided model no copies of the weights are to stay in memory for the length of a step.
            with torch.autocast(run.device.type, run.half, enabled=run.half is not None, cache_enabled=not config.fsdp):
                outputs = run.parallel(
                    batch.images.contiguous(memory_format=torch.channels_last),
                    batch.padding_mask if host_batch.padding_mask.any() else None,
                    batch.targets,
                    batch.seeds,
                )
            with check.keep_bad_step(step, optimizer):
                added = run.terms_of(outputs, batch.targets, num_boxes)
            if number == 0:
                check.raise_if_not_finite()
                optimizer.zero_grad(set_to_none=True)
            scaler.scale(added["loss"]).backward()  # type: ignore[no-untyped-call]
        terms = {name: terms[name] + value.detach() if terms else value.detach() for name, value in added.items()}
    scaler.unscale_(optimizer)
    norm = whole(clip_gradient(run.model.parameters(), config.optim.clip_norm))
    check.record(terms, norm, step, optimizer)
    optimizer.step()
    scaler.update()
    if run.average is not None:
        update_average(run.average, run.model, average_decay(config.optim.ema_decay, run.step))
    return terms, norm
