"""What ``smca benchmark`` measures besides attention: each function here builds one case, on any device.

A case is a dictionary of steps by mode, "forward" and "forward+backward" or "inference" and "training"; a step does the work
once and returns the tensors by which cases are compared. The last mode is the heaviest.

Shape letters: B images, N queries, M decoder layers, T targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # imported where needed, because memory that a case takes counts as its own
    from smca.datasets import Targets
    from smca.gpu.loss import SetCriterion
    from smca.gpu.model import SMCADETR

Step = Callable[[], dict[str, Tensor]]
"""One repetition of a case in one mode."""
Case = dict[str, Step]

STEP_BACKBONE: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
"""A small stride-32 ResNet for the training step on a CPU: what is compared is the detector, not the backbone they share."""
RESNET50: dict[str, Any] = {"depths": [3, 4, 6, 3]}

QUERIES, TARGETS, LAYERS = 300, 20, 6  # of an assignment problem

BEYOND = ("boxes", "Muon", "matchability", "noised queries")
"""What ``demo``, ``small`` and ``fast_r50`` have beyond the paper, in the order in which ``recipe_step_case`` adds it. "boxes":
queries at the image's best cells, the dense head that finds them, and the prior in units of their boxes."""


@dataclass(frozen=True)
class Work:
    """The workload of a detector."""

    image_size: tuple[int, int]
    """(height, width) in pixels; no padding."""
    batch: int = 2
    """B, images."""
    dtype: torch.dtype = torch.float32
    """bfloat16 and float16 mean autocast."""
    device: str = "cpu"
    small: bool = True
    """STEP_BACKBONE, and training without the optimiser; otherwise a ResNet-50, gradient clipping and AdamW."""


def assignment_case(name: str, batch: int, device: str = "cpu") -> Case:
    """M·B assignments of 300 queries to 20 targets, all valid: "forward", costs on `device` to query indices on `device`.

    Args:
        name: "scipy" (copies to the host and back, and solves there) or "kernel" (``smca.gpu.loss.assignment``).
        batch: B.
        device: "cpu" or "cuda".
    """
    generator = torch.Generator().manual_seed(batch)
    cost = torch.rand(LAYERS, batch, QUERIES, TARGETS, generator=generator).to(device)
    valid = torch.ones(batch, TARGETS, dtype=torch.bool, device=device)

    def kernel() -> dict[str, Tensor]:
        from smca.gpu.loss.assignment import assign

        return {"query": assign(cost, valid)[0]}

    def scipy() -> dict[str, Tensor]:
        from scipy.optimize import linear_sum_assignment

        costs, chosen = cost.cpu().numpy(), torch.empty(LAYERS, batch, TARGETS, dtype=torch.int64)
        for layer in range(LAYERS):
            for image in range(batch):
                rows, columns = linear_sum_assignment(costs[layer, image])
                chosen[layer, image, torch.from_numpy(columns)] = torch.from_numpy(rows)
        return {"query": chosen.to(device)}

    return {"forward": {"kernel": kernel, "scipy": scipy}[name]}


def smca_step_case(preset: str, backend: str, work: Work, *, compiled: bool = False) -> Case:
    """Our model of a preset, 80 classes: "inference", and "training", which is forward, loss and backward (see ``Work``).

    Args:
        preset: as in ``smca_detector``.
        backend: of ``smca_attention``.
        work: its workload.
        compiled: model and criterion through torch.compile. Then "training" only: each mode takes a compilation of a minute.
    """
    model, criterion, targets, images = smca_detector(preset, backend, work)
    if compiled:
        model.compile()
        criterion.compile()

    def loss() -> Tensor:
        with autocast(work):
            outputs = model(images)
        return criterion(outputs, targets)["loss"]  # type: ignore[no-any-return]

    case = _modes(model, model.backbone, lambda: model(images)["logits"][-1], loss, work)
    return {"training": case["training"]} if compiled else case


def smca_detector(preset: str, backend: str, work: Work) -> tuple[SMCADETR, SetCriterion, Targets, Tensor]:
    """Our model and criterion, with targets and images [B, 3, H, W] in [0, 1].

    Args:
        preset: name of a preset, or with " dense" behind it, without the prior. Its backbone is replaced by that of `work`, which
            trains the same stages: all but the stem and the first, as DETR does. Weights are random.
        backend: of ``smca_attention``.
        work: its workload.
    """
    from smca.datasets import Targets
    from smca.gpu.loss import SetCriterion
    from smca.gpu.model import SMCADETR
    from smca.gpu.presets import PRESETS
    from smca.gpu.presets import RESNET50 as PUBLISHED

    torch.manual_seed(0)
    options = STEP_BACKBONE if work.small else RESNET50
    name, _, kind = preset.partition(" ")
    run = PRESETS[name]()
    config = replace(run.model, backbone=replace(PUBLISHED, options=options, weights=None))
    if kind:
        config = replace(config, cross_attention="dense")
    with torch.device(work.device):
        model = SMCADETR(config, attention_backend=backend).to(work.device)
    images, labels, boxes = _images(work)
    criterion = SetCriterion(run.loss)
    return model, criterion, Targets(labels, boxes, torch.ones_like(labels, dtype=torch.bool)), images


def recipe_step_case(preset: str, beyond: int, work: Work, decoder_layers: int | None = None) -> Case:
    """The whole step of a preset: forward, loss, backward, gradient clipping, optimiser; no loading of images, no moving average.

    Args:
        preset: one with all of ``BEYOND``.
        beyond: how many of ``BEYOND`` it keeps, from the first on; the others become what the paper has, and Muon AdamW.
        work: its workload; `small` leaves the preset its own backbone.
        decoder_layers: M, in place of the preset's.
    """
    from smca.datasets import Targets
    from smca.gpu.loss import SetCriterion
    from smca.gpu.model import SMCADETR
    from smca.gpu.presets import PRESETS
    from smca.gpu.training.optimizer import make_optimizer

    run, kept = PRESETS[preset](), BEYOND[:beyond]
    optim, loss = run.optim, run.loss
    changes: dict[str, Any] = {} if decoder_layers is None else {"decoder_layers": decoder_layers}
    if "boxes" not in kept:
        changes |= {"query_init": "grid", "dense_head": False, "prior_unit": "pixels"}
    if "Muon" not in kept:
        optim = replace(optim, optimizer="adamw")
    if "matchability" not in kept:
        loss = replace(loss, classification="focal")
    if "noised queries" not in kept:
        changes["denoising_groups"] = 0
    if not work.small:
        changes["backbone"] = replace(run.model.backbone, options=RESNET50, weights=None)
    model_config = replace(run.model, **changes)

    torch.manual_seed(0)
    with torch.device(work.device):
        model = SMCADETR(model_config).to(work.device)
    model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels, boxes = _images(work, model_config.num_classes)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = Targets(labels, boxes, torch.ones_like(labels, dtype=torch.bool))
    criterion = SetCriterion(loss)
    optimizer = make_optimizer(model, optim, torch.device(work.device))

    def training() -> dict[str, Tensor]:
        with autocast(work):
            outputs = model(images, targets=targets)
        value = criterion(outputs, targets)["loss"]
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        return {"loss": value.detach()}

    return {"training": training}


def transformers_step_case(name: str, work: Work) -> Case:
    """transformers' model of the same size with the same backbone; modes as in ``smca_step_case``.

    Args:
        name: "Detr", "ConditionalDetr" or "DeformableDetr". The last as published: four levels, feed-forward width 1024. Its
            attention is transformers' PyTorch code, not the authors' CUDA kernel.
        work: its workload.
    """
    import transformers

    torch.manual_seed(0)
    stages = ["stage2", "stage3", "stage4"] if name == "DeformableDetr" else ["stage4"]
    options = STEP_BACKBONE if work.small else RESNET50
    backbone: Any = transformers.AutoConfig.for_model("resnet", **options, out_features=stages)
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone,
        num_queries=300,
        num_labels=80,
        auxiliary_loss=True,
        activation_dropout=0.1,  # as in published DETR and in ours; transformers' default leaves that work out
    )
    with torch.device(work.device):
        model = getattr(transformers, f"{name}ForObjectDetection")(config).to(work.device)
    # Train what DETR and ours train, all but the stem and the first stage. transformers intends the same, but looks for
    # "stage.1" where its own ResNet says "stages.1", and so leaves the whole backbone out of the backward pass.
    for parameter_name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(not any(part in parameter_name for part in ("embedder", "stages.0")))
    images, labels, boxes = _images(work)
    targets = [{"class_labels": c, "boxes": b} for c, b in zip(labels, boxes, strict=True)]

    def loss() -> Tensor:
        with autocast(work):
            return model(pixel_values=images, labels=targets).loss  # type: ignore[no-any-return]

    return _modes(model, model.model.backbone, lambda: model(pixel_values=images).logits, loss, work)


def autocast(work: Work) -> torch.autocast:
    """The autocast of a forward pass: to half precision where `work` asks for it."""
    half = work.dtype if work.dtype in (torch.bfloat16, torch.float16) else None
    return torch.autocast(torch.device(work.device).type, half, enabled=half is not None)


def _modes(
    model: nn.Module, backbone: nn.Module, outputs: Callable[[], Tensor], loss: Callable[[], Tensor], work: Work
) -> Case:
    """The steps of a detector, made in the same way for both sides of a comparison."""
    optimizer = None if work.small else trained_by_adamw(model, backbone)

    def inference() -> dict[str, Tensor]:
        if model.training:
            model.eval()
        with torch.no_grad(), autocast(work):
            return {"logits": outputs().float()}

    def training() -> dict[str, Tensor]:
        if not model.training:
            model.train()
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return {"loss": value.detach()}

    return {"inference": inference, "training": training}


def trained_by_adamw(model: nn.Module, backbone: nn.Module) -> torch.optim.AdamW:
    """Lay the backbone out as a GPU's convolutions want it, and return the optimiser of all trained parameters."""
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4, fused=True)


def _images(work: Work, classes: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, H, W] in [0, 1], and ten objects in each: labels [B, 10] and boxes [B, 10, 4] cxcywh."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(work.batch, 3, *work.image_size, generator=generator).to(work.device)
    if not work.small:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (work.batch, 10), generator=generator)
    center = torch.rand(work.batch, 10, 2, generator=generator) * 0.6 + 0.2
    extent = torch.rand(work.batch, 10, 2, generator=generator) * 0.3 + 0.05
    return images, labels.to(work.device), torch.cat([center, extent], dim=-1).to(work.device)
