"""The data and the device that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from smca.datasets import (
    AnnotationOptions,
    Augmentation,
    Augmented,
    CocoDetection,
    DetectionDataset,
    SyntheticShapes,
    collate,
    find_split,
)
from smca.datasets.layout import Split, find_annotations, folder_of_images
from smca.gpu.config import ModelConfig, SyntheticConfig
from smca.gpu.loading import Loader


def open_split(
    data: str | None,
    split: Split,
    synthetic: SyntheticConfig,
    options: AnnotationOptions | None = None,
    *,
    json_file: Path | None = None,
    images_dir: Path | None = None,
    cache: bool = False,
) -> CocoDetection | SyntheticShapes:
    """The data that `data` names: a COCO-format folder's split, or "synthetic" (docs/data.md).

    json_file, images_dir: an annotation file and its images, in place of what is found in the folder; without `images_dir`, images
    are beside the file or in a folder of the name that the split has.
    """
    if data == "synthetic" and json_file is None and images_dir is None:
        seeds = {"train": 0, "val": 1, "test": 2}
        return SyntheticShapes(
            synthetic.train_images if split == "train" else synthetic.val_images,
            seeds[split],
            image_size=synthetic.image_size,
            max_objects=synthetic.max_objects,
            min_side=synthetic.min_side,
            max_side=synthetic.max_side,
            cache=cache,
        )
    if json_file is None:
        if data is None or data == "synthetic":
            raise ValueError(
                "no data given: pass --data DIR (a COCO-format folder, docs/data.md) or name files (--train-json, --train-images, "
                "--val-json, --val-images; smca evaluate: --json, --images), or try the built-in data: smca train demo"
            )
        if images_dir is None:
            images_dir, json_file = find_split(Path(data), split)
        else:
            json_file = find_annotations(Path(data), split)
    elif images_dir is None:
        images_dir = folder_of_images(json_file)
    return CocoDetection(images_dir, json_file, options=options, cache=cache)


def evaluation_loader(
    data: DetectionDataset, config: ModelConfig, batch_size: int, workers: int, indices: range | None = None
) -> DataLoader[Any]:
    """Batches of `data` (of its `indices`), resized as ``config`` says; images of like shape together, where the data know their
    sizes, so that there is little padding."""
    resized = Augmented(data, Augmentation.evaluation(config.image_short_side, config.image_max_size), seed=0)
    order = list(range(len(data)) if indices is None else indices)
    sizes = getattr(data, "sizes", None)
    if sizes is not None:
        height, width = sizes[order].T
        order = np.asarray(order)[np.lexsort((width, height, height / width))].tolist()
    return Loader(
        torch.utils.data.Subset(resized, order),
        workers=workers,
        batch_size=batch_size,
        collate_fn=collate,
        generator=torch.Generator(),  # or it would draw from the generator that training draws from
    )


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
