"""Whether `smca evaluate --errors` names the right cause: a trained model is spoiled in five ways whose cause is known.

    python docs/planted_faults.py runs/planted

trains two models on the built-in data (once; half an hour on two cores), spoils the first, and prints the table of docs/explain.md.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from smca.datasets import Category, DetectionDataset, Sample, SyntheticShapes
from smca.gpu.cli import run
from smca.gpu.config import RunConfig, SyntheticConfig
from smca.gpu.evaluation import open_split
from smca.gpu.evaluation.errors import ErrorReport, find_errors
from smca.gpu.evaluation.image_errors import MISSED, Error
from smca.gpu.files import MODEL_FOLDER
from smca.gpu.model import DRAW_THRESHOLD, SMCADETR
from smca.gpu.presets import demo, tiny_resnet
from smca.gpu.train import train

UNKNOWN = 2
"""The class whose labels are taken out of training: triangles."""


def config_of(output: Path) -> RunConfig:
    """The demo on two levels, so that there is one to spoil."""
    base = demo()
    model = replace(base.model, backbone=tiny_resnet(2, 3, 2), strides=(8, 16), query_init="anchors", num_queries=36)
    return replace(base, output=output, model=model)


class WithoutClass(DetectionDataset):
    """Shapes of which those of a class have no label."""

    def __init__(self, data: SyntheticShapes, label: int) -> None:
        self._data, self._label = data, label

    @property
    def categories(self) -> tuple[Category, ...]:
        """All of them: the class has a name and no objects."""
        return self._data.categories

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        keep = sample.labels != self._label
        return replace(sample, boxes_xyxy=sample.boxes_xyxy[keep], labels=sample.labels[keep])


def trained(folder: Path, *, without: int | None = None) -> Path:
    """Folder of the model, trained if there is none yet."""
    if not (folder / MODEL_FOLDER / "model.safetensors").is_file():
        config = config_of(folder)
        data = open_split("synthetic", "train", config.synthetic, cache=True)
        assert isinstance(data, SyntheticShapes)
        train(config, train_data=data if without is None else WithoutClass(data, without))
    return folder / MODEL_FOLDER


def blanked(model: SMCADETR) -> None:
    """The queries of the upper left quadrant are gone."""
    decoder = model.decoder
    assert decoder.query_anchor is not None
    assert decoder.query_content is not None
    keep = ~(decoder.query_anchor[:, :2] < 0).all(dim=1)
    decoder.query_anchor, decoder.query_content = (
        nn.Parameter(values[keep]) for values in (decoder.query_anchor, decoder.query_content)
    )
    decoder.num_queries = int(keep.sum())
    model.config = replace(model.config, num_queries=decoder.num_queries)


def narrowed(model: SMCADETR) -> None:
    """All Gaussians have a tenth of their width."""
    for layer in model.decoder.layers:
        for parameter in layer.prior.scale_head.parameters():  # type: ignore[union-attr]
            parameter.mul_(10)


def without_level(model: SMCADETR) -> None:
    """Nothing is taken from the finest level."""
    for layer in model.decoder.layers:
        layer.level_head.bias[0] = -1e4  # type: ignore[union-attr]


def frozen(model: SMCADETR) -> None:
    """The class head's row of a class is as before training."""
    torch.manual_seed(1)  # not as this training drew it: the network has learned to be read by those
    start = SMCADETR(model.config).decoder.class_head
    model.decoder.class_head.weight[UNKNOWN] = start.weight[UNKNOWN]
    model.decoder.class_head.bias[UNKNOWN] = start.bias[UNKNOWN]


FAULTS: dict[str, tuple[str, Callable[[SMCADETR], None] | None]] = {
    "the queries of a quadrant gone": ("uncovered", blanked),
    "all Gaussians a tenth as wide": ("width", narrowed),
    "the finest level's weights 0": ("level", without_level),
    "the class head of triangles as it started": ("silent", frozen),
    "triangles without labels in training": ("unknown", None),
}


def missed(report: ErrorReport) -> dict[int, Error]:
    """Missed objects by their number."""
    return {
        error.annotation: error for error in report.errors if error.kind == "missed" and error.annotation is not None
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models are kept")
    parser.add_argument("--images", type=int, default=300, help="held-out images")
    args = parser.parse_args(argv)
    folders = trained(args.folder / "whole"), trained(args.folder / "unknown", without=UNKNOWN)
    data = open_split("synthetic", "val", SyntheticConfig(val_images=args.images))
    whole = SMCADETR.from_pretrained(folders[0])
    thresholds = [DRAW_THRESHOLD] * whole.config.num_classes
    base = find_errors(whole, data, thresholds)
    before = missed(base)
    print(base.table(), end="\n\n", flush=True)
    lines = ["| fault | missed because of it | named | right | on the unspoiled model |", "|---|---|---|---|---|"]
    for what, (cause, spoil) in FAULTS.items():
        model = SMCADETR.from_pretrained(folders[1] if spoil is None else folders[0])
        if spoil is not None:
            with torch.no_grad():
                spoil(model)
        report = find_errors(model, data, thresholds)
        print(f"{what}\n{report.table()}", end="\n\n", flush=True)
        made = [e for n, e in missed(report).items() if n not in before and (spoil is not None or e.label == UNKNOWN)]
        named = Counter(error.cause for error in made)
        share = named[cause] / max(1, len(made))
        others = ", ".join(f"{number} {MISSED[other]}" for other, number in named.most_common() if other != cause)
        part = sum(error.cause == cause for error in before.values()) / max(1, len(before))
        lines.append(
            f"| {what} | {len(made)} | {MISSED[cause]} | {share:.1%}{f' ({others})' * bool(others)} "
            f"| {part:.1%} of {len(before)} |"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
