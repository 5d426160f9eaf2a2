"""A trained model in this project's names, wherever it came from, and the parts that it consists of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from smca.gpu.config import InitPart, ModelConfig
from smca.gpu.config_json import cut
from smca.gpu.model import SMCADETR

Part = InitPart
PARTS: tuple[Part, ...] = get_args(Part)
"""What a model is taken apart into; each is reported on one line."""

_OF_PART: dict[Part, str] = {
    "backbone": r"backbone\.",
    "projections": r"input_proj\.|level_embed$",
    "encoder": r"encoder\.|halve\.",
    "prior": r"decoder\.center_head\.|decoder\.layers\.\d+\.(prior|state_norm|level_head)\.",
    "queries": r"decoder\.(query_|box_position\.|label_embed$)",
    "class_head": r"decoder\.class_head\.",
    "box_heads": r"decoder\.box_heads\.",
    "decoder": r"decoder\.",
    "dense_head": r"dense_head\.",
}
"""The first pattern that a name begins with says its part."""


def part_of(name: str) -> Part:
    """Which part a weight belongs to, by its name in ``SMCADETR``'s state dict."""
    return next(part for part, pattern in _OF_PART.items() if re.match(pattern, name))


@dataclass(frozen=True)
class Source:
    """A trained model."""

    name: str
    """As it was given: a folder, a file or a repository."""
    kind: str
    """Whose model it is, in words."""
    config: ModelConfig
    """What it is."""
    weights: Mapping[str, Tensor]
    """By the names of ``SMCADETR``'s state dict, on the CPU. With class_scores="softmax" the last row of the class
    head is "no object"."""
    notes: tuple[str, ...] = ()
    """Where it is not exactly the model that it came from."""
    absent: Mapping[Part, str] = dataclasses.field(default_factory=dict)
    """Parts of which weights are missing, and why."""


def blank(config: ModelConfig) -> SMCADETR:
    """A model without memory for its weights, and without published ones.

    Raises:
        ValueError: no such model can be built.
    """
    with torch.device("meta"):
        return SMCADETR(config, attention_backend="eager", download=False)


def is_counter(name: str) -> bool:
    """Whether it is a batch norm's count of batches, which nothing reads."""
    return name.endswith("num_batches_tracked")


def checked(source: Source) -> Source:
    """`source`, if its weights are those of its configuration: every name and shape, but for its `absent` parts.

    Raises:
        ValueError: they are not; names the first that does not fit.
    """
    try:
        own = blank(source.config).state_dict()
    except Exception as error:  # transformers refuses options with errors of any type
        raise ValueError(f"{source.name}: no model can be built from it: {cut(error, 300)}") from error
    missing = [k for k in own if k not in source.weights and part_of(k) not in source.absent and not is_counter(k)]
    unknown = sorted(source.weights.keys() - own.keys())
    differing = [k for k in sorted(own.keys() & source.weights.keys()) if own[k].shape != source.weights[k].shape]
    if not (missing or unknown or differing):
        return source
    found = [f"{len(missing)} weights are missing, such as {cut(missing[0])}"] if missing else []
    found += [f"{len(unknown)} are unknown, such as {cut(unknown[0])}"] if unknown else []
    if differing:
        name = differing[0]
        shapes = f"{tuple(source.weights[name].shape)}, expected {tuple(own[name].shape)}"
        found.append(f"{len(differing)} are of another shape, such as {cut(name)}: {shapes}")
    raise ValueError(
        f"{source.name} looks like {source.kind}, but its weights are not those of one: {'; '.join(found)} (in this "
        "project's names). Its code was probably changed; only models as published are understood"
    )
