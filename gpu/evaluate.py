"""Evaluate a trained model on COCO-format data: the twelve COCO numbers and the AP of every class.

smca evaluate runs/small/model --data DIR
smca evaluate runs/small/model --data DIR --errors out     the cause of every error, curves, confusion matrix, thresholds
smca evaluate runs/small/model --data DIR --save-thresholds
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import track

from smca.datasets import AnnotationOptions, CocoDetection, SyntheticShapes
from smca.datasets.batch import CocoDict
from smca.datasets.layout import Split
from smca.gpu.config import ModelConfig, SyntheticConfig
from smca.gpu.evaluation import detect, evaluate_detections, evaluation_loader, open_split, pick_device
from smca.gpu.evaluation.errors import find_errors
from smca.gpu.evaluation.operating_point import operating_points, operating_report, thresholds_of
from smca.gpu.files import CONFIG_FILE, folder_with_config, write_thresholds
from smca.gpu.model import SMCADETR, draw_thresholds
from smca.gpu.pictures.errors import write_errors


def check_categories(config: ModelConfig, ground_truth: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless the data's categories are the model's."""
    data_categories = {c["id"]: c["name"] for c in ground_truth["categories"]}
    model_categories = dict(zip(config.category_ids, config.class_names, strict=True))
    if model_categories != data_categories:
        raise ValueError(
            f"the model's categories {model_categories} are not those of {source}, {data_categories}: "
            "evaluate on data with the same categories, or train on this data"
        )


@dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a trained model on COCO-format data."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model (config.json, model.safetensors) or of a run, its checkpoint, or a name on the Hugging Face hub."""
    data: str = "synthetic"
    """Folder with data in COCO format, or "synthetic"."""
    split: Split = "val"
    """Which part of the data."""
    json: Path | None = None
    """Annotation file, wherever it lies; the one that is found in `data` otherwise."""
    images: Path | None = None
    """Folder with its images."""
    annotations: AnnotationOptions = AnnotationOptions()
    """How to understand the annotation file where it leaves room."""
    batch_size: int = 8
    """Images per forward pass."""
    workers: int = 1
    """Processes that load images."""
    device: str = "auto"
    """"cuda", "cpu" …"""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The built-in data."""
    output: Path | None = None
    """File that receives the detections as COCO results JSON, in the annotation file's ids and frame."""
    errors: Path | None = None
    """Folder that receives why objects were missed and boxes are false: a contact sheet for each cause, precision–recall curves,
    confusion matrix, and errors.json. The decoder runs again for every error, which takes a while."""
    save_thresholds: bool = False
    """Write the score of best F1 of each class into the config.json of `model`, a local folder: what `smca predict` draws from."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca evaluate``."""
    args = tyro.cli(EvaluateArgs, args=argv, prog="smca evaluate")
    to_change = folder_with_config(args.model) if args.save_thresholds else None
    model = SMCADETR.from_pretrained(args.model).to(pick_device(args.device))
    data = open_split(
        args.data, args.split, args.synthetic, args.annotations, json_file=args.json, images_dir=args.images
    )
    ground_truth = data.ground_truth()
    check_categories(model.config, ground_truth, str(args.json or args.data))
    results = detect(model, evaluation_loader(data, model.config, args.batch_size, args.workers))
    print(data.report)
    print(evaluate_detections(ground_truth, results).table())
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        in_file = data.with_own_ids(results) if isinstance(data, CocoDetection) else results
        args.output.write_text(json.dumps(in_file), encoding="utf-8")
        print(f"detections written to {args.output}")
    if args.errors is not None:
        _report_errors(model, data, ground_truth, results, args.errors)
    if to_change is not None:
        write_thresholds(to_change, thresholds_of(operating_points(ground_truth, results), model.config.category_ids))
        print(f"thresholds written to {to_change / CONFIG_FILE}")


def _report_errors(
    model: SMCADETR,
    data: CocoDetection | SyntheticShapes,
    ground_truth: CocoDict,
    results: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    """At the thresholds that are saved with the model; without any, at those of best F1 in these data."""
    operating, config = operating_report(ground_truth, results), model.config
    if config.score_thresholds is None:
        config = replace(config, score_thresholds=operating.thresholds)
    watched = partial(track, description="looking for causes", disable=not sys.stdout.isatty())
    report = find_errors(model, data, draw_thresholds(config).tolist(), watched)
    write_errors(operating, report, lambda image_id: data[report.indices[image_id]].image, folder)
    print(f"\n{operating.table()}\n\n{report.table()}\n\nerrors written to {folder}/")


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
