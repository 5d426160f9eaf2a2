"""A trained model beside the one that is to start from it: what corresponds to what, class by class and level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smca.datasets.settings import shown
from smca.gpu.config import ModelConfig
from smca.gpu.weights.source import Part, Source, part_of


@dataclass(frozen=True)
class Write:
    """What one weight is set to."""

    name: str
    value: Tensor
    rows: tuple[int, ...] | None = None
    """Which of its rows; None = all of it."""


@dataclass
class PartFit:
    """What one part of the model takes."""

    part: Part
    writes: list[Write] = field(default_factory=list)
    taken: str = ""
    """How much, in words; "" = nothing."""
    lacking: list[str] = field(default_factory=list)
    """What of the part starts afresh, and why."""
    remarks: list[str] = field(default_factory=list)
    """What else there is to know."""

    @property
    def whole(self) -> bool:
        """Whether every weight of the part is set."""
        return bool(self.taken) and not self.lacking

    @property
    def line(self) -> str:
        """For the report."""
        said = [self.taken or "not taken", *self.lacking, *self.remarks]
        return f"{self.part:<12} {'; '.join(said)}"


@dataclass(frozen=True)
class Pair:
    """The two models."""

    source: Source
    here: ModelConfig
    """Of the model that is to start."""
    layout: dict[str, torch.Size]
    """Its weights' names and shapes."""

    @property
    def there(self) -> ModelConfig:
        """Of the trained model."""
        return self.source.config

    def names(self, part: Part) -> list[str]:
        """The model's weights of a part."""
        return [name for name in self.layout if part_of(name) == part]

    def has(self, part: Part) -> bool:
        """Whether the trained model has a weight of it."""
        return any(part_of(name) == part for name in self.source.weights)

    def differences(self, *fields: str) -> list[str]:
        """In words, with the option that would make the model like the trained one, each of the fields that differ."""
        found = []
        for name in fields:
            there, here = getattr(self.there, name, None), getattr(self.here, name, None)
            if there != here:
                found.append(f"{name} is {shown(there)} there, {shown(here)} here: {option(name, there)}")
        return found

    def copy(self, fit: PartFit, names: Sequence[str]) -> list[str]:
        """Let `fit` take these weights as they are; the names that the trained model has not, or in another shape, are returned."""
        left = []
        for name in names:
            value = self.source.weights.get(name)
            if value is None or value.shape != self.layout[name]:
                left.append(name)
            else:
                fit.writes.append(Write(name, value))
        return left

    @property
    def levels(self) -> list[int | None]:
        """For each level of the model the trained one's of the same stride."""
        strides = self.there.strides
        return [strides.index(stride) if stride in strides else None for stride in self.here.strides]

    @property
    def decoder_levels(self) -> list[int | None]:
        """The same of the levels that the decoder reads, of which the finest may be halved."""
        there = list(zip(self.there.strides, self.there.decoder_strides, strict=True))
        here = zip(self.here.strides, self.here.decoder_strides, strict=True)
        return [there.index(strides) if strides in there else None for strides in here]

    def classes(self) -> tuple[list[tuple[int, int]], str]:
        """(label here, label there) of the classes that are the same; and in words why they are all there are.

        They are the same by name, unless the trained model has no names and as many classes.
        """
        here, there = self.here.class_names, self.there.class_names
        if not there and self.here.num_classes == self.there.num_classes:
            pairs = [(label, label) for label in range(self.here.num_classes)]
            return pairs, f"all {len(pairs)} classes by position, as the classes there have no names"
        if not there:
            return (
                [],
                f"the {self.there.num_classes} classes there have no names, and there are {self.here.num_classes} here",
            )
        if not here:
            return (
                [],
                "the classes here have no names yet: they come with the data, and those of the same name are taken",
            )
        of_name = {_plain(name): label for label, name in enumerate(there)}
        pairs = [(label, of_name[_plain(name)]) for label, name in enumerate(here) if _plain(name) in of_name]
        if not pairs:
            return [], f"none of the classes has the name of one there ({_some(there)} there, {_some(here)} here)"
        if len(pairs) == len(here):
            return pairs, f"all {len(here)} classes, by name"
        taken = {label for label, _ in pairs}
        fresh = _some([name for label, name in enumerate(here) if label not in taken])
        return pairs, f"{len(pairs)} of {len(here)} classes, by name (not there: {fresh})"


def option(name: str, value: Any) -> str:
    """What sets a field of the model's configuration on the command line."""
    values = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--model.{name.replace('_', '-')} {values}"


def missing_levels(levels: Sequence[int | None], here: Sequence[int], there: Sequence[int]) -> list[str]:
    """In words, if there are levels, of the strides `here`, that the trained model has not."""
    afresh = [str(stride) for stride, level in zip(here, levels, strict=True) if level is None]
    if not afresh:
        return []
    strides = " ".join(map(str, there))
    return [f"what belongs to stride {', '.join(afresh)} starts afresh: the strides there are {strides}"]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
