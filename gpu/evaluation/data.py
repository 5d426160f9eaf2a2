"""The data and the device that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from smca.datasets import Augmentation, Augmented, CocoDetection, DetectionDataset, SyntheticShapes, collate, find_split
from smca.datasets.layout import Split
from smca.gpu.config import ModelConfig, SyntheticConfig


def open_split(
    data: str | None, split: Split, synthetic: SyntheticConfig, *, cache: bool = False
) -> CocoDetection | SyntheticShapes:
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
    data: DetectionDataset, config: ModelConfig, batch_size: int, workers: int, indices: range | None = None
) -> DataLoader[Any]:
    """Batches of `data` (those of `indices`), resized as ``config`` says, in order."""
    resized = Augmented(data, Augmentation.evaluation(config.image_short_side, config.image_max_size), seed=0)
    chosen = resized if indices is None else torch.utils.data.Subset(resized, indices)
    return DataLoader(chosen, batch_size, collate_fn=collate, num_workers=workers)


def pick_device(name: str) -> torch.device:
    """The device that `name` asks for; "auto" takes a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was requested, but torch sees no CUDA GPU (torch {torch.__version__}): use --device cpu"
        )
    return device
