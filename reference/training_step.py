"""A training step: what happens around the model, from the images of all processes to the next weights and their average.

A step sees images in P processes, each of which takes them in A parts, one after the other (gradient accumulation). With
`set_loss` for the terms of one part, not divided by its own number of boxes but by that of the whole step,

    (R1) boxes = max(1, Σ over processes p and parts a of the objects in them) / P
    (R2) loss_p = Σ over parts a of [ (S7) with boxes in place of (S1) ]      loss = 1/P · Σ_p loss_p
    (R3) g_p = Σ over parts a of the gradient of κ·loss_p                     κ: the scale of the loss
    (R4) g = 1/P · Σ_p g_p, then g ← g/κ
    (R5) ‖g‖ is taken, and g is clipped to the largest norm                   `optimizers` (O1); not if that is 0
    (R6) every parameter moves, by AdamW or by Muon, at the rate of its group times the factor of the schedule
    (R7) average ← δ_t·average + (1 − δ_t)·θ                                  `optimizers` (O8); not if δ is 0

Processes divide by the mean number of boxes because (R4) is a mean, too: the product is the sum over all images, divided by
all objects. So nothing depends on how images are dealt out to processes and parts, nor on κ, up to rounding. (DETR's code
does the same over processes; a part that divides by its own number of boxes weighs images with few objects more.) κ is for
gradients in float16, which would underflow; clipping before the division by κ would compare κ·‖g‖ with the largest norm.

The groups of (R6). Muon, where the settings have it, takes matrices inside the network whose sides are both at least 16;
AdamW everything else:

    (R8)                  rate, AdamW      rate, Muon                        decayed, "all"   decayed, "weights"
         backbone         backbone_lr      muon_lr · backbone_lr / lr        yes              its weights
         the rest         lr               muon_lr                           yes              its weights, not norms and biases
         Muon's           –                                                  never            never

A run that is stopped and goes on has to be the one that never stopped, so a checkpoint is everything of a `TrainingState`:
parameters, average, both moments, momentum, and the number of steps, on which (O4) and (O8) depend.

Sources: DETR, appendix, "Technical details" (AdamW, clipping at 0.1, a rate of its own for the backbone); its code for
(R1); arXiv 1710.03740 for the scale of the loss. This repository's trainer does exactly this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from smca.reference.arrays import FloatArray
from smca.reference.losses import Targets, set_loss
from smca.reference.losses_backward import set_loss_backward
from smca.reference.optimizers import Moments, adamw, average_decay, clip, moved_average, muon, norm_of
from smca.reference.small_detector import Params, backward, forward

LEAST_SIDE = 16
HEADS = ("class_head", "box_head")

Part = tuple[FloatArray, Targets]
"""x [B, N, I] of some images (`small_detector`), and their objects."""
Shards = Sequence[Sequence[Part]]
"""The images of a step: shards[process][part]. Processes have equally many parts."""


@dataclass(frozen=True)
class TrainingSettings:
    """What decides how parameters move."""

    optimizer: str = "adamw"
    """"adamw", or "muon" for the matrices inside."""
    lr: float = 1e-4
    backbone_lr: float = 1e-5
    muon_lr: float = 0.02
    weight_decay: float = 1e-4
    decayed: str = "all"
    """"all", or "weights" of linear layers alone."""
    clip_norm: float = 0.1
    """Largest norm of the gradient; 0 = any."""
    ema_decay: float = 0.0
    """δ of the average; 0 = no average."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"class": 2.0, "l1": 5.0, "giou": 2.0})
    """Of the terms of the loss."""
    classification: str = "focal"
    """"focal" or "matchability"."""
    loss_scale: float = 1.0
    """κ."""
    resume_after: int = 0
    """After so many steps everything is saved, and a new run goes on with it; 0 = never."""


class TrainingState(NamedTuple):
    """Everything that a step reads and writes, by the names of parameters."""

    params: dict[str, FloatArray]
    average: dict[str, FloatArray]
    """The same names; with ema_decay = 0 none."""
    moments: dict[str, Moments]
    """AdamW's, of all parameters."""
    momentum: dict[str, FloatArray]
    """Muon's, of the matrices that it takes."""
    steps: int
    """Done."""


class Numbers(NamedTuple):
    """What a step is logged with."""

    loss: float
    gradient_norm: float
    """‖g‖ before clipping."""


def first_state(params: Params, settings: TrainingSettings) -> TrainingState:
    """The state before the first step: the average is the weights themselves, and nothing has momentum."""
    copies = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
    moments = {name: Moments(np.zeros(value.shape), np.zeros(value.shape)) for name, value in copies.items()}
    momentum = {name: np.zeros(value.shape) for name, value in copies.items() if is_muons(name, value, settings)}
    return TrainingState(copies, dict(copies) if settings.ema_decay else {}, moments, momentum, 0)


def is_muons(name: str, parameter: FloatArray, settings: TrainingSettings) -> bool:
    """Whether Muon takes a parameter: matrices inside the network, large enough. Equation (R8).

    >>> muons = TrainingSettings(optimizer="muon")
    >>> is_muons("layers.0.weight", np.zeros((16, 16)), muons), is_muons("layers.0.weight", np.zeros((16, 8)), muons)
    (True, False)
    >>> is_muons("class_head.weight", np.zeros((80, 16)), muons), is_muons("norm.weight", np.zeros(16), muons)
    (False, False)
    """
    large = parameter.ndim == 2 and min(parameter.shape) >= LEAST_SIDE
    return settings.optimizer == "muon" and large and name.partition(".")[0] not in HEADS


def rate_of(name: str, settings: TrainingSettings, by_muon: bool) -> float:
    """The learning rate of a parameter, before the schedule. Equation (R8).

    >>> settings = TrainingSettings(lr=0.5, backbone_lr=0.25, muon_lr=2.0)
    >>> rate_of("backbone.weight", settings, False), rate_of("backbone.weight", settings, True)
    (0.25, 1.0)
    """
    in_backbone = name.startswith("backbone.")
    if by_muon:
        return settings.muon_lr * settings.backbone_lr / settings.lr if in_backbone else settings.muon_lr
    return settings.backbone_lr if in_backbone else settings.lr


def decay_of(name: str, settings: TrainingSettings) -> float:
    """The weight decay of a parameter that AdamW moves. Equation (R8).

    >>> settings = TrainingSettings(weight_decay=0.5, decayed="weights")
    >>> [decay_of(name, settings) for name in ("class_head.weight", "class_head.bias", "norm.weight")]
    [0.5, 0.0, 0.0]
    """
    of_a_layer = name.endswith(".weight") and not name.startswith("norm.")
    return settings.weight_decay if settings.decayed == "all" or of_a_layer else 0.0


def gradient_of(params: Params, shards: Shards, settings: TrainingSettings) -> tuple[float, dict[str, FloatArray]]:
    """The loss of a step and its gradient, not clipped. Equations (R1) to (R4).

    Args:
        params: of the detector.
        shards: the images, [process][part].
        settings: whose weights, classification and loss_scale are read.

    Raises:
        ValueError: as `small_detector.forward` and `set_loss`.
    """
    processes = len(shards)
    objects = sum(int(targets.valid.sum()) for parts in shards for _, targets in parts)
    num_boxes = max(1, objects) / processes  # (R1)
    loss, total = 0.0, {name: np.zeros(value.shape) for name, value in params.items()}
    for parts in shards:
        for x, targets in parts:
            outputs = forward(params, x)
            given = outputs, targets, settings.weights, settings.classification
            loss += set_loss(*given, num_boxes=num_boxes)["loss"] / processes  # (R2)
            of_outputs = set_loss_backward(*given, num_boxes=num_boxes)
            scaled = {name: settings.loss_scale * gradient for name, gradient in of_outputs.items()}
            for name, gradient in backward(params, x, scaled["logits"], scaled["boxes"]).items():
                total[name] += gradient  # (R3)
    return loss, {name: gradient / processes / settings.loss_scale for name, gradient in total.items()}  # (R4)


def training_step(
    state: TrainingState, shards: Shards, settings: TrainingSettings, factor: float = 1.0
) -> tuple[TrainingState, Numbers]:
    """One step. Equations (R1) to (R8).

    Args:
        state: after the steps before.
        shards: the images, [process][part].
        settings: of the run.
        factor: of the schedule, which multiplies all rates at this step.

    Returns:
        The state after the step, and its numbers.

    Raises:
        ValueError: as `gradient_of`.

    One image without objects, one query, one class, all weights 0: by (S4) the loss is 2·¾·¼·ln 2, and nothing but the bias
    of the class head has a gradient, 2·¾·¼·(ln 2 + ½) by (G1). The first step of AdamW takes it to −lr.

    >>> from smca.reference.losses import Targets
    >>> from smca.reference.small_detector import Sizes, parameter_shapes
    >>> zeros = {n: np.zeros(s) for n, s in parameter_shapes(Sizes(inputs=1, channels=2, classes=1, layers=1)).items()}
    >>> nothing = Targets(np.zeros((1, 0), dtype=int), np.zeros((1, 0, 4)), np.zeros((1, 0), dtype=bool))
    >>> settings = TrainingSettings(lr=0.5)
    >>> part = np.ones((1, 1, 1)), nothing
    >>> state, numbers = training_step(first_state(zeros, settings), [[part]], settings)
    >>> round(numbers.loss, 4), round(numbers.gradient_norm, 4), state.params["class_head.bias"].round(4).tolist()
    (0.2599, 0.4474, [-0.5])

    In two processes, each with a copy of that image, or in two parts, the loss is that of two images: what it is divided by
    is 1 in all, since there is no object.

    >>> in_processes, in_parts = [[part], [part]], [[part, part]]
    >>> [round(gradient_of(zeros, shards, settings)[0], 4) for shards in (in_processes, in_parts)]
    [0.5199, 0.5199]
    """
    loss, gradients = gradient_of(state.params, shards, settings)
    numbers = Numbers(loss, norm_of(gradients))  # (R5)
    if settings.clip_norm:
        gradients = clip(gradients, settings.clip_norm)
    params, moments, momentum = dict(state.params), dict(state.moments), dict(state.momentum)
    for name, gradient in gradients.items():  # (R6)
        by_muon = name in momentum
        rate = factor * rate_of(name, settings, by_muon)
        if by_muon:
            params[name], momentum[name] = muon(params[name], gradient, momentum[name], rate)
        else:
            decay = decay_of(name, settings)
            params[name], moments[name] = adamw(params[name], gradient, moments[name], state.steps + 1, rate, decay)
    average = state.average
    if settings.ema_decay:
        average = moved_average(average, params, average_decay(settings.ema_decay, state.steps))  # (R7)
    return TrainingState(params, average, moments, momentum, state.steps + 1), numbers
