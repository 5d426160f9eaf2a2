"""Non-finite numbers stop training; nothing is repaired, and the error says where they arose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smca.gpu.files import CHECKPOINT_FILE
from smca.gpu.loss import NonFiniteError
from smca.gpu.training.bad_step import BAD_STEP_FILE, Origin, Step, save_bad_step
from smca.gpu.training.sharding import local

MOST_SKIPPED = 20
"""Steps in a row whose gradients overflow float16: the scale of the loss, halved each time, is then a millionth of what it was."""


class FiniteCheck:
    """Looks at every step's loss and gradient without making the host wait for the GPU.

    A copy of the numbers is on its way to the host while the GPU goes on with the next step's forward pass; they are looked at
    before that step's backward pass replaces the gradients. A flag on the device keeps a bad step from changing the weights
    meanwhile. Where the numbers are at hand anyway, as on a CPU, they are looked at at once.

        with check.keep_bad_step(step, optimizer):   # a matcher that raises does so in here
            terms = criterion(model(images), targets)
        check.raise_if_not_finite()         # of the step before this one
        terms["loss"].backward()
        norm = clip_gradient(…)
        check.record(terms, norm, step, optimizer)
        optimizer.step()
        …
        check.raise_if_not_finite()         # before anything is saved
    """

    def __init__(
        self, model: nn.Module, output: Path, *, delayed: bool, skips: bool = False, origin: Origin | None = None
    ) -> None:
        """Check the training of a model.

        Args:
            model: whose gradients are looked through, for their names, if their norm is not finite.
            output: folder that receives the offending step.
            delayed: look at a step's numbers when ``raise_if_not_finite`` is called, not at once: for CUDA. The optimiser must be
                a fused one, which takes ``found_inf`` as from a gradient scaler.
            skips: leave out a step whose gradient is not finite though its loss is, since a scaled gradient may overflow float16;
                give up after MOST_SKIPPED in a row. The optimiser must be a fused one.
            origin: of which run and process its steps are; one that is kept without it cannot be replayed.
        """
        self.model, self.delayed, self.skips, self.origin = model, delayed, skips, origin
        rank = origin.rank if origin is not None else 0
        self.path = output / (f"rank{rank}_{BAD_STEP_FILE}" if rank else BAD_STEP_FILE)
        self.values: dict[str, float] = {}
        """Terms of the loss of the last step that was looked at, and with `skips` how many steps were left out."""
        self.skipped = self.skipped_in_a_row = 0
        """Steps left out of those that were looked at."""
        self._waiting: tuple[list[str], Tensor, Any, Step, torch.optim.Optimizer] | None = None

    def record(self, terms: Mapping[str, Tensor], norm: Tensor, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Take down a step's numbers, and have the optimiser leave out its next step if one of them is not finite.

        Args:
            terms: of the loss, scalars on one device.
            norm: of the whole gradient, before it was clipped.
            step: what they follow from.
            optimizer: whose next step is to follow.

        Raises:
            NonFiniteError: as ``raise_if_not_finite``, if it is not delayed.
        """
        numbers = torch.stack([*(value.detach() for value in terms.values()), norm.detach()])
        names = list(terms)
        if self.delayed or self.skips:
            optimizer.found_inf = (~numbers.isfinite().all()).float()  # type: ignore[attr-defined]
        if not self.delayed:
            self._waiting = names, numbers, None, step, optimizer
            self.raise_if_not_finite()
            return
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        on_host.copy_(numbers, non_blocking=True)
        event: Any = torch.cuda.Event  # untyped
        arrived = event() if numbers.is_cuda else None
        if arrived is not None:
            arrived.record()
        self._waiting = names, on_host, arrived, step, optimizer

    def raise_if_not_finite(self) -> None:
        """Look at the numbers last recorded.

        Raises:
            NonFiniteError: one is not finite (with `skips`: one of the loss, or too many gradients in a row); names the term and
                layer, or the parameter whose gradient it was, the images of the batch, and the file that it is kept in.
        """
        if self._waiting is None:
            return
        names, numbers, arrived, step, optimizer = self._waiting
        self._waiting = None
        if arrived is not None:
            arrived.synchronize()
        *losses, norm = numbers.tolist()
        self.values = dict(zip(names, losses, strict=True))
        with self.keep_bad_step(step, optimizer, self.values, norm):
            check_terms(self.values)
            self._check_gradient(norm)
        if self.skips:
            self.values["skipped_steps"] = float(self.skipped)

    def _check_gradient(self, norm: float) -> None:
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        if not self.skips:
            raise NonFiniteError(_bad_gradient(self.model, norm))
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise NonFiniteError(
                f"{MOST_SKIPPED} steps in a row were left out, whose gradients overflow float16 at ever smaller scales of the loss "
                f"(of the last, {_bad_gradient(self.model, norm)}): take --precision bf16 or fp32"
            )

    @contextmanager
    def keep_bad_step(
        self,
        step: Step,
        optimizer: torch.optim.Optimizer,
        terms: Mapping[str, float] | None = None,
        norm: float | None = None,
    ) -> Iterator[None]:
        """On a NonFiniteError: keep the step that led to it, and say where.

        The model's weights and the optimiser's state are those before the step, though the optimiser may have been called since: it
        was told not to move.
        """
        try:
            yield
        except NonFiniteError as error:
            ids = [image for batch in step.parts for image in batch.image_ids.tolist()]
            try:
                if self.origin is not None and self.origin.config.fsdp:
                    kept = "the step is not kept, since with --fsdp no process has all weights"
                else:
                    save_bad_step(
                        self.path,
                        step,
                        self.model,
                        optimizer,
                        self.origin,
                        error=str(error),
                        terms=terms or {},
                        norm=norm,
                    )
                    kept = f"the step is kept in {self.path} (smca train --replay {self.path})"
            except OSError as full:  # which must not hide what was found
                kept = f"the step could not be kept ({full})"
            raise NonFiniteError(
                f"{error}. Image ids of the batch: {ids}; {kept}, the last good state in "
                f"{self.path.with_name(CHECKPOINT_FILE)}. Look at these images and boxes; a lower --optim.lr (with "
                "Muon --optim.muon-lr, too) often helps, with --resume --resume-changed"
            ) from error


def check_terms(values: Mapping[str, float]) -> None:
    """Raise NonFiniteError naming the first bad term of the loss and its decoder layer."""
    for name, value in values.items():
        if value - value != 0:  # NaN or infinite
            term, _, layer = name.partition("/")
            of_one = f"the {term} term" + (f" of decoder layer {layer}" if layer else "")
            where = "the sum of the terms" if name == "loss" else of_one
            raise NonFiniteError(f"the loss is not finite: {where} is {value}")


def _bad_gradient(model: nn.Module, norm: float) -> str:
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    names = [name for name, gradient in gradients if not torch.isfinite(local(gradient)).all()]
    if names:
        others = f" (nor are those of {len(names) - 1} more; the last is {names[-1]})" if len(names) > 1 else ""
        return f"the gradient of {names[0]} is not finite{others}, though the loss is"
    divided = any(local(gradient) is not gradient for _, gradient in gradients)
    elsewhere = ", or what another process has of the gradients is not finite" if divided else ""
    return f"the norm of the gradient is {norm}: it overflows{elsewhere}"
