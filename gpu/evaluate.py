"""Evaluate a trained model on COCO-format data: the twelve COCO numbers and the AP of every class.

smca evaluate runs/small/model --data DIR
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch.utils.data import DataLoader

from smca.datasets import Augmentation, Augmented, Batch, CocoDetection, SyntheticShapes, collate, find_split
from smca.datasets.layout import Split
from smca.gpu.coco_eval import evaluate_detections
from smca.gpu.config import ModelConfig, SyntheticConfig
from smca.gpu.model import SMCADETR, decode

DetectionData = CocoDetection | SyntheticShapes


def open_split(data: str | None, split: Split, synthetic: SyntheticConfig, *, cache: bool = False) -> DetectionData:
    """The data that `data` names: a COCO-format folder's split, or "synthetic" (docs/data.md)."""
    if data is None:
        raise ValueError(
            "no data given: pass --data DIR (a COCO-format folder, docs/data.md) or try the built-in data: smca train demo"
        )
    if data == "synthetic":
        count, seed = {"train": (synthetic.train_images, 0), "val": (synthetic.val_images, 1)}[split]
        return SyntheticShapes(
            count,
            seed,
            image_size=synthetic.image_size,
            max_objects=synthetic.max_objects,
            min_side=synthetic.min_side,
            max_side=synthetic.max_side,
            cache=cache,
        )
    return CocoDetection(*find_split(Path(data), split), cache=cache)


def evaluation_loader(
    data: DetectionData, config: ModelConfig, batch_size: int, workers: int, indices: range | None = None
) -> DataLoader[Any]:
    """Batches of `data` (those of `indices`), resized as ``config`` says, in order."""
    resized = Augmented(data, Augmentation.evaluation(config.image_short_side, config.image_max_size), seed=0)
    chosen = resized if indices is None else torch.utils.data.Subset(resized, indices)
    return DataLoader(chosen, batch_size, collate_fn=collate, num_workers=workers)


@torch.inference_mode()
def detect(model: SMCADETR, loader: Iterable[Batch]) -> list[dict[str, Any]]:
    """Run `model` over all batches; returns COCO results (image_id, category_id, bbox in xywh pixels, score).

    As many detections an image as the model has queries, at least 100: COCO counts the best 100 of each class.
    """
    training = model.training
    model.eval()
    device = model.pixel_mean.device
    category_ids = model.config.category_ids or tuple(range(model.config.num_classes))
    results: list[dict[str, Any]] = []
    for host_batch in loader:
        batch = host_batch.to(device)
        outputs = model(batch.images, batch.padding_mask)
        found = decode(
            outputs["logits"][-1], outputs["boxes"][-1], batch.original_sizes, max(100, model.config.num_queries)
        )
        for image_id, detections in zip(host_batch.image_ids.tolist(), found, strict=True):
            results += coco_results(detections.scores, detections.labels, detections.boxes_xyxy, image_id, category_ids)
    model.train(training)
    return results


def coco_results(
    scores: torch.Tensor, labels: torch.Tensor, boxes_xyxy: torch.Tensor, image_id: int, category_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Detections of one image as COCO results: bbox = [left, top, width, height] in pixels."""
    boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for score, label, box in zip(scores.tolist(), labels.tolist(), boxes_xywh, strict=True)
    ]


def check_categories(config: ModelConfig, ground_truth: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless the data's categories are the model's."""
    theirs = {c["id"]: c["name"] for c in ground_truth["categories"]}
    ours = dict(zip(config.category_ids, config.class_names, strict=True))
    if ours != theirs:
        raise ValueError(
            f"the model's categories {ours} are not those of {source}, {theirs}: "
            "evaluate on data with the same categories, or train on this data"
        )


@dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a trained model on COCO-format data."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and model.safetensors (runs/…/model), or a name on the Hugging Face hub."""
    data: str = "synthetic"
    """Folder with data in COCO format, or "synthetic"."""
    split: Split = "val"
    """Which part of the data."""
    batch_size: int = 8
    """Images a forward pass."""
    workers: int = 1
    """Processes that load images."""
    device: str = "auto"
    """"cuda", "cpu" …"""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The built-in data."""
    output: Path | None = None
    """File that receives the detections as COCO results JSON."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca evaluate``."""
    args = tyro.cli(EvaluateArgs, args=argv, prog="smca evaluate")
    model = SMCADETR.from_pretrained(args.model).to(pick_device(args.device))
    data = open_split(args.data, args.split, args.synthetic)
    ground_truth = data.ground_truth()
    check_categories(model.config, ground_truth, args.data)
    results = detect(model, evaluation_loader(data, model.config, args.batch_size, args.workers))
    print(data.report)
    print(evaluate_detections(ground_truth, results).table())
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results))
        print(f"detections written to {args.output}")


def pick_device(name: str) -> torch.device:
    """The device that `name` asks for; "auto" takes a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} asked for, but torch sees no CUDA GPU (torch {torch.__version__}): use --device cpu"
        )
    return device


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
