"""``smca train --replay FILE``: a step that met a number which is not finite, again, on any machine and without the data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smca.datasets import Targets
from smca.gpu.config_json import cut
from smca.gpu.evaluation import pick_device
from smca.gpu.loss import NonFiniteError, SetCriterion, boxes_per_process
from smca.gpu.model import SMCADETR
from smca.gpu.training.bad_step import BadStep, Facts, load_bad_step
from smca.gpu.training.determinism import without_denormals
from smca.gpu.training.order import seed_step
from smca.gpu.training.setup import HALVES, Criterion, completed

_NORM = "norm of the gradient"


def replay(path: Path, *, device: str = "auto", criterion: Criterion | None = None) -> bool:
    """Take a step again and print what is found: each term of the loss, layer by layer, and where the first number arises that is
    not finite, going forward and going backward.

    Args:
        path: a bad_step.safetensors.
        device: "cpu", "cuda" …, whatever the step was taken on; "auto" takes a GPU if there is one.
        criterion: the loss, if the run had one of its own.

    Returns:
        Whether it happened again: the same number is the first that is not finite, of the terms and the gradient's norm.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or something else; or the run had a loss of its own, and `criterion` is None.
    """
    bad, on = load_bad_step(path), pick_device(device)
    facts, origin = bad.facts, bad.facts.origin
    if origin.criterion is not None and criterion is None:
        raise ValueError(
            f"{path}: the run had a loss of its own, {cut(origin.criterion)}, which the file cannot hold: from Python, call "
            "smca.gpu.training.replay.replay(path, criterion=…) with it"
        )
    model = _model(bad, path, on)
    _introduce(bad, model, on)
    trace = _Trace(model)
    with trace, without_denormals():
        numbers = _step_again(bad, model, on, criterion or SetCriterion(origin.config.loss), trace)
    before = bad.terms if bad.norm is None else {**bad.terms, _NORM: bad.norm}
    print(f"\n{'':24}{'then':>14}{'now':>14}")
    for name, value in numbers.items():
        print(f"{_title(name):24}{f'{before[name]:.6g}' if name in before else '–':>14}{f'{value:.6g}':>14}")
    print(f"\nfirst module whose output is not finite: {trace.module or 'none'}")
    gradient = trace.gradient or (
        "none" if _NORM in numbers else "none was taken, since there is no loss without a matching"
    )
    print(f"first gradient that is not finite, going backward: {gradient}")
    # A matching that failed left no terms; the layer that it failed in has no class term then.
    first, then = _first_bad(numbers), _first_bad(before)
    same = first == then if before else first is not None and first.startswith("class/")
    print(f"{'reproduced' if same else 'NOT reproduced'}: {facts.error}")
    if not same:
        print(
            f"(now {'everything is finite' if first is None else f'{_title(first)} is the first'}.{_reasons(facts, on)})"
        )
    return same


def _model(bad: BadStep, path: Path, device: torch.device) -> SMCADETR:
    """The network as it was, in training mode."""
    config = bad.facts.origin.config
    attention = config.attention if device.type == bad.facts.origin.device else "auto"
    try:
        settings = replace(config.model, backbone=replace(config.model.backbone, weights=None))
        model = SMCADETR(settings, attention_backend=attention).to(device)
        model.load_state_dict(bad.weights)
    except Exception as error:  # transformers refuses options with errors of any type
        raise ValueError(
            f"{path}: its weights do not fit its configuration ({cut(error, 300)}): take another copy"
        ) from error
    model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.optim.backbone_lr == 0:
        model.backbone.requires_grad_(False)
    return model.train()


def _introduce(bad: BadStep, model: nn.Module, device: torch.device) -> None:
    facts, origin = bad.facts, bad.facts.origin
    ids = [image for part in bad.parts for image in part.image_ids.tolist()]
    print(
        f"step {facts.step + 1:,}, of epoch {facts.epoch + 1}; seed {origin.config.seed}; learning rates × {facts.lr_factor:g}; "
        f"then on {origin.device}, now on {device}\n"
        f"image ids: {ids}" + f", in {facts.parts} parts" * (facts.parts > 1)
    )
    if origin.world > 1:
        print(
            f"process {origin.rank} of {origin.world}, its own images: what batch norms saw of the others' is missing, and so is "
            "their share of the gradient; sums are divided by the objects of all, as they were"
        )
    for what, tensors in (("weights", dict(model.named_parameters())), ("optimiser's state", bad.optimizer)):
        wrong = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
        print(
            f"{what} before the step: {'finite' if not wrong else f'NOT finite: {cut(wrong[0])} ({len(wrong)} in all)'}"
        )


def _step_again(
    bad: BadStep, model: SMCADETR, device: torch.device, criterion: Criterion, trace: _Trace
) -> dict[str, float]:
    """The terms of the loss by name and, if it comes to that, the norm of the gradient."""
    facts, config = bad.facts, bad.facts.origin.config
    terms_of = completed(criterion, config.loss, facts.parts)
    seed_step(device, config.seed, facts.step, facts.origin.rank)
    count = torch.stack([part.targets.valid.sum() for part in bad.parts]).sum()
    num_boxes = (boxes_per_process(count) if facts.num_boxes is None else torch.tensor(facts.num_boxes)).to(device)
    half = HALVES[config.precision]
    terms: dict[str, float] = {}
    matched = True
    for host_batch in bad.parts:
        batch = host_batch.to(device)
        trace.images = batch.image_ids.tolist()
        with torch.autocast(device.type, half, enabled=half is not None):
            outputs = model(
                batch.images.contiguous(memory_format=torch.channels_last),
                batch.padding_mask if host_batch.padding_mask.any() else None,
                batch.targets,
                batch.seeds,
            )
        try:
            added = terms_of(outputs, batch.targets, num_boxes)
        except NonFiniteError as error:
            print(error)
            added, matched = _by_layer(criterion, terms_of, outputs, batch.targets, num_boxes), False
        if matched:
            added["loss"].backward()  # type: ignore[no-untyped-call]
        for name, value in added.items():
            terms[name] = terms.get(name, 0.0) + value.item()
    if matched:
        terms[_NORM] = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm).item()
    return terms


def _by_layer(
    criterion: Criterion,
    terms_of: Callable[[dict[str, Tensor], Targets, Tensor], Mapping[str, Tensor]],
    outputs: dict[str, Tensor],
    targets: Targets,
    num_boxes: Tensor,
) -> dict[str, Tensor]:
    """The terms of an output whose matching fails in some layers: NaN for the class there."""
    terms: dict[str, Tensor] = {}
    for layer in range(len(outputs["logits"])):
        of_one = {
            name: outputs[name][layer : layer + 1] for name in outputs if name in ("logits", "boxes", "class_logits")
        }
        try:
            found = terms_of(of_one, targets, num_boxes) if isinstance(criterion, SetCriterion) else {}
            terms |= {name.replace("/0", f"/{layer}"): value for name, value in found.items() if name != "loss"}
        except NonFiniteError:
            terms[f"class/{layer}"] = torch.tensor(math.nan)
    return terms


class _Trace:
    """While it is entered: the first module whose output is not finite, and the first parameter whose gradient is not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.images: list[int] = []
        """Ids of those that the network sees."""
        self.module = self.gradient = ""
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_hook(self._after(name)))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                hook: Any = parameter.register_post_accumulate_grad_hook  # untyped
                self._hooks.append(hook(self._accumulated(name)))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            bad = (
                None if self.module else next((t for t in _tensors(output) if not bool(torch.isfinite(t).all())), None)
            )
            if bad is None:
                return
            whole = all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(inputs))
            self.module = (
                f"{name or 'the network'} ({type(module).__name__}), whose input is {'' if whole else 'not '}finite"
            )
            if len(bad) == len(self.images):
                rows = (~torch.isfinite(bad)).flatten(1).any(1).tolist()
                of = [image for image, wrong in zip(self.images, rows, strict=True) if wrong]
                self.module += f", for the image ids {of}"

        return look

    def _accumulated(self, name: str) -> Any:
        def look(parameter: Tensor) -> None:
            if not self.gradient and parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                self.gradient = name

        return look


def _tensors(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in a module's input or output."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim():
            yield value
    elif isinstance(value, Mapping | list | tuple) or is_dataclass(value):
        items = (
            value.values()
            if isinstance(value, Mapping)
            else value
            if isinstance(value, list | tuple)
            else vars(value).values()
        )
        for item in items:
            yield from _tensors(item)


def _first_bad(numbers: Mapping[str, float]) -> str | None:
    return next((name for name, value in numbers.items() if not math.isfinite(value)), None)


def _title(name: str) -> str:
    term, _, layer = name.partition("/")
    return f"{term}, decoder layer {layer}" if layer.isdigit() else f"{term} of {layer}" if layer else term


def _reasons(facts: Facts, device: torch.device) -> str:
    """What may have made the difference."""
    origin = facts.origin
    reasons = {
        "on another kind of device dropout draws other masks and numbers round otherwise": device.type != origin.device,
        "the other processes' images are missing": origin.world > 1,
        "the run was compiled, this was not": origin.config.compile,
    }
    given = [reason for reason, holds in reasons.items() if holds]
    return f" Why it may differ: {'; '.join(given)}" if given else ""
