"""The step that met a non-finite number, in one file: what ``smca train --replay`` takes again without the data set.

    part 0/images …        the batch, in as many parts as the process took it in
    model/NAME             the weights that the step began with
    optimizer/NAME/KEY     the optimiser's state of each of them

and, as JSON in the file's metadata, what ``Facts`` lists. It is a safetensors file: reading it runs no code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smca.datasets import Batch, Targets
from smca.gpu.config import RunConfig
from smca.gpu.config_json import cut, read_json
from smca.gpu.files import write_atomically

BAD_STEP_FILE = "bad_step.safetensors"
_FACTS = "smca step"
"""Key of the metadata."""
_OF_THE_RUN = ("init", "init_parts", "resume", "resume_changed", "restartable", "overwrite", "dry_run", "replay")
"""Settings that say how a run is started, not what a step computes; paths are left out likewise."""
_OF_A_BATCH = ("images", "padding_mask", "image_ids", "original_sizes", "seeds")
_OF_TARGETS = ("labels", "boxes", "valid")


@dataclass(frozen=True, eq=False)
class Step:
    """What one process does in a step."""

    parts: Sequence[Batch]
    """Its images, on the host, in the parts that it takes them in."""
    number: int = 0
    """Steps done before."""
    epoch: int = 0
    """Whole epochs done before."""
    lr_factor: float = 1.0
    """What the schedule multiplies the learning rates by."""
    num_boxes: Tensor | None = None
    """What sums of the loss are divided by, a scalar on any device: it counts the objects of all processes. None = not known."""


@dataclass(frozen=True)
class Origin:
    """Of which run and process a step is."""

    config: RunConfig
    """With the classes of the data, and a backbone that can be built without published weights; in a file, without paths."""
    rank: int
    """Of the process."""
    world: int
    """Number of processes."""
    device: str
    """Type of the device: "cuda", "cpu" …"""
    criterion: str | None
    """Name of a loss of the user's own; None = ``SetCriterion``."""


@dataclass(frozen=True)
class Facts:
    """A bad step, its tensors apart. Numbers that may be NaN are texts."""

    step: int
    """Steps done before."""
    epoch: int
    """Whole epochs done before."""
    parts: int
    """Into which the batch was divided."""
    lr_factor: float
    """What the schedule multiplied the learning rates by."""
    num_boxes: float | None
    """What sums of the loss were divided by."""
    error: str
    """What was found."""
    terms: Mapping[str, Any]
    norm: str | None
    origin: Origin


@dataclass(frozen=True, eq=False)
class BadStep:
    """A bad step as it was read."""

    facts: Facts
    terms: dict[str, float]
    """Of the loss, by name; empty if the matching failed before there were any."""
    norm: float | None
    """Of the gradient, if it came to that."""
    parts: tuple[Batch, ...]
    weights: dict[str, Tensor]
    """The model's state before the step."""
    optimizer: dict[str, Tensor]
    """"parameter/key" → the optimiser's state before the step."""


def save_bad_step(
    path: Path,
    step: Step,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    origin: Origin | None,
    *,
    error: str,
    terms: Mapping[str, float],
    norm: float | None,
) -> None:
    """Write a step to `path`, atomically.

    Raises:
        OSError: as ``write_atomically``.
    """
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(step.parts):
        named = {name: getattr(batch, name) for name in _OF_A_BATCH}
        named |= {name: getattr(batch.targets, name) for name in _OF_TARGETS}
        tensors |= {f"part {number}/{name}": value for name, value in named.items()}
    tensors |= {f"model/{name}": value for name, value in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer/{names[id(parameter)]}/{key}": torch.as_tensor(value) for key, value in state.items()}
    facts = {
        "step": step.number,
        "epoch": step.epoch,
        "parts": len(step.parts),
        "lr_factor": step.lr_factor,
        "num_boxes": None if step.num_boxes is None else float(step.num_boxes),
        "error": error,
        "terms": {name: repr(value) for name, value in terms.items()},
        "norm": None if norm is None else repr(norm),
        "origin": None if origin is None else {**vars(origin), "config": _plain(origin.config)},
    }
    on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda file: file.write(save(on_host, {_FACTS: json.dumps(facts)})))


def _plain(config: RunConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {k: v for k, v in values.items() if k not in _OF_THE_RUN and not isinstance(v, Path)}


def load_bad_step(path: Path) -> BadStep:
    """Read what ``save_bad_step`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or is something else; names it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: give the {BAD_STEP_FILE} in the folder of a run that stopped at a NaN"
        )
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_FACTS)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut, damaged or not a safetensors file ({cut(error)}): take another copy"
        ) from error
    if text is None:
        raise ValueError(f"{path} is not a step of smca train: give the {BAD_STEP_FILE} in the folder of a run")
    facts = read_json(Facts, text, str(path))
    try:
        parts = tuple(_batch(tensors, f"part {number}/", facts) for number in range(max(1, facts.parts)))
        numbers = {name: float(value) for name, value in facts.terms.items()}
        norm = None if facts.norm is None else float(facts.norm)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} lacks {cut(error)}: it is damaged; take another copy") from error
    weights, state = (
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in ("model/", "optimizer/")
    )
    return BadStep(facts, numbers, norm, parts, weights, state)


def _batch(tensors: Mapping[str, Tensor], prefix: str, facts: Facts) -> Batch:
    """A part of the batch; KeyError or ValueError for one that no network takes."""
    held = {name: tensors[prefix + name] for name in (*_OF_A_BATCH, *_OF_TARGETS)}
    (count, *_), (_, most, *_) = held["images"].shape, (*held["labels"].shape, 0, 0)
    shapes: dict[str, tuple[int, ...]] = {
        "images": (count, 3, *held["images"].shape[2:4]),
        "padding_mask": (count, *held["images"].shape[2:4]),
        **{name: (count,) for name in ("image_ids", "seeds")},
        "original_sizes": (count, 2),
        **{name: (count, most) for name in ("labels", "valid")},
        "boxes": (count, most, 4),
    }
    for name, shape in shapes.items():
        if tuple(held[name].shape) != shape:
            raise ValueError(f"{prefix}{name} of the shape {shape}")
    if not bool(((held["labels"] >= 0) & (held["labels"] < facts.origin.config.model.num_classes)).all()):
        raise ValueError(f"{prefix}labels of its classes")
    targets = Targets(**{name: held[name] for name in _OF_TARGETS})
    return Batch(targets=targets, **{name: held[name] for name in _OF_A_BATCH})
