"""Look at data before training: what is in them, what is wrong with them, and whether a preset's settings suffice.

    smca check-data DIR                                      with the settings of `smca train small`
    smca check-data DIR --preset smca_r50                    with those of another preset
    smca check-data DIR --model.num-queries 90               whether others would do
    smca check-data --train-json FILE --train-images DIR     files named one by one, as for `smca train`
    smca check-data DIR --quick                              the annotations alone: no picture is read

Prints a summary, and writes into --output: overview.png, histograms and the first training images as the network sees them, with
their boxes; findings.json, everything that was found, each with file and id. The exit status is 1 if something would end training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO

import tyro
from rich.progress import track

from smca.datasets import (
    AnnotationOptions,
    Augmentation,
    Augmented,
    CocoDetection,
    DetectionDataset,
    Sample,
    require_same_categories,
)
from smca.datasets.contents import Look, Pictures, find_in_pictures, look_at_pictures
from smca.datasets.findings import Entry, Finding, find_between, find_in_split
from smca.datasets.layout import Split, find_annotations
from smca.datasets.table import table_of
from smca.gpu.config import ModelConfig, SyntheticConfig
from smca.gpu.evaluation import open_split
from smca.gpu.evaluation.describe import class_table, settings_in_words, sizes_in_words
from smca.gpu.evaluation.fit import find_in_settings
from smca.gpu.files import write_atomically
from smca.gpu.pictures.data import draw_data
from smca.gpu.presets import PRESETS
from smca.gpu.training.order import GlobalBatches

OVERVIEW_FILE = "overview.png"
FINDINGS_FILE = "findings.json"
_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SHOWN = 3
_PICTURES = 16
_LEVELS = {"error": "training would end", "warning": "costs accuracy", "note": "worth a look"}


@dataclass(frozen=True)
class CheckDataArgs:
    """Look at data before training: what is in them, what is wrong, and whether the settings suffice."""

    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = None
    """Folder with data in COCO format (docs/data.md lists the layouts), or "synthetic" for the built-in data."""
    preset: str = "small"
    """Of `smca train`: whose queries, strides, image sizes and augmentation the data are held against."""
    train_json: Path | None = None
    """Annotation file of the training images, wherever it lies; the one that is found in `data` otherwise."""
    train_images: Path | None = None
    """Folder with the training images."""
    val_json: Path | None = None
    """Annotation file of the held-out images, likewise."""
    val_images: Path | None = None
    """Folder with the held-out images."""
    annotations: AnnotationOptions = AnnotationOptions()
    """How to understand annotation files where they leave room."""
    output: Path = Path("runs/check-data")
    """Folder that receives overview.png and findings.json."""
    quick: bool = False
    """Leave out what takes long: decoding every picture, and looking for copies among them."""
    batch_size: int = 8
    """Images per step: which come first depends on it."""
    seed: int = 0
    """Of the order of the images and of their augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    augmentation: Augmentation = Augmentation()
    """Changes to the training images."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The built-in data."""


def parse(argv: list[str] | None) -> CheckDataArgs:
    """Command line → arguments, with the preset's settings where it names none.

    Raises:
        ValueError: a preset that does not exist.
    """
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--preset", default="small")
    name = finder.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    run = PRESETS[name]()
    default = CheckDataArgs(
        preset=name,
        batch_size=16 if run.batch_size == "auto" else run.batch_size,
        seed=run.seed,
        model=run.model,
        augmentation=run.augmentation,
        synthetic=run.synthetic,
    )
    return tyro.cli(CheckDataArgs, args=argv, prog="smca check-data", default=default)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca check-data``."""
    args = parse(argv)
    splits, found = open_splits(args)
    categories = splits["train"].categories
    tables = {name: table_of(data) for name, data in splits.items()}
    for name, data in splits.items():
        print(f"{name:5}  {data.report}\n       {sizes_in_words(tables[name])}")
    print(f"\n{class_table(tables, categories, args.model)}\n")
    print(f"{settings_in_words(tables['train'], args.preset, args.model)}\n", flush=True)

    found += find_between(tables, categories)
    for name, table in tables.items():
        found += find_in_split(name, table, categories)
    if not args.quick:
        found += find_in_pictures(tables, _look_at(splits))
    found += find_in_settings(tables["train"], categories, args.model, args.augmentation)
    samples, faults = _first_samples(splits["train"], args)
    if args.quick:  # otherwise they have been found
        found += faults

    _print_findings(found, quick=args.quick)
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / FINDINGS_FILE, lambda file: _write_findings(found, file))
    if samples:
        draw_data(tables, categories, args.model, samples, args.output / OVERVIEW_FILE)
    print(f"\n→ {args.output}/ ({OVERVIEW_FILE + ', ' if samples else ''}{FINDINGS_FILE})")
    if any(each.level == "error" for each in found):
        raise SystemExit(1)


def open_splits(args: CheckDataArgs) -> tuple[dict[str, DetectionDataset], list[Finding]]:
    """The splits that there are, and what is wrong between them.

    Raises:
        FileNotFoundError: no training images.
        ValueError: a split that cannot be read.
    """
    files = {"train": (args.train_json, args.train_images), "val": (args.val_json, args.val_images)}
    splits: dict[str, DetectionDataset] = {}
    found: list[Finding] = []
    for name in _SPLITS:
        json_file, images_dir = files.get(name, (None, None))
        if name != "train" and json_file is None and (missing := _missing(args.data, name)):
            if name == "val":
                found.append(Finding("no-held-out-images", "error", name, missing))
            continue
        data = open_split(args.data, name, args.synthetic, args.annotations, json_file=json_file, images_dir=images_dir)
        try:
            require_same_categories(splits.get("train", data).categories, data.categories)
        except ValueError as error:
            found.append(Finding("other-categories", "error" if name == "val" else "warning", name, str(error)))
            continue
        splits[name] = data
    return splits, found


def _missing(data: str | None, split: Split) -> str:
    """Why there is no such split; empty if there is."""
    if data is None:
        return "no held-out images are named: --val-json FILE --val-images DIR"
    if data != "synthetic":
        try:
            find_annotations(data, split)
        except FileNotFoundError as error:
            return str(error)
    return ""


def _look_at(splits: Mapping[str, DetectionDataset]) -> dict[str, Pictures]:
    """Every picture of the splits that have files."""
    looks = {}
    for name, data in splits.items():
        if isinstance(data, CocoDetection):

            def shown(pictures: Iterator[Look], name: str = name, total: int = len(data)) -> Iterable[Look]:
                return track(pictures, f"reading {name}", total, disable=not sys.stdout.isatty(), transient=True)

            looks[name] = look_at_pictures(data.images_dir, data.file_names, shown)
    return looks


def _first_samples(data: DetectionDataset, args: CheckDataArgs) -> tuple[list[Sample], list[Finding]]:
    """The first images of the first epoch, as training augments them, without those that cannot be read."""
    augmented = Augmented(data, args.augmentation, args.seed)
    batches = GlobalBatches(len(augmented), args.batch_size, seed=args.seed)
    samples: list[Sample] = []
    faults: list[Finding] = []
    for index in dict.fromkeys(itertools.islice(itertools.chain.from_iterable(batches), _PICTURES)):
        try:
            samples.append(augmented[index])
        except (ValueError, OSError) as error:
            faults.append(Finding("undecodable-images", "error", "train", str(error)))
    return samples, faults


def _print_findings(found: Sequence[Finding], *, quick: bool) -> None:
    for level in _LEVELS:
        for finding in (each for each in found if each.level == level):
            print(f"{level:8} {finding.split}: {finding.text}")
            entries = list(itertools.islice(finding.entries(), _SHOWN + 1))
            for entry in entries[:_SHOWN]:
                print(f"           {_told(entry)}")
            if len(entries) > _SHOWN:
                print(f"           … all of them are in {FINDINGS_FILE}")
    counts = {level: sum(each.level == level for each in found) for level in _LEVELS}
    told = [f"{n} {level}{'s' * (n > 1)} ({_LEVELS[level]})" for level, n in counts.items() if n]
    print(("\n" + ", ".join(told) if told else "nothing found") + (", without a look at the pictures" if quick else ""))


def _told(entry: Entry) -> str:
    """An entry on one line."""
    place = f"{entry.get('file') or 'image'} (id {entry['image_id']})" if "image_id" in entry else ""
    if "classes" in entry:
        entry = {**entry, "classes": " and ".join(dict.fromkeys(entry["classes"]))}
    words = {
        "annotation_id": ", annotation {}",
        "other_annotation_id": " and {}",
        "classes": ", {}",
        "iou": ", IoU {}",
        "bbox": ", bbox {}",
        "objects": ", {} objects",
        "side_px": ", {} pixels across",
        "other_file": ", as {}",
        "other_image_id": " (id {})",
        "class": "{}",
        "why": ": {}",
    }
    return place + "".join(said.format(entry[key]) for key, said in words.items() if key in entry)


def _write_findings(found: Sequence[Finding], file: BinaryIO) -> None:
    """A JSON list of all findings with all entries, written entry by entry: there may be millions."""
    for number, finding in enumerate(found):
        head = {"kind": finding.kind, "level": finding.level, "split": finding.split, "text": finding.text}
        file.write((",\n" if number else "[").encode() + json.dumps(head)[:-1].encode() + b', "entries": [')
        for row, entry in enumerate(finding.entries()):
            file.write((",\n  " if row else "\n  ").encode() + json.dumps(entry).encode())
        file.write(b"]}")
    file.write(b"]\n" if found else b"[]\n")


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
