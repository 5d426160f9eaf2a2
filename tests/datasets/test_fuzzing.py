"""Annotation files and pictures, damaged in every way that Hypothesis finds: each is a data set in which no valid box is lost
without being counted, or an error that names the file. Never another exception, never long.

SMCA_FUZZ_CASES says how many are tried: some in every test run, always the same; 5,000 new ones every night; as many as one likes.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import coco_folder
from smca.datasets import AnnotationOptions, CocoDetection

HEIGHT, WIDTH = coco_folder.HEIGHT, coco_folder.WIDTH
Data = dict[str, Any]

CASES = int(os.environ.get("SMCA_FUZZ_CASES", "150"))
"""Two thirds of them are annotation files."""
MOST_SECONDS = 5.0
"""Of processor time for a file; usual are milliseconds."""
LONGEST_MESSAGE = 900
NAME_LENGTH = 60
"""Characters by which classes are compared: a number of 400 digits in place of a name is cut."""


def fuzz(cases: int) -> Any:
    return settings(
        max_examples=cases,
        derandomize="SMCA_FUZZ_CASES" not in os.environ,
        deadline=None,  # wall time says little on a busy machine; `limited` measures the processor's
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def limited() -> Iterator[None]:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF data
        yield
    assert time.process_time() - start < MOST_SECONDS


# Annotation files: valid ones, as exporters write them


def _texts(data: Data) -> None:
    """Ids, sizes and boxes as text."""
    for table, keys in (
        ("images", ["id", "width"]),
        ("categories", ["id"]),
        ("annotations", ["image_id", "category_id"]),
    ):
        for entry in data[table]:
            entry.update({key: str(entry[key]) for key in keys})
    for number, entry in enumerate(data["annotations"]):
        entry["bbox"] = str(entry["bbox"]) if number % 2 else [str(value) for value in entry["bbox"]]


def _outlines(data: Data) -> None:
    """Outlines and no boxes; no ids; no sizes."""
    for entry in data["annotations"]:
        x, y, w, h = entry.pop("bbox")
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y + h, x + w, y + h, x, y]]
        del entry["id"]
    for entry in data["images"]:
        del entry["width"], entry["height"]


def _masks(data: Data) -> None:
    """Run lengths in place of one box."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    mask[2:22, 1:11] = 1
    flat = mask.flatten(order="F")
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - flat[0]], flat, [1 - flat[-1]]])))).tolist()
    entry = data["annotations"][0]
    entry["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, *runs] if flat[0] else runs}
    entry["bbox"] = []


def _identities(data: Data) -> None:
    """Ids of other kinds; names of Windows and of another machine."""
    for entry in data["images"]:
        entry["id"] = f"uuid-{entry['id']}"
    for entry in data["annotations"]:
        entry.update(
            image_id=f"uuid-{entry['image_id']}", category_id=float(entry["category_id"]), id=2**70 + entry["id"]
        )
    data["images"][0]["file_name"] = "C:\\work\\images\\b.png"
    data["images"][2]["file_name"] = "/home/somebody/sub/c.png"


def _edges(data: Data) -> None:
    """Boxes without area, beyond the border, around it, and not finite."""
    odd = [[5, 5, 0, 9], [-9, -9, 4, 4], [55, 35, 90, 90], [0, 0, 60, 40], [1e30, 2, 3, 4], [3, 3, 1e-5, 1e-5]]
    odd += [[math.nan, 1, 2, 3], [1, 1, math.inf, 2], [-5, -5, 70, 50]]
    data["annotations"] += [{"id": 100 + i, "image_id": 12, "category_id": 7, "bbox": box} for i, box in enumerate(odd)]


EXPORTERS: list[Callable[[Data], Any]] = [lambda data: None, _texts, _outlines, _masks, _identities, _edges]


# Damage

ODD = [
    None,
    True,
    False,
    -1,
    0,
    7,
    70,
    1.5,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    10**400,
    2**63,
    5e-324,
    "",
    "x" * 3000,
    "nan",
]
ODD += [
    "1e400",
    "-0",
    "0x10",
    "１２",
    " 9 ",
    "\ud800",
    "\0",
    "../a.png",
    [],
    {},
    [[[]]],
    {"a": 1},
    [1] * 500,
    [[1, 2], [3]],
]
values = st.one_of(st.sampled_from(ODD), st.floats(), st.integers(-100, 100), st.integers(), st.text(max_size=5))
places = st.lists(st.integers(0, 30), min_size=1, max_size=5)
edits = st.tuples(
    st.sampled_from(["replace", "remove", "double", "exchange", "rename", "wrap"]), places, places, values
)
cuts = st.tuples(
    st.sampled_from(["truncate", "flip", "insert", "remove", "double"]),
    st.floats(0, 1),
    st.integers(1, 40),
    st.binary(min_size=1, max_size=6),
)


def _slots(data: Any, place: list[int]) -> tuple[Any, Any]:
    """A container somewhere inside and one of its keys; (None, None) if there is none."""
    container, key = None, None
    for number in place:
        if not isinstance(data, dict | list) or not data:
            break
        container, key = data, (list(data)[number % len(data)] if isinstance(data, dict) else number % len(data))
        data = container[key]
    return container, key


def edited(data: Data, edit: tuple[str, list[int], list[int], Any]) -> None:
    kind, place, other, value = edit
    container, key = _slots(data, place)
    if container is None:
        return
    if kind == "replace":
        container[key] = copy.deepcopy(value)  # which the next edit may change
    elif kind == "remove":
        del container[key]
    elif kind == "double" and isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
    elif kind == "exchange":
        source, name = _slots(data, other)
        container[key] = copy.deepcopy(source[name])
    elif kind == "rename" and isinstance(container, dict):
        container[str(value)] = container.pop(key)
    else:
        container[key] = [container[key]]


def damaged(content: bytes, cut: tuple[str, float, int, bytes]) -> bytes:
    kind, share, length, new = cut
    at = int(share * len(content))
    if kind == "truncate":
        return content[:at]
    if kind == "flip":
        return content[:at] + new + content[at + len(new) :]
    if kind == "insert":
        return content[:at] + new + content[at:]
    if kind == "remove":
        return content[:at] + content[at + length :]
    return content[:at] + content[at : at + length] + content[at:]


OPTIONS = [AnnotationOptions(), AnnotationOptions(box_format="xywh", crowd="regions", sizes="ignored", frame="upright")]


# A reader that is as simple as it can be


class Expected(NamedTuple):
    """Of a file that is read."""

    annotations: int
    """In all."""
    sure: list[tuple[int, str, tuple[float, ...]]]
    """Image, name of the class and corners of those that are to be trained on for sure."""
    unsure: int
    """Those that another reader may judge otherwise: masks, and sides at the edge of what float32 can hold."""


def read(content: bytes) -> Expected:
    data = json.loads(content)
    images = {_identity(entry["id"]): number for number, entry in enumerate(data["images"])}
    names = {_identity(entry["id"]): str(entry["name"])[:NAME_LENGTH] for entry in data["categories"]}
    sure, unsure = [], 0
    for entry in data["annotations"]:
        corners = _corners(entry)
        if corners is None:
            unsure += 1
        elif corners and float(entry.get("iscrowd") or 0) == 0:
            sure.append((images[_identity(entry["image_id"])], names[_identity(entry["category_id"])], corners))
    return Expected(len(data["annotations"]), sure, unsure)


def _identity(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,40}(\.0+)?\s*", value):
        return int(value.strip().partition(".")[0])
    return value  # 12.0 is 12 as a key


def _corners(entry: Data) -> tuple[float, ...] | None:
    """Of the part within the picture; () = nothing of it is, None = not sure."""
    box = entry.get("bbox")
    if not box:
        outline = entry.get("segmentation")
        if not isinstance(outline, list):
            return None
        flat = _flat(outline)
        x0, y0, x1, y1 = min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])
        x, y, w, h = x0, y0, x1 - x0, y1 - y0
    else:
        if isinstance(box, str):
            box = re.findall(r"[^\s,;\[\]()]+", box)
        try:
            x, y, w, h = (float(value) for value in box)
        except OverflowError:
            return ()
    if not all(math.isfinite(v) for v in (x, y, w, h, x + w, y + h)) or w <= 0 or h <= 0:
        return ()
    left = min(x + w, WIDTH) - max(x, 0), min(y + h, HEIGHT) - max(y, 0)
    if min(left) <= 0:
        return ()
    if min(w / WIDTH, h / HEIGHT, left[0] / WIDTH, left[1] / HEIGHT) < 1e-6:
        return None
    return max(x, 0), max(y, 0), min(x + w, WIDTH), min(y + h, HEIGHT)


def _flat(outline: Any) -> list[float]:
    return [v for part in outline for v in _flat(part)] if isinstance(outline, list) else [float(outline)]


def require_nothing_lost(dataset: CocoDetection, expected: Expected) -> None:
    report = dataset.report
    counted = report.boxes + report.crowds + report.degenerate + report.outside
    assert counted == expected.annotations, f"{report}, of {expected.annotations} annotations"
    served = []
    for index in range(len(dataset)):
        sample = dataset[index]
        for box, label in zip(sample.boxes_xyxy.tolist(), sample.labels.tolist(), strict=True):
            served.append((index, dataset.categories[label].name[:NAME_LENGTH], tuple(box)))
    assert len(served) == report.boxes
    for image, name, corners in expected.sure:
        same = [s for s in served if s[:2] == (image, name) and np.allclose(s[2], corners, rtol=0, atol=1e-6)]
        assert same, f"{corners} of class {name!r} in image {image} is not served: {served}"
        served.remove(same[0])
    assert len(served) <= expected.unsure, f"nobody wrote {served}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and the place of an annotation file."""
    images, annotations = coco_folder.write(tmp_path_factory.mktemp("fuzzing"), coco_folder.content())
    return images, annotations


@fuzz(CASES * 2 // 3)
@given(
    st.sampled_from(EXPORTERS),
    st.lists(edits, max_size=3),
    st.lists(cuts, max_size=1),
    st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(OPTIONS),
)
def test_annotation_files(
    folder: tuple[Path, Path],
    exporter: Callable[[Data], Any],
    changes: list[Any],
    damage: list[Any],
    encoding: str,
    options: AnnotationOptions,
) -> None:
    data = coco_folder.content()
    exporter(data)
    for change in changes:
        edited(data, change)
    images, annotations = folder
    content = json.dumps(data).encode(encoding)
    for cut in damage:
        content = damaged(content, cut)
    annotations.write_bytes(content)
    with limited():
        try:
            dataset = CocoDetection(images, annotations, options=options)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert annotations.name in message, message
            assert len(message) < LONGEST_MESSAGE, message
            assert changes or damage, message
            return
        require_nothing_lost(dataset, read(content))
        json.dumps(dataset.ground_truth(), allow_nan=False)


def test_the_simple_reader_misses_what_is_lost(folder: tuple[Path, Path]) -> None:
    """A box that is read and not served, and one that is served and was not written, are seen."""
    content = json.dumps(coco_folder.content()).encode()
    folder[1].write_bytes(content)
    dataset, expected = CocoDetection(*folder), read(content)
    require_nothing_lost(dataset, expected)
    with pytest.raises(AssertionError, match="of 5 annotations"):
        require_nothing_lost(dataset, expected._replace(annotations=5))
    with pytest.raises(AssertionError, match="is not served"):
        require_nothing_lost(dataset, expected._replace(sure=[*expected.sure, expected.sure[0]]))
    with pytest.raises(AssertionError, match="nobody wrote"):
        require_nothing_lost(dataset, expected._replace(sure=expected.sure[1:]))


# Pictures


def pictures() -> dict[str, bytes]:
    """Small ones of each kind, with an EXIF orientation where the format has it."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[10:] = 90  # compressible
    exif = Image.Exif()
    exif[0x0112] = 6
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0])
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "JPEG": (colour, "JPEG", {"exif": exif}),
        "progressive JPEG": (colour, "JPEG", {"exif": exif, "progressive": True}),
        "grey JPEG": (grey, "JPEG", {}),
        "PNG": (colour, "PNG", {"exif": exif}),
        "palette PNG": (colour.convert("P"), "PNG", {"transparency": 3}),
        "16-bit PNG": (deep, "PNG", {}),
        "TIFF": (colour, "TIFF", {"exif": exif}),
        "compressed TIFF": (colour, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "fractions TIFF": (Image.fromarray(pixels[:, :, 0].astype(np.float32) / 255), "TIFF", {}),
        "WEBP": (colour, "WEBP", {"exif": exif}),
        "GIF": (colour.convert("P"), "GIF", {"save_all": True, "append_images": [grey.convert("P")]}),
        "BMP": (colour, "BMP", {}),
    }
    contents = {}
    for name, (picture, suffix, how) in made.items():
        with io.BytesIO() as file:
            picture.save(file, suffix, **how)
            contents[name] = file.getvalue()
    return contents


PICTURES = pictures()
heads = st.tuples(  # where sizes, depths and offsets are
    st.just("flip"),
    st.floats(0, 0.1),
    st.just(1),
    st.sampled_from([b"\xff", b"\0", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\1", b"\1\0", b"\x7f\xff", b"\xff\x7f"]),
)


@fuzz(CASES - CASES * 2 // 3)
@given(
    st.sampled_from(sorted(PICTURES)),
    st.lists(st.one_of(cuts, heads), min_size=1, max_size=3),
    st.sampled_from(
        [AnnotationOptions(), *(AnnotationOptions(frame=f, sizes="ignored") for f in ("upright", "stored"))]
    ),
)
def test_pictures(folder: tuple[Path, Path], kind: str, damage: list[Any], options: AnnotationOptions) -> None:
    images, annotations = folder
    content, data = PICTURES[kind], coco_folder.content()
    for cut in damage:
        content = damaged(content, cut)
    annotations.write_text(json.dumps(data))
    (images / "b.png").write_bytes(content)
    with limited():
        try:
            dataset = CocoDetection(images, annotations, options=options)
            report = dataset.report
            assert report.boxes + report.crowds + report.degenerate + report.outside == 4
            assert dataset[1].image_id == 9, "the others are served"
            sample = dataset[0]
        except ValueError as error:
            message = str(error)
            assert "b.png" in message, message
            assert len(message) < LONGEST_MESSAGE, message
            return
        assert sample.image.dtype == np.uint8
        assert sample.image.shape == (*sample.original_size, 3)
