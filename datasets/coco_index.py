"""What `CocoDetection` knows of its images and boxes, as arrays: made once from the annotation file and the pictures' headers.

Of a large annotation file it is kept in a cache folder and mapped from there into memory: whatever the size of the data, a later
start takes no longer, and the processes that train and load images share one copy. It is made anew when the annotation file has
another content, or files were added to an image folder, removed from it or renamed in it. The folder is $SMCA_CACHE, or else smca
in the user's cache folder ($XDG_CACHE_HOME or ~/.cache); it may be removed at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from rich.console import Console
from rich.progress import Progress

from smca.datasets.batch import BoolArray, Category, FloatArray, IntArray, Report, UInt8Array, digest_of
from smca.datasets.boxes import CheckedBoxes
from smca.datasets.images import Frame
from smca.datasets.options import AnnotationOptions

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may both make an index
    fcntl = None  # type: ignore[assignment]

KEPT_FROM = 10_000_000
"""Bytes of an annotation file from which on its index is kept; a smaller file is read in less time than it would take to tell."""
_FORMAT = 1
"""Of the files in the cache: one of another format is not read."""
_MAPPED_FROM = 1 << 16
_SETTLED = 2.0
"""Seconds after which a file's time of change tells that it has not been changed again."""
_PLAIN = "index.json"
_DRAWN_EVERY = 0.1
"""Seconds, of the display of progress."""


class Texts(Sequence[str]):
    """Many texts in one array of bytes."""

    def __init__(self, content: UInt8Array, ends: IntArray) -> None:
        """content: all texts as UTF-8.  ends: [texts] where in it each ends."""
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """Those of a list."""
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return bytes(self.content[self.ends[place - 1] if place else 0 : self.ends[place]]).decode()


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """Images and annotations of a data set. A row is an annotation; rows stand in the file's order."""

    frame: Frame
    """What boxes refer to."""
    categories: tuple[Category, ...]
    """Sorted by id."""
    own_category_ids: Mapping[int, Any]
    """As the file writes them, by the id in `categories`."""
    report: Report
    digest: str
    """Of all that matters for training and evaluation: other data have another."""
    names: Texts
    """[images] files, relative to the image folder."""
    own_image_ids: Texts
    """[images] as the file writes them, in JSON; none if they are `image_ids`."""
    image_ids: IntArray
    """[images]"""
    sizes: IntArray
    """[images, 2] height and width in pixels that boxes are in."""
    picture_sizes: IntArray
    """[images, 2] height and width in pixels of the pictures."""
    positions: IntArray
    """[rows] index of the image."""
    file_xywh: FloatArray
    """[rows, 4] x, y, width, height in pixels, as written."""
    clipped_xyxy: FloatArray
    """[rows, 4] corners in pixels, cut at the image's border."""
    areas: FloatArray
    """[rows] pixels²; NaN where the file has none, or an impossible one."""
    labels: IntArray
    """[rows] index into `categories`."""
    crowd: BoolArray
    """[rows] whether it is a region of many objects."""
    degenerate: BoolArray
    """[rows] without area, or not finite."""
    outside: BoolArray
    """[rows] wholly outside the image."""
    clipped: BoolArray
    """[rows] reaching out of the image."""
    trained: BoolArray
    """[rows] whether it is trained on."""
    annotation_ids: IntArray
    """[rows]"""
    order: IntArray
    """[rows] the rows image by image, those of one image in the file's order."""
    starts: IntArray
    """[images + 1] where each image's rows begin in `order`."""
    kept_in: Path | None = None
    """The folder that the arrays are mapped from."""

    @property
    def checked(self) -> CheckedBoxes:
        """The boxes, and what is wrong with them."""
        return CheckedBoxes(self.file_xywh, self.clipped_xyxy, self.degenerate, self.outside, self.clipped)

    def rows_of(self, image: int) -> IntArray:
        """The rows of an image."""
        return self.order[self.starts[image] : self.starts[image + 1]]

    def own_image_id(self, image: int) -> Any:
        """An image's id as the file writes it."""
        return json.loads(self.own_image_ids[image]) if len(self.own_image_ids) else int(self.image_ids[image])

    def __reduce__(self) -> Any:
        """A process that is started anew, and not forked, maps the same files; they may be too large to be sent."""
        return super().__reduce__() if self.kept_in is None else (_mapped_again, (self.kept_in, self.digest))


_ARRAYS = [
    field.name for field in dataclasses.fields(CocoIndex) if field.type in ("IntArray", "FloatArray", "BoolArray")
]
_TEXTS = [field.name for field in dataclasses.fields(CocoIndex) if field.type == "Texts"]


def kept_index(
    annotations_file: Path,
    images_dir: Path,
    options: AnnotationOptions,
    make: Callable[[Callable[[str, float], None] | None], CocoIndex],
) -> CocoIndex:
    """The index of an annotation file and its images: from the cache if it still holds, otherwise from `make`.

    make: takes what it may tell of its progress, (what it does, the fraction done of that).
    """
    signature = _signature(annotations_file)
    if signature is None or signature[0] < KEPT_FROM:
        return make(None)
    key = digest_of([_FORMAT, annotations_file.resolve(), images_dir.resolve(), options])
    folder = cache_folder() / f"{annotations_file.stem}-{key[:16]}"
    with _one_process_at_a_time(folder):
        index = _kept(folder, annotations_file, images_dir)
        if index is not None:
            return index
        content = _content(annotations_file)
        with _told(annotations_file, signature[0]) as tell:
            index = make(tell)
        if _signature(annotations_file) != signature:
            return index  # written to just now: nobody knows what of it was read
        try:
            _keep(index, folder, {"signature": _settled(signature), "content": content}, images_dir)
        except OSError as error:
            report = dataclasses.replace(
                index.report,
                unkept=f"the index of {annotations_file} could not be kept in {folder.parent} ({error.strerror or error}), so that "
                "every process reads the file and has a copy: SMCA_CACHE=DIR names another folder",
            )
            return dataclasses.replace(index, report=report)
        return _kept(folder, annotations_file, images_dir) or index


def cache_folder() -> Path:
    """Where indexes are kept."""
    if own := os.environ.get("SMCA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smca"


def _signature(path: Path) -> list[int] | None:
    """What the file system tells of a file's content without reading it."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _settled(signature: list[int]) -> list[int] | None:
    """The signature, if a later change of the file would change it: within one tick of the file system's clock it would not."""
    return signature if time.time_ns() - signature[2] > _SETTLED * 1e9 else None


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _kept(folder: Path, annotations_file: Path, images_dir: Path) -> CocoIndex | None:
    """The index in `folder`, unless there is none, it is damaged, or the files are others now."""
    try:
        known = json.loads((folder / _PLAIN).read_bytes())
        if _times(images_dir, known["folders"]) != known["folders"]:
            return None
        signature = _signature(annotations_file)
        if signature is None or signature != known["signature"]:
            if _content(annotations_file) != known["content"]:
                return None
            _write_plain(folder, {**known, "signature": _settled(signature) if signature else None})
        return _mapped(folder, known["index"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _times(images_dir: Path, folders: Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    """When files in each folder were last added, removed or renamed."""
    return {name: (images_dir / name).stat().st_mtime_ns for name in folders}


def _keep(index: CocoIndex, folder: Path, known: Mapping[str, Any], images_dir: Path) -> None:
    """Write an index in place of what `folder` holds. Who has that mapped keeps it."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(partial / f"{name}.npy", getattr(index, name))
        for name in _TEXTS:
            texts: Texts = getattr(index, name)
            np.save(partial / f"{name}.npy", texts.content)
            np.save(partial / f"{name}_ends.npy", texts.ends)
        plain = {
            "frame": index.frame,
            "categories": [[category.id, category.name] for category in index.categories],
            "own_category_ids": list(index.own_category_ids.items()),
            "report": dataclasses.asdict(index.report),
            "digest": index.digest,
        }
        folders = _times(images_dir, sorted({name.rpartition("/")[0] for name in index.names}))
        _write_plain(partial, {**known, "folders": folders, "index": plain})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_plain(folder: Path, content: Mapping[str, Any]) -> None:
    partial = folder / f"{_PLAIN}.partial"
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(folder / _PLAIN)


def _mapped(folder: Path, plain: Mapping[str, Any]) -> CocoIndex:
    texts: dict[str, Any] = {name: Texts(_array(folder, name), _array(folder, f"{name}_ends")) for name in _TEXTS}
    arrays: dict[str, Any] = {name: _array(folder, name) for name in _ARRAYS}
    report: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in plain["report"].items()
    }
    return CocoIndex(
        frame=plain["frame"],
        categories=tuple(Category(number, name) for number, name in plain["categories"]),
        own_category_ids=dict(plain["own_category_ids"]),
        report=Report(**report),
        digest=plain["digest"],
        **texts,
        **arrays,
        kept_in=folder,
    )


def _array(folder: Path, name: str) -> Any:
    path = folder / f"{name}.npy"
    if path.stat().st_size < _MAPPED_FROM:
        return np.load(path, allow_pickle=False)
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _mapped_again(folder: Path, digest: str) -> CocoIndex:
    """What another process has mapped."""
    plain = json.loads((folder / _PLAIN).read_bytes())["index"]
    if plain["digest"] != digest:
        raise ValueError(f"the index in {folder} was made anew, of other data, while it was in use: start again")
    return _mapped(folder, plain)


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """The others wait, and then find what the first has made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock").open("w")
    except OSError:  # nor can anything be kept there
        yield
        return
    with lock:
        if fcntl is not None:
            with suppress(OSError):  # of a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _told(path: Path, size: int) -> Iterator[Callable[[str, float], None]]:
    """Tells the user what takes so long.

    The display has no thread of its own that would draw it: the processes that read the pictures' headers are forked meanwhile
    (datasets/frame.py), and a lock that another thread held at that moment would stay locked in them.
    """
    print(
        f"reading {path} ({size / 1e6:,.0f} MB) and its images, once: later starts find an index of it", file=sys.stderr
    )
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        tasks: dict[str, Any] = {}
        drawn = 0.0

        def tell(what: str, fraction: float) -> None:
            nonlocal drawn
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=fraction)
            if time.monotonic() >= drawn + _DRAWN_EVERY:
                progress.refresh()
                drawn = time.monotonic()

        yield tell
