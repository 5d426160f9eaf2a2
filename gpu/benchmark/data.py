"""What ``smca benchmark`` measures of the data: how fast images come, and what an annotation file of any size costs."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from smca.datasets import Augmentation, Augmented, CocoDetection, Sample, collate
from smca.datasets.batch import UInt8Array
from smca.gpu.benchmark.cases import Case
from smca.gpu.benchmark.measure import memory_mib, peak_mib, private_mib
from smca.gpu.config import ModelConfig
from smca.gpu.loading import Loader

PHOTOGRAPHS = 32
"""640×480 JPEGs that each case reads."""
_SIZE = (480, 640)
BOXES = 8
"""Per image, in the annotation file of the index."""
_PER_FOLDER, _PER_FILE = 10_000, 20_000
_TOUCHED = 5_000


def make_photographs(folder: Path) -> tuple[Path, Path]:
    """(images_dir, annotations_file) of ``PHOTOGRAPHS`` pictures as smooth, and as noisy, as photographs are."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(PHOTOGRAPHS):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
            _SIZE[::-1], Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 6, (*_SIZE, 3))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": _SIZE[0], "width": _SIZE[1]})
        box = [100, 100, 200, 150]
        annotations.append({"id": number + 1, "image_id": number, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    return folder, folder / "annotations.json"


def loading_case(way: str, folder: Path, short_side: int) -> Case:
    """Reads all photographs of `folder`, resized to `short_side`, as batches.

    way: "Pillow" decodes, resizes and normalises one by one, as DETR's code does; "ours" is what training does, up to a batch
        of uint8 that the device normalises; "ours, normalised" normalises it here, too.
    """
    config = ModelConfig()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    data = CocoDetection(folder, folder / "annotations.json")
    augmented = Augmented(data, Augmentation(short_sides=(short_side,), max_size=1333))

    def normalised(pixels: UInt8Array) -> torch.Tensor:
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous().float().div(255)
        return (image - mean) / std

    def pillow() -> torch.Tensor:
        images = []
        for name in data.file_names:
            with Image.open(folder / name) as opened:
                picture = opened.convert("RGB")
            sides = (round(picture.width * short_side / min(picture.size)), short_side)
            picture = picture.resize(sides, Image.Resampling.BILINEAR)
            images.append(normalised(np.asarray(picture)))
        return torch.stack(images)

    def ours() -> torch.Tensor:
        samples = [augmented[index] for index in range(len(augmented))]
        return collate(samples).images if way == "ours" else torch.stack([normalised(s.image) for s in samples])

    def step() -> dict[str, torch.Tensor]:
        images = (pillow if way == "Pillow" else ours)()
        return {"corner": images[..., 0, 0]}

    return {"": step}


def bottleneck(images_per_second: tuple[float, float], preset: str, cores: int) -> str:
    """What of the two holds training up, in words. images_per_second: that a core loads, and that a step takes."""
    loaded, taken = images_per_second
    needed = taken / loaded
    if needed <= 1:
        verdict = "the model is the bottleneck: --workers 1 is enough, and on a CPU 0, which leaves it the cores"
    elif needed <= cores:
        verdict = f"the model is the bottleneck with --workers {int(np.ceil(needed))} or more (of {cores} cores)"
    else:
        verdict = f"the data are: they need {needed:.1f} cores of {cores}. Smaller files help, or --cache-images True"
    return f"One core loads {loaded:.0f} images/s; training {preset} takes {taken:.1f} images/s: {verdict}."


def measure_index(images: int, folder: Path, tell: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Time and memory of opening an annotation file of so many images, ``BOXES`` boxes each: (record, table as Markdown)."""
    tell(f"writing {images:,} images and {images * BOXES:,} boxes into {folder}")
    images_dir, annotations_file = _make_large(folder, images)
    record: dict[str, Any] = {"images": images, "boxes": images * BOXES, "bytes": annotations_file.stat().st_size}
    steps: dict[str, tuple[Callable[..., dict[str, float]], tuple[Any, ...]]] = {
        "pycocotools, every start": (_pycocotools, (annotations_file,)),
        "first start": (_opening, (images_dir, annotations_file)),
        "later start": (_opening, (images_dir, annotations_file)),
    }
    before = os.environ.get("SMCA_CACHE")
    os.environ["SMCA_CACHE"] = str(folder / "cache")
    try:
        for name, (measure, arguments) in steps.items():
            tell(name)
            record[name] = _apart(measure, *arguments)
        tell("workers")
        record["workers"] = _apart(_workers, images_dir, annotations_file)
    finally:
        if before is None:
            del os.environ["SMCA_CACHE"]
        else:
            os.environ["SMCA_CACHE"] = before
    lines = [
        f"### Annotation file of {images:,} images and {images * BOXES:,} boxes ({record['bytes'] / 1e6:,.0f} MB)",
        "",
        "| | seconds | peak memory, MiB | private memory then, MiB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {each['seconds']:.2f} | {each['peak_mib']:,.0f} | {each['private_mib']:,.0f} |"
        for name in steps
        for each in [record[name]]
    ]
    workers = record["workers"]
    lines += [
        "",
        f"Private memory of a process that loads images: {workers['private_mib']:.0f} MiB after {_TOUCHED:,} of them, "
        f"{workers['bare_mib']:.0f} MiB without data. In the table, memory is what goes beyond that of the imports. A first start "
        "reads the header of every image; pycocotools looks at none.",
    ]
    return record, "\n".join(lines)


def _make_large(folder: Path, images: int) -> tuple[Path, Path]:
    images_dir = folder / "images"
    source = folder / "0.jpg"
    for number in range(images):
        if number % _PER_FOLDER == 0:
            (images_dir / f"{number // _PER_FOLDER:04d}").mkdir(parents=True, exist_ok=True)
        if number % _PER_FILE == 0:  # a file has room for so many names
            source = folder / f"{number}.jpg"
            Image.new("RGB", (32, 24), (number % 256, 99, 99)).save(source)
        os.link(source, images_dir / _name(number))
    rng = np.random.default_rng(0)
    with (folder / "large.json").open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        for number in range(images):
            comma = ", " if number else ""
            file.write(f'{comma}{{"id": {number}, "file_name": "{_name(number)}", "height": 24, "width": 32}}')
        file.write('], "annotations": [')
        for number in range(images):
            corners, sides = rng.integers(0, 16, (BOXES, 2)), rng.random((BOXES, 2)) * 8 + 0.5
            file.write(", " if number else "")
            file.write(
                ", ".join(
                    f'{{"id": {number * BOXES + i + 1}, "image_id": {number}, "category_id": {i + 1}, '
                    f'"bbox": [{x}, {y}, {w:.2f}, {h:.2f}], "area": {w * h:.4f}, "iscrowd": 0}}'
                    for i, ((x, y), (w, h)) in enumerate(zip(corners.tolist(), sides.tolist(), strict=True))
                )
            )
        file.write(f'], "categories": {json.dumps([{"id": i + 1, "name": str(i)} for i in range(BOXES)])}}}')
    return images_dir, folder / "large.json"


def _name(number: int) -> str:
    return f"{number // _PER_FOLDER:04d}/{number:08d}.jpg"


def _apart(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def _opening(images_dir: Path, annotations_file: Path) -> dict[str, float]:
    return _measured(lambda: CocoDetection(images_dir, annotations_file))


def _pycocotools(annotations_file: Path) -> dict[str, float]:
    from pycocotools.coco import COCO  # type: ignore[import-untyped]

    return _measured(lambda: COCO(str(annotations_file)))


def _measured(work: Callable[[], Any]) -> dict[str, float]:
    before, private, start = peak_mib(), (memory_mib("RssAnon") or 0.0), time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    after = {
        "seconds": seconds,
        "peak_mib": peak_mib() - before,
        "private_mib": (memory_mib("RssAnon") or 0.0) - private,
    }
    del kept
    return after


def _workers(images_dir: Path, annotations_file: Path) -> dict[str, float]:
    """Private memory of a loader's process, with the data and without."""
    data = CocoDetection(images_dir, annotations_file)
    order = np.random.default_rng(0).permutation(len(data))[:_TOUCHED].tolist()
    found = {}
    for name, each in (("bare_mib", None), ("private_mib", data)):
        loader = Loader(_Touched(each, order), workers=1, collate_fn=list, batch_size=len(order))
        found[name] = max(value for batch in loader for value in batch)
    return found


class _Touched(torch.utils.data.Dataset[float]):
    """Reads images of `data`, if any, and gives what the process that does has for itself (``private_mib``)."""

    def __init__(self, data: CocoDetection | None, order: list[int]) -> None:
        self.data, self.order = data, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> float:
        if self.data is not None:
            sample: Sample = self.data[self.order[index]]
            assert len(sample.boxes_xyxy) == BOXES
        return private_mib() if index + 1 == len(self.order) else 0.0
