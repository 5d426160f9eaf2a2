"""What is wrong with annotations and pictures is found, with the entries that it is about."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smca.datasets import Category, CocoDetection, DetectionDataset, Sample, SyntheticShapes
from smca.datasets.boxes import check_boxes
from smca.datasets.contents import Pictures, find_in_pictures, look_at_pictures
from smca.datasets.findings import Finding, find_between, find_in_split, same_boxes
from smca.datasets.table import AnnotationTable, table_of, table_of_truth

CLASSES = (Category(1, "cat"), Category(2, "dog"), Category(3, "owl"))


def table(
    boxes: Any, labels: Any = None, images: Any = None, crowd: Any = None, sizes: Any = ((100, 100),)
) -> AnnotationTable:
    """Boxes x, y, width, height; on images of 100×100 pixels unless said otherwise."""
    boxes_xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    rows = len(boxes_xywh)
    positions = np.zeros(rows, np.int64) if images is None else np.array(images)
    sizes_2 = np.array(sizes if len(sizes) > 1 else list(sizes) * (int(positions.max(initial=0)) + 1), np.int64)
    return AnnotationTable(
        images=positions,
        labels=np.zeros(rows, np.int64) if labels is None else np.array(labels, np.int64),
        checked=check_boxes(boxes_xywh, sizes_2[positions, ::-1].astype(np.float64)),
        crowd=np.zeros(rows, np.bool_) if crowd is None else np.array(crowd),
        ids=np.arange(rows) + 10,
        sizes=sizes_2,
        image_ids=np.arange(len(sizes_2)) + 70,
        file_names=[f"{n}.png" for n in range(len(sizes_2))],
    )


def of_kind(found: Any, kind: str) -> Finding:
    (one,) = [each for each in found if each.kind == kind]
    return one


def kinds(found: Any) -> set[str]:
    return {each.kind for each in found}


def test_bad_boxes_are_named_with_file_and_id() -> None:
    good = [[5.0 + n % 7, 5 + n // 7, 20, 20 + n] for n in range(30)]
    bad = [[5, 5, 0, 9], [5, 5, np.nan, 9], [200, 5, 9, 9], [95, 5, 20, 9], [1, 1, 90, 3]]
    found = find_in_split("train", table(good + bad), CLASSES)
    for kind, ids in {
        "degenerate-boxes": [40, 41],
        "boxes-outside": [42],
        "clipped-boxes": [43],
        "long-boxes": [44],
    }.items():
        entries = list(of_kind(found, kind).entries())
        assert [e["annotation_id"] for e in entries] == ids, kind
        assert all(e["file"] == "0.png" and e["image_id"] == 70 for e in entries)
    assert of_kind(found, "boxes-outside").text == "1 box wholly outside the image: not trained on"
    assert list(of_kind(found, "degenerate-boxes").entries())[1]["bbox"][2] == "nan", "JSON has no NaN"


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_the_same_box_are_those_of_all_comparisons(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 50, (40, 2)), rng.uniform(3, 40, (40, 2))], axis=1)
    boxes = np.concatenate([boxes, boxes * rng.uniform(0.97, 1.03, boxes.shape), boxes[:9]])
    images = rng.integers(0, 3, len(boxes)).tolist()
    data = table(boxes, images=images, crowd=rng.random(len(boxes)) < 0.1)
    first, second, ious = same_boxes(data)
    xyxy, objects = data.checked.clipped_xyxy, set(data.objects.tolist())
    expected = {}
    for a in range(len(boxes)):
        for b in range(a):
            sides = np.minimum(xyxy[a, 2:], xyxy[b, 2:]) - np.maximum(xyxy[a, :2], xyxy[b, :2])
            common = sides.clip(0).prod()
            iou = common / ((xyxy[[a, b], 2:] - xyxy[[a, b], :2]).prod(axis=1).sum() - common)
            if iou > 0.9 and images[a] == images[b] and {a, b} <= objects:
                expected[frozenset((a, b))] = iou
    assert len(expected) > 5
    got = {frozenset(pair): iou for *pair, iou in zip(first.tolist(), second.tolist(), ious.tolist(), strict=True)}
    assert got.keys() == expected.keys()
    assert all(abs(got[pair] - expected[pair]) < 1e-12 for pair in expected)


def test_the_same_box_twice_and_under_two_classes() -> None:
    found = find_in_split("val", table([[5, 5, 20, 20], [5, 5.5, 20, 20], [5, 5, 20, 20.5]], labels=[0, 0, 2]), CLASSES)
    (pair,) = of_kind(found, "near-duplicate-boxes").entries()
    assert (pair["annotation_id"], pair["other_annotation_id"], pair["classes"]) == (10, 11, ["cat", "cat"])
    assert of_kind(found, "near-duplicate-boxes").level == "warning"
    others = list(of_kind(found, "boxes-of-two-classes").entries())
    assert {frozenset(e["classes"]) for e in others} == {frozenset(("cat", "owl"))}
    many = [[float(n % 50), n // 50 * 3.0, 2, 2] for n in range(400)]
    assert of_kind(find_in_split("val", table([*many, many[0]]), CLASSES), "near-duplicate-boxes").level == "note"


def test_odd_and_empty_images() -> None:
    data = table([[1, 1, 5, 5]], sizes=((10, 200), (6000, 5000), (100, 120)))
    found = find_in_split("train", data, CLASSES)
    assert [e["file"] for e in of_kind(found, "tiny-images").entries()] == ["0.png"]
    assert [e["file"] for e in of_kind(found, "long-images").entries()] == ["0.png"]
    assert [e["file"] for e in of_kind(found, "huge-images").entries()] == ["1.png"]
    assert [e["file"] for e in of_kind(found, "empty-images").entries()] == ["1.png", "2.png"]


def test_classes_that_cannot_be_learned_or_measured() -> None:
    boxes = [[5.0, 5, 20, 20]] * 3
    tables = {"train": table(boxes, labels=[0, 0, 1]), "val": table(boxes, labels=[0, 2, 2])}
    found = find_between(tables, CLASSES)
    assert of_kind(found, "class-not-trained").text == "owl has no box to train on, and 2 held out: never found"
    assert of_kind(found, "class-not-trained").level == "warning"
    assert [e["class"] for e in of_kind(found, "class-not-measured").entries()] == ["dog"]
    assert [e["class"] for e in of_kind(found, "rare-class").entries()] == ["cat", "dog"]
    assert "unused-class" not in kinds(found)
    found = find_between({"train": tables["train"], "val": tables["train"]}, CLASSES)
    assert [e["class"] for e in of_kind(found, "unused-class").entries()] == ["owl"]
    empty = table([])
    assert of_kind(find_between({"train": empty, "val": tables["val"]}, CLASSES), "no-boxes").level == "error"
    assert of_kind(find_between({"train": tables["train"], "val": empty}, CLASSES), "no-boxes").level == "warning"


@pytest.mark.parametrize(
    ("names", "twice"),
    [(("White cell", "white_cell"), True), (("Ｃat", "cat "), True), (("cat", "cats"), False), (("+", "-"), False)],
)
def test_a_class_under_two_spellings(names: tuple[str, str], twice: bool) -> None:
    found = find_between({"train": table([[5, 5, 20, 20]])}, [Category(n, name) for n, name in enumerate(names)])
    assert ("class-named-twice" in kinds(found)) == twice


def test_a_table_is_the_same_from_arrays_and_from_samples(tmp_path: Path) -> None:
    shapes = SyntheticShapes(5, 0, image_size=64)
    coco = table_of(CocoDetection(*shapes.export_coco(tmp_path, "train")))

    class Own(DetectionDataset):
        categories = shapes.categories

        def __len__(self) -> int:
            return len(shapes)

        def __getitem__(self, index: int) -> Sample:
            return shapes[index]

    for other in (table_of(shapes), table_of(Own())):
        for name in ("images", "labels", "boxes_xywh", "crowd", "ids", "sizes", "image_ids", "objects_per_image"):
            np.testing.assert_array_equal(getattr(coco, name), getattr(other, name), err_msg=name)
    assert coco.file_names[0] == "000001.png"

    truth = shapes.ground_truth()
    for image in truth["images"]:
        del image["width"], image["height"]
    assert len(table_of_truth(truth).objects) == len(coco.objects), "without sizes, nothing lies outside"
    truth["annotations"][0]["category_id"] = 77
    with pytest.raises(ValueError, match="names 77, an image or a category that it does not list"):
        table_of_truth(truth)


def photograph(seed: int, size: int = 96) -> Image.Image:
    """Something with large and small structure, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-12, 13, (size, size, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def look(folder: Path, split: str, files: dict[str, Image.Image]) -> tuple[AnnotationTable, Pictures]:
    (folder / split).mkdir()
    for name, picture in files.items():
        picture.save(folder / split / name)
    data = table([[5, 5, 20, 20]] * len(files), images=range(len(files)))
    data.file_names[:] = list(files)  # type: ignore[index]
    return data, look_at_pictures(folder / split, list(files))


def test_copies_between_splits_are_found_and_others_are_not(tmp_path: Path) -> None:
    train, seen_train = look(tmp_path, "train", {f"{n}.png": photograph(n) for n in range(12)})
    files = {
        "same.png": photograph(3),
        "compressed.jpg": photograph(5),
        "smaller.png": photograph(7).resize((70, 70), Image.Resampling.LANCZOS),
        "brighter.png": photograph(8).point(lambda value: min(255, value + 12)),
        "other.png": photograph(99),
        "again.png": photograph(99),
    }
    val, seen_val = look(tmp_path, "val", files)
    found = list(find_in_pictures({"train": train, "val": val}, {"train": seen_train, "val": seen_val}))
    (shared,) = of_kind(found, "shared-images").entries()
    assert (shared["file"], shared["other_file"]) == ("3.png", "same.png")
    alike = {(e["file"], e["other_file"]) for e in of_kind(found, "shared-pictures").entries()}
    assert alike == {("5.png", "compressed.jpg"), ("7.png", "smaller.png")}
    assert of_kind(found, "shared-images").level == of_kind(found, "shared-pictures").level == "warning"
    (again,) = of_kind(found, "copies-in-a-split").entries()
    assert {again["file"], again["other_file"]} == {"other.png", "again.png"}


def test_pictures_of_one_colour_are_no_copies(tmp_path: Path) -> None:
    train = look(tmp_path, "train", {"a.png": Image.new("RGB", (40, 40), (9, 9, 9))})
    val = look(tmp_path, "val", {"b.png": Image.new("RGB", (41, 41), (9, 9, 9))})
    tables, seen = {"train": train[0], "val": val[0]}, {"train": train[1], "val": val[1]}
    assert "shared-pictures" not in kinds(find_in_pictures(tables, seen))


def test_damaged_grey_and_missing_pictures(tmp_path: Path) -> None:
    files = {f"{n}.png": photograph(n) if n else photograph(0).convert("L") for n in range(5)}
    train, seen = look(tmp_path, "train", files)
    found = list(find_in_pictures({"train": train}, {"train": seen}))
    assert [e["file"] for e in of_kind(found, "grey-and-colour").entries()] == ["0.png"]
    data = (tmp_path / "train" / "4.png").read_bytes()
    (tmp_path / "train" / "4.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "train" / "3.png").unlink()
    seen = look_at_pictures(tmp_path / "train", list(files))
    damaged = of_kind(find_in_pictures({"train": train}, {"train": seen}), "undecodable-images")
    assert damaged.level == "error"
    assert [(e["file"], e["image_id"]) for e in damaged.entries()] == [("3.png", 73), ("4.png", 74)]
    assert "4.png" in list(damaged.entries())[1]["why"]

    grey, seen_grey = look(tmp_path, "val", {"g.png": photograph(50).convert("L")})
    both = find_in_pictures({"train": train, "val": grey}, {"train": seen, "val": seen_grey})
    assert of_kind(both, "grey-and-colour").level == "warning"
    shutil.rmtree(tmp_path / "val")


def test_a_million_boxes_take_seconds() -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(100_000), 10)
    boxes = np.concatenate([rng.uniform(0, 500, (len(images), 2)), rng.uniform(5, 100, (len(images), 2))], axis=1)
    data = table(boxes, labels=rng.integers(0, 3, len(images)), images=images, sizes=((480, 640),) * 100_000)
    start = time.perf_counter()
    found = [*find_in_split("train", data, CLASSES), *find_between({"train": data, "val": data}, CLASSES)]
    assert time.perf_counter() - start < 10
    assert "clipped-boxes" in kinds(found)
