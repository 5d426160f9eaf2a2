"""`Joined`: several data sets as one, to train on folders that belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from smca.datasets.batch import Category, CocoDict, DetectionDataset, Report, Sample, digest_of
from smca.datasets.boxes import CheckedBoxes
from smca.datasets.coco import require_same_categories
from smca.datasets.table import AnnotationTable, table_of


class Joined(DetectionDataset):
    """The images of all `parts`, one part after the other. Ids of images and annotations are counted anew, from 1: files that know
    nothing of each other use the same ones.

    Raises ValueError unless all parts have the same categories, ids and names.
    """

    def __init__(self, parts: Sequence[DetectionDataset]) -> None:
        for part in parts[1:]:
            require_same_categories(parts[0].categories, part.categories, ("first", "further"))
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def categories(self) -> tuple[Category, ...]:
        """Those of every part."""
        return self.parts[0].categories

    @property
    def report(self) -> Report:
        """Sums over the parts."""
        reports = [part.report for part in self.parts]
        values: dict[str, object] = {}
        for field in dataclasses.fields(Report):
            each = [getattr(report, field.name) for report in reports]
            if isinstance(each[0], int):
                values[field.name] = sum(each)
            elif isinstance(each[0], tuple):
                values[field.name] = tuple(text for texts in each for text in texts)
            else:
                values[field.name] = " and ".join(dict.fromkeys(text for text in each if text))
        unused = set.intersection(*(set(report.unused_classes) for report in reports))
        values |= {"classes": len(self.categories), "unused_classes": tuple(sorted(unused))}
        return Report(**values)  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """What tells these data from others."""
        return digest_of([part.digest for part in self.parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """The image with its boxes; raises what the part raises."""
        return self.read(index, float("inf"))

    def read(self, index: int, least_short_side: float) -> Sample:
        """``self[index]``, which may be smaller, as far as its part provides it."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected an image index from 0 to {len(self) - 1}, got {index}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        sample = self.parts[number].read(index - int(self._starts[number]), least_short_side)
        return dataclasses.replace(sample, image_id=index + 1)

    def annotation_table(self) -> AnnotationTable:
        """The parts' annotations as arrays; ids are counted anew, as in `ground_truth`."""
        tables = [table_of(part) for part in self.parts]
        checked = [table.checked for table in tables]
        count = sum(len(table.labels) for table in tables)
        return AnnotationTable(
            images=np.concatenate([table.images + start for table, start in zip(tables, self._starts, strict=False)]),
            labels=np.concatenate([table.labels for table in tables]),
            checked=CheckedBoxes(
                *(
                    np.concatenate([getattr(each, field.name) for each in checked])
                    for field in dataclasses.fields(CheckedBoxes)
                )
            ),
            crowd=np.concatenate([table.crowd for table in tables]),
            ids=np.arange(1, count + 1),
            sizes=np.concatenate([table.sizes for table in tables]),
            image_ids=np.arange(1, len(self) + 1),
            file_names=[name for table in tables for name in table.file_names],
        )

    def ground_truth(self) -> CocoDict:
        """The parts' annotations as one COCO dictionary."""
        truth = self.parts[0].ground_truth() | {"images": [], "annotations": []}
        for part, start in zip(self.parts, self._starts.tolist(), strict=False):
            of_part = part.ground_truth()
            new_id = {image["id"]: start + place for place, image in enumerate(of_part["images"], start=1)}
            truth["images"] += [{**image, "id": new_id[image["id"]]} for image in of_part["images"]]
            truth["annotations"] += [
                {**each, "id": len(truth["annotations"]) + place, "image_id": new_id[each["image_id"]]}
                for place, each in enumerate(of_part["annotations"], start=1)
            ]
        return truth
