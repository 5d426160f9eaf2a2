"""Other people's training under the suite: `transformers.Trainer` with the loss of transformers' Deformable DETR.

    pip install accelerate        # which that trainer needs
    smca conformance --only train --implementation smca.conformance.implementations.transformers_trainer:TransformersTrainer

The small detector of the specification, as a module that returns its loss, is trained by the library as it stands: its groups for
decay, its accumulation, its clipping, AdamW, its checkpoints. Only what has no setting is overridden, as its documentation says:
batches come in their order, and the schedule is the list of factors. docs/conformance.md lists what differs from the
specification, and why.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smca.conformance.implementations.oracle import by_place
from smca.conformance.implementations.trainer import SmallDetector, detector_of
from smca.conformance.implementations.transformers_adapter import DeformableDetr
from smca.conformance.property import assume
from smca.conformance.protocol import Unavailable

Array = npt.NDArray[Any]
LIBRARY: Any = transformers
_NAMES = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}


class _WithLoss(nn.Module):
    """What the library trains: (x, labels) → loss."""

    def __init__(self, detector: SmallDetector, weights: dict[str, float]) -> None:
        super().__init__()
        self.detector, self.weights = detector, weights
        classes = detector.class_head.out_features
        self.criterion = DeformableDetr().loss(classes, weights)

    def forward(self, x: Tensor, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        outputs = self.detector(x.mT[..., None])
        layers = [
            {"logits": logits, "pred_boxes": boxes}
            for logits, boxes in zip(outputs["logits"], outputs["boxes"], strict=True)
        ]
        terms = self.criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, labels)
        suffixes = ["", *(f"_{layer}" for layer in range(len(layers) - 1))]
        weighted = [self.weights[term] * terms[name + s] for s in suffixes for term, name in _NAMES.items()]
        return {"loss": torch.stack([value.reshape(()) for value in weighted]).sum()}


class TransformersTrainer:
    """`transformers.Trainer`, with the loss of `transformers`' Deformable DETR."""

    name = "transformers-trainer"
    dtypes = ("float64", "float32")
    leaves_out = ("train.processes", "train.loss_scale", "train.average_follows")
    """Several processes are torchrun's; the scale of a loss is that of float16, on a GPU; there is no average of the weights."""

    def __init__(self) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise Unavailable("transformers.Trainer needs accelerate: pip install accelerate")

    def train(self, params: dict[str, Array], steps: Sequence[Any], settings: Any, *, dtype: str) -> dict[str, Any]:
        if len(steps[0].shards) > 1 or settings.optimizer != "adamw" or settings.classification != "focal":
            assume(False)  # one process, AdamW and the focal loss are what there is
        kind, losses, norms, found = getattr(torch, dtype), [], [], []
        factors = [step.factor for step in steps]

        class InOrder(LIBRARY.Trainer):  # type: ignore[misc]
            def get_train_dataloader(self) -> Any:
                return self.accelerator.prepare(DataLoader(given, collate_fn=lambda items: items[0]))

            def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    self.optimizer, lambda step: factors[min(step, len(factors) - 1)]
                )
                return self.lr_scheduler

            def training_step(self, *arguments: Any, **more: Any) -> Tensor:
                loss: Tensor = super().training_step(*arguments, **more)
                losses.append(loss.item())
                return loss

        class Note(LIBRARY.TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                values = model.detector.state_dict()
                found.append({name: value.double().numpy().copy() for name, value in values.items()})
                if state.global_step == settings.resume_after:
                    control.should_save, control.should_training_stop = True, stopping[0]

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "grad_norm" in logs:
                    norms.append(float(logs["grad_norm"]))

        given: Any = [_tensors(x, targets, kind) for step in steps for x, targets in step.shards[0]]
        stopping = [settings.resume_after > 0]
        with tempfile.TemporaryDirectory() as folder:

            def trainer() -> Any:
                arguments = LIBRARY.TrainingArguments(
                    folder,
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=len(steps[0].shards[0]),
                    max_steps=len(steps),
                    learning_rate=settings.lr,
                    weight_decay=settings.weight_decay,
                    max_grad_norm=settings.clip_norm or 1e30,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                )
                model = _WithLoss(detector_of(params, kind), dict(settings.weights))
                made = InOrder(model, arguments, train_dataset=given, callbacks=[Note()])
                made.remove_callback(LIBRARY.PrinterCallback)
                return made

            trainer().train()
            if stopping[0]:
                stopping[0] = False
                (checkpoint,) = Path(folder).glob("checkpoint-*")
                trainer().train(resume_from_checkpoint=str(checkpoint))
        per_step = np.array(losses).reshape(len(steps), -1).sum(1)
        stacked = {name: np.stack([values[name] for values in found]) for name in found[0]}
        return {"loss": per_step, "gradient_norm": np.array(norms)} | by_place(stacked, {})


def _tensors(x: Array, targets: Any, kind: torch.dtype) -> dict[str, Any]:
    """A part as the library takes it: no padding, a dictionary of objects per image."""
    objects = [
        {
            "class_labels": torch.tensor(targets.labels[b, valid]),
            "boxes": torch.tensor(targets.boxes[b, valid], dtype=kind),
        }
        for b, valid in enumerate(targets.valid)
    ]
    return {"x": torch.tensor(x, dtype=kind), "labels": objects}
