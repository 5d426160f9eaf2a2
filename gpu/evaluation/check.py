"""What training says about its data before it starts: the warnings that matter, without reading a picture."""

from __future__ import annotations

from collections.abc import Sequence

from smca.datasets import Category
from smca.datasets.findings import find_between, find_in_split
from smca.datasets.table import AnnotationTable
from smca.gpu.config import RunConfig
from smca.gpu.evaluation.fit import find_in_settings

_IN_THE_REPORT = {"degenerate-boxes", "boxes-outside", "clipped-boxes"}
"""What the report of a data set says anyway."""

_MOST_ROWS = 2_000_000
"""Of more annotations, those that are alike are left to `smca check-data`: to find them takes a second for each million."""


def warnings_of(
    config: RunConfig, train: AnnotationTable, val: AnnotationTable, categories: Sequence[Category]
) -> list[str]:
    """One sentence for each thing that costs accuracy, or makes the numbers wrong."""
    tables = {"train": train, "val": val}
    found = [
        *find_in_settings(train, categories, config.model, config.augmentation),
        *find_between(tables, categories),
        *(
            each
            for split, table in tables.items()
            if len(table.labels) <= _MOST_ROWS
            for each in find_in_split(split, table, categories)
        ),
    ]
    said = [each for each in found if each.level == "warning" and each.kind not in _IN_THE_REPORT]
    return [f"{_where(each.split)}{each.text}" for each in said]


def _where(split: str) -> str:
    return {"train": "training images: ", "val": "held-out images: "}.get(split, "")
