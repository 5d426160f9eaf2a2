"""Finds the images and annotations of a split in the folder layouts that tools write."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from smca.datasets.file_names import ImageFolder
from smca.datasets.json_stream import entries_of

Split = Literal["train", "val", "test"]

_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""What a split may be called, in any case."""
_WHOLE = ("default", "result", "results", "labels", "annotations", "dataset", "_annotations.coco", "instances", "coco")
"""Annotation files of exports that are not split."""
_PREFIXES = ("", "instances_", "person_keypoints_")
_BESIDE = ("_annotations.coco.json", "labels.json", "annotations.json", "dataset.json", "_annotations.json")
"""Annotation files in a split's own folder: Roboflow, FiftyOne, labelme2coco."""
_IMAGE_FOLDERS = ("images", "data", "JPEGImages")
"""Where images lie beside such a file, if not in the folder itself."""
_EXAMPLES = (
    "annotations/{0}.json",
    "annotations/instances_{0}.json (and …{0}2017.json)",
    "{0}/_annotations.coco.json",
    "{0}/labels.json",
    "{0}/annotations.json",
)


def find_split(root: str | os.PathLike[str], split: Split) -> tuple[Path, Path]:
    """Return (images_dir, annotations_file) of `split` ("train", "val" or "test") under `root`.

    These layouts are tried in this order. NAME is train (or training), val (valid, validation), test (testing), in any case; YEAR
    is any four digits; annotation files may also lie in `root` itself.

        annotations/NAME.json, annotations/instances_NAME.json, annotations/person_keypoints_NAME.json, also with YEAR
            with NAME/, images/NAME/ (NAME with the year, if there is one), or images/ for all splits:
            COCO's own, Datumaro, CVAT
        NAME/_annotations.coco.json, NAME/labels.json, NAME/annotations.json
            with images/, data/ or JPEGImages/ beside the file, or the images themselves: Roboflow, FiftyOne, labelme2coco
        an export without splits serves as "train": result.json with images/ (Label Studio), labels.json with data/,
            annotations/instances_default.json with images/ or images/default/ (CVAT), annotations.json with JPEGImages/

    Raises FileNotFoundError, listing what was looked for and what the folder holds; ValueError for another split, or if
    several files could be meant.
    """
    root = Path(root)
    file, folders = _layout(root, split)
    present = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    if not present:
        raise FileNotFoundError(
            f"{file} exists, but no folder with its images; looked for "
            f"{', '.join(str(folder.relative_to(root)) + '/' for folder in dict.fromkeys(folders))} in {root}; found "
            f"{_contents(root)}. Move the images into one of these folders, or name theirs: {_flags(split)}"
        )
    return (present[0] if len(present) == 1 else _folder_with_images(present, file)), file


def find_annotations(root: str | os.PathLike[str], split: Split) -> Path:
    """The annotation file that `find_split` would find, wherever its images are."""
    return _layout(Path(root), split)[0]


def folder_of_images(file: Path) -> Path:
    """The folder with the images of an annotation file that lies anywhere: one of its name, or images/, beside it or one folder up;
    otherwise its own folder."""
    name = file.stem.removeprefix("instances_")
    near = [each for parent in (file.parent, file.parent.parent) for each in _folders(parent, [name, *_IMAGE_FOLDERS])]
    near += [file.parent.parent / "images" / name, file.parent]
    present = [folder for folder in near if folder.is_dir()]
    return _folder_with_images(present, file) if present else file.parent


def _flags(split: Split) -> str:
    name = f"--{split}-json FILE --{split}-images DIR" if split != "test" else "--json FILE --images DIR"
    return name + (" (smca evaluate: --json FILE --images DIR)" if split == "val" else "")


Layout = tuple[Path, list[Path]]
"""An annotation file, and the folders in which its images may be, the likeliest first."""


def _layout(root: Path, split: Split) -> Layout:
    """The one layout of a split that is there."""
    if split not in _NAMES:
        raise ValueError(f"find_split: split must be one of {', '.join(map(repr, _NAMES))}, got {split!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"the data folder {root} does not exist")
    layouts = _named(root, split) or _beside(root, split)
    if not layouts and split == "train":
        layouts = _unsplit(root)
    if not layouts:
        looked = ", ".join(example.format(_NAMES[split][0]) for example in _EXAMPLES)
        # For the training split these have been looked for already.
        whole = [file.relative_to(root) for file, _ in _unsplit(root)]
        unsplit = (
            f" {whole[0]} is not split: divide it into two files, and name them with --train-json and --val-json."
            if whole
            else ""
        )
        raise FileNotFoundError(
            f"no annotation file of the split {split!r} in {root}; looked for {looked}; found {_contents(root)}.{unsplit} "
            f"Name a file like one of these, or say where files and images are: {_flags(split)}"
        )
    if len(layouts) > 1:
        raise ValueError(
            f"{root} holds several annotation files of the split {split!r}: "
            f"{', '.join(str(file.relative_to(root)) for file, _ in layouts)}; keep one, or name it: {_flags(split)}"
        )
    return layouts[0]


def _named(root: Path, split: Split) -> list[Layout]:
    """Files whose own name is the split's."""
    pattern = re.compile(rf"({'|'.join(_NAMES[split])})(\d{{4}})?", re.IGNORECASE)
    for prefix in _PREFIXES:
        found = []
        for file in _files(root):
            match = pattern.fullmatch(file.stem.removeprefix(prefix)) if file.stem.startswith(prefix) else None
            if match:
                names = [match[0]] if match[2] else [match[0], *_NAMES[split]]
                found.append((file, [*_folders(root, names), *_folders(root / "images", names), root / "images"]))
        if found:
            # "train.json" beside "train2017.json" is another file of the same split: neither is the obvious one.
            return found
    return []


def _beside(root: Path, split: Split) -> list[Layout]:
    """Files in a folder of the split's name."""
    for folder in _folders(root, _NAMES[split]):
        for name in _BESIDE:
            if (folder / name).is_file():
                return [(folder / name, [*_folders(folder, _IMAGE_FOLDERS), folder])]
    return []


def _unsplit(root: Path) -> list[Layout]:
    """The file of an export that has no splits."""
    for file in _files(root):
        name = file.stem.removeprefix("instances_")
        if name.lower() in _WHOLE:
            inside = _folders(root, _IMAGE_FOLDERS)
            return [(file, [*(each for folder in inside for each in _folders(folder, [name])), *inside, root])]
    return []


def _files(root: Path) -> list[Path]:
    """The JSON files in root/annotations/ and in `root`."""
    folders = [*_folders(root, ["annotations"]), root]
    return [
        file
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix.lower() == ".json"
    ]


def _folders(parent: Path, names: list[str] | tuple[str, ...]) -> list[Path]:
    """Folders in `parent` of one of these names, in any case, in the order of the names; as named first if there is none."""
    entries = [entry for entry in sorted(parent.iterdir()) if entry.is_dir()] if parent.is_dir() else []
    found = [entry for name in names for entry in entries if entry.name.lower() == name.lower()]
    return found or [parent / names[0]]


def _folder_with_images(folders: list[Path], file: Path) -> Path:
    """The first folder that holds the first image of the annotation file; the first of all if none does."""
    try:
        _, _, first = next(iter(entries_of(file, ["images"])))
    except (OSError, ValueError, StopIteration):  # whatever is wrong with the file, it is reported when it is opened
        return folders[0]
    name = str(first.get("file_name"))
    return next((folder for folder in folders if ImageFolder(folder).find(name)), folders[0])


def _contents(root: Path, limit: int = 20) -> str:
    """What lies in `root` and in its 'annotations', for an error message."""
    entries = [
        entry for folder in (root, root / "annotations") if folder.is_dir() for entry in sorted(folder.iterdir())
    ]
    names = [str(entry.relative_to(root)) + ("/" if entry.is_dir() else "") for entry in entries]
    return (", ".join(names[:limit]) + (", …" if len(names) > limit else "")) or "an empty folder"
