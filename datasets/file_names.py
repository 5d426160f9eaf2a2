"""Where the files are that an annotation file names: below its image folder, under the name that exporters made of theirs.

A name is tried as it is; with the separators of Windows, the escapes of URLs and either form of Unicode undone; and then without
its leading folders, one by one, as an absolute path of another machine or a URL needs it. A name never leads out of the image
folder.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from smca.datasets.settings import shortened

_NAMES_SHOWN = 5


class ImageFolder:
    """Files below a folder, by one listing per folder rather than one system call per file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[str, dict[str, bool]] = {}

    def holds(self, name: str) -> bool:
        """Whether there is a file of this relative name with "/" as separator."""
        folder, _, file = name.rpartition("/")
        return file in self._listing(folder)

    def is_link(self, name: str) -> bool:
        """Whether that file is a symbolic link."""
        folder, _, file = name.rpartition("/")
        return self._listing(folder).get(file, False)

    def find(self, written: str) -> str | None:
        """The file's relative name for what an annotation file has, or None."""
        return next((name for name in _candidates(written, self.root) if self.holds(name)), None)

    def alike(self, written: str) -> list[str]:
        """Files whose name differs in upper and lower case only."""
        folder, _, file = written.rpartition("/")
        return [name for name in self._listing(folder) if name.lower() == file.lower()]

    def _listing(self, folder: str) -> dict[str, bool]:
        if folder not in self._listings:
            try:
                with os.scandir(self.root / folder) as entries:
                    self._listings[folder] = {entry.name: entry.is_symlink() for entry in entries}
            except (OSError, ValueError):  # no such folder, or a name that no folder can have
                self._listings[folder] = {}
        return self._listings[folder]


def find_images(images_dir: Path, written: Sequence[str], annotations_file: Path) -> tuple[list[str], int, int]:
    """The names below `images_dir` of the files that an annotation file has.

    Returns names, how many differ from what is written, how many are symbolic links.

    Raises:
        FileNotFoundError: the folder or files are missing.
        ValueError: two entries of different names lead to one file.
    """
    if not images_dir.is_dir():
        raise FileNotFoundError(
            f"the image folder {images_dir} does not exist; {annotations_file} expects {len(written):,} images "
            f"there, such as {shortened(written[0])!r}; check the path"
        )
    folder = ImageFolder(images_dir)
    found = [folder.find(name) for name in written]
    missing = [name for name, file in zip(written, found, strict=True) if file is None]
    if missing:
        listed = ", ".join(shortened(name) for name in missing[:_NAMES_SHOWN]) + ", …" * (len(missing) > _NAMES_SHOWN)
        alike = folder.alike(missing[0])
        remedy = (
            f"the folder has {alike[0]!r}: correct 'file_name'"
            if alike
            else "copy them there, name the folder that has them (--train-images, --val-images; smca evaluate: --images), or "
            "remove their entries"
        )
        raise FileNotFoundError(
            f"{len(missing):,} of {len(written):,} images of {annotations_file} are missing in {images_dir}: {listed}; {remedy}"
        )
    names = [name for name in found if name is not None]
    first_written: dict[str, str] = {}
    for name, wrote in zip(names, written, strict=True):
        if first_written.setdefault(name, wrote) != wrote:
            raise ValueError(
                f"{annotations_file}: the images {shortened(first_written[name])!r} and {shortened(wrote)!r} would both be read "
                f"from {images_dir / name}: keep the folders that tell them apart, or remove one entry"
            )
    corrected = sum(name != wrote for name, wrote in zip(names, written, strict=True))
    return names, corrected, sum(folder.is_link(name) for name in names)


def _candidates(written: str, root: Path) -> Iterator[str]:
    """Relative names that `written` may stand for, the likeliest first; none is absolute or has "..", "." or empty parts."""
    for form in dict.fromkeys(_forms(written)):
        below = form.removeprefix(root.as_posix() + "/")
        parts = re.split("/+", below)
        outside = max((i + 1 for i, part in enumerate(parts) if part == ".."), default=0)
        parts = [part for part in parts[outside:] if part not in ("", ".")]
        for start in range(len(parts)):
            yield "/".join(parts[start:])


def _forms(written: str) -> Iterator[str]:
    yield written
    slashed = written.replace("\\", "/")
    for form in (slashed, unquote(slashed)):
        yield form
        for normal in ("NFC", "NFD"):  # a Mac writes é as two characters
            yield unicodedata.normalize(normal, form)
    address = re.sub(r"^[a-zA-Z]:/|^[a-z]+://[^/]*/", "", slashed)  # a drive, or a server
    path, _, query = address.partition("?")
    for form in (query.removeprefix("d="), path):  # Label Studio's /data/local-files/?d=folder/photo.jpg
        if form:
            yield unquote(form)
