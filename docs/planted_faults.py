"""Whether `smca evaluate --errors` names the right cause: a trained model is spoiled in five ways whose cause is known.

    python docs/planted_faults.py runs/planted

trains two models on the built-in data (once; 20 minutes on two cores), spoils the first, and prints the table of docs/explain.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from smca.datasets import Sample, SyntheticShapes
from smca.gpu.cli import run
from smca.gpu.config import RunConfig, SyntheticConfig
from smca.gpu.evaluation import open_split
from smca.gpu.files import MODEL_FOLDER
from smca.gpu.presets import demo, tiny_resnet
from smca.gpu.train import train

UNKNOWN = 2
"""The class whose labels are taken out of training: triangles."""


def config_of(output: Path) -> RunConfig:
    """The demo on two levels, so that there is one to spoil."""
    base = demo()
    model = replace(base.model, backbone=tiny_resnet(2, 3, 2), strides=(8, 16), query_init="anchors", num_queries=36)
    return replace(base, output=output, model=model)


class WithoutClass:
    """Shapes of which those of a class have no label."""

    def __init__(self, data: SyntheticShapes, label: int) -> None:
        self._data, self._label = data, label
        self.categories, self.report = data.categories, data.report

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        sample = self._data[index]
        keep = sample.labels != self._label
        return replace(sample, boxes_xyxy=sample.boxes_xyxy[keep], labels=sample.labels[keep])

    def ground_truth(self) -> object:
        truth = self._data.ground_truth()
        unknown = self.categories[self._label].id
        return {**truth, "annotations": [a for a in truth["annotations"] if a["category_id"] != unknown]}


def trained(folder: Path, *, without: int | None = None) -> Path:
    """Folder of the model, trained if there is none yet."""
    if not (folder / MODEL_FOLDER / "model.safetensors").is_file():
        config = config_of(folder)
        data = open_split("synthetic", "train", config.synthetic, cache=True)
        assert isinstance(data, SyntheticShapes)
        train(config, train_data=data if without is None else WithoutClass(data, without))
    return folder / MODEL_FOLDER


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models are kept")
    args = parser.parse_args(argv)
    whole = trained(args.folder / "whole")
    unknown = trained(args.folder / "unknown", without=UNKNOWN)
    print(whole, unknown, SyntheticConfig())


if __name__ == "__main__":
    run(main)
