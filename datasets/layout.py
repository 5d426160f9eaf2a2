"""Finds the images and annotations of a split in the usual folder layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

Split = Literal["train", "val"]
_ROBOFLOW_FILE = "_annotations.coco.json"


def find_split(root: str | os.PathLike[str], split: Split) -> tuple[Path, Path]:
    """Return (images_dir, annotations_file) of `split` ("train" or "val") under `root`.

    Tries these layouts in order ("val" may also be named "valid"; YEAR is any four digits):

        annotations/train.json                 with  train/ or images/train/            (or images/ for both splits)
        annotations/instances_trainYEAR.json   with  trainYEAR/ or images/trainYEAR/    (COCO's own)
        train/_annotations.coco.json           with  the images beside it                (Roboflow's export)

    Raises FileNotFoundError, listing what was looked for and what the folder holds; ValueError for another split, or if
    the folder holds more than one year.
    """
    root = Path(root)
    if split not in ("train", "val"):
        raise ValueError(f"find_split: split must be 'train' or 'val', got {split!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"the data folder {root} does not exist")
    names = ("val", "valid") if split == "val" else (split,)

    candidates: list[tuple[Path, list[Path]]] = []
    for name in names:
        folders = [root / name, root / "images" / name, root / "images"]
        candidates.append((root / "annotations" / f"{name}.json", folders))
    by_year = sorted((root / "annotations").glob(f"instances_{split}[0-9][0-9][0-9][0-9].json"))
    for file in by_year:
        name = file.stem.removeprefix("instances_")
        candidates.append((file, [root / name, root / "images" / name]))
    for name in names:
        candidates.append((root / name / _ROBOFLOW_FILE, [root / name]))

    present = [(folders, file) for file, folders in candidates if file.is_file()]
    if not present:
        wanted = [str(file.relative_to(root)) for file, _ in candidates]
        wanted.append(f"annotations/instances_{split}YEAR.json")
        raise FileNotFoundError(
            f"no annotation file of the split {split!r} in {root}; looked for {', '.join(wanted)}; "
            f"found {_contents(root)}. Name a file like one of these, or use CocoDetection(images_dir, annotations_file)"
        )
    if len(by_year) > 1 and present[0][1] in by_year:
        raise ValueError(
            f"{root / 'annotations'} holds several years of the split {split!r}: {', '.join(f.name for f in by_year)}; "
            "keep one, or use CocoDetection(images_dir, annotations_file)"
        )
    folders, file = present[0]
    for folder in folders:
        if folder.is_dir():
            return folder, file
    raise FileNotFoundError(
        f"{file} exists, but no folder with its images; looked for "
        f"{', '.join(str(folder.relative_to(root)) + '/' for folder in folders)} in {root}; found {_contents(root)}. "
        "Move the images into one of these folders"
    )


def _contents(root: Path, limit: int = 20) -> str:
    """What lies in `root` and in its 'annotations', for an error message."""
    entries = [
        entry for folder in (root, root / "annotations") if folder.is_dir() for entry in sorted(folder.iterdir())
    ]
    names = [str(entry.relative_to(root)) + ("/" if entry.is_dir() else "") for entry in entries]
    return (", ".join(names[:limit]) + (", …" if len(names) > limit else "")) or "an empty folder"
