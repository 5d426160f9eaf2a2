"""What annotation tools write: read where its meaning is certain, refused with the evidence where it is probably wrong."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from coco_folder import HEIGHT, WIDTH, content, open_with, write
from smca.datasets import AnnotationOptions, CocoDetection, SyntheticShapes

Data = dict[str, Any]


def every(table: str, key: str, change: Callable[[Any], Any]) -> Callable[[Data], None]:
    def edit(data: Data) -> None:
        for entry in data[table]:
            entry[key] = change(entry[key])

    return edit


def outlines(data: Data, as_mask: Callable[[list[float]], Any]) -> None:
    for annotation in data["annotations"]:
        annotation["segmentation"] = as_mask(annotation.pop("bbox"))


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h / 2], [x, y, x, y + h, x + w / 2, y + h]]


def mask_of(box: list[float], compressed: bool) -> Any:
    x, y, w, h = (round(v) for v in box)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    if compressed:
        encoded = rle.encode(mask)
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()}


def same(dataset: CocoDetection, root: Path, tolerance: float = 0.0) -> None:
    """The samples are those of the file as COCO's format has it."""
    plain = CocoDetection(*write(root / "plain", content()))
    assert len(dataset) == len(plain)
    for mine, theirs in zip([dataset[i] for i in range(3)], [plain[i] for i in range(3)], strict=True):
        np.testing.assert_allclose(mine.boxes_xyxy, theirs.boxes_xyxy, atol=tolerance)
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        np.testing.assert_array_equal(mine.image, theirs.image)


IMAGES_AS = {
    "windows": lambda name: "C:\\Users\\me\\data\\" + name.replace("/", "\\"),
    "windows relative": lambda name: "images\\" + name.replace("/", "\\"),
    "url": lambda name: f"https://host:8080/data/upload/3/{name}?width=3",
    "label studio": lambda name: f"/data/local-files/?d=some%20folder/{name}",
    "encoded": lambda name: name.replace(".", "%2E"),
    "absolute": lambda name: f"/home/somebody/project/{name}",
    "folder too many": lambda name: f"images/train/{name}",
    "dots": lambda name: f"./.././{name}",
}


@pytest.mark.parametrize("habit", IMAGES_AS)
def test_file_names(tmp_path: Path, habit: str) -> None:
    dataset = open_with(tmp_path, every("images", "file_name", IMAGES_AS[habit]))
    same(dataset, tmp_path)
    assert "3 file names corrected" in str(dataset.report)


def test_a_name_composed_otherwise(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    (images / "b.png").rename(images / "bl\u00e9.png")
    data = content()
    data["images"][0]["file_name"] = "ble\u0301.png"
    annotations.write_text(json.dumps(data))
    assert CocoDetection(images, annotations).file_names[0] == "bl\u00e9.png"


def test_a_name_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    images, annotations = write(tmp_path / "data", content())
    Image.open(images / "b.png").save(tmp_path / "secret.png")
    for name in (
        "../../secret.png",
        str(tmp_path / "secret.png"),
        "..\\..\\secret.png",
        "%2E%2E/%2E%2E/secret.png",
        "a\0.png",
    ):
        data = content()
        data["images"][0]["file_name"] = name
        annotations.write_text(json.dumps(data))
        with pytest.raises(FileNotFoundError, match=r"1 of 3 images .* are missing"):
            CocoDetection(images, annotations)


def test_symbolic_links_are_counted(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    (images / "b.png").rename(tmp_path / "b.png")
    os.symlink(tmp_path / "b.png", images / "b.png")
    assert "1 image is a symbolic link" in str(CocoDetection(images, annotations).report)


def test_two_names_for_one_file_are_refused(tmp_path: Path) -> None:
    def edit(data: Data) -> None:
        data["images"][0]["file_name"], data["images"][1]["file_name"] = "train/a.png", "val/a.png"

    with pytest.raises(ValueError, match=r"'train/a\.png' and 'val/a\.png' would both be read from .*a\.png"):
        open_with(tmp_path, edit)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (every("annotations", "category_id", str), "4 ids written as text or as fractions"),
        (every("annotations", "category_id", float), "4 ids written"),
        (every("annotations", "image_id", str), "4 ids written"),
        (every("images", "id", lambda i: f"{i}.0"), "3 ids written"),
        (every("categories", "id", str), "3 ids written"),
        (every("annotations", "id", lambda i: f" {i} "), "4 ids written"),
        (every("annotations", "bbox", lambda b: [str(v) for v in b]), "4 boxes written as text"),
        (every("annotations", "bbox", str), "4 boxes written as text"),
        (every("annotations", "bbox", lambda b: " ".join(map(str, b))), "4 boxes written as text"),
        (lambda data: [a.pop("id") for a in data["annotations"]], "4 annotations without an id numbered"),
        (lambda data: data["annotations"][1].update(id=None), "1 annotations without an id numbered"),
        (lambda data: [i.pop("width") for i in data["images"]], "3 image sizes taken from the pictures"),
        (lambda data: [i.update(width=0, height=0) for i in data["images"]], "3 image sizes taken from the pictures"),
        (every("images", "width", str), ""),
        (lambda data: outlines(data, polygon), "4 boxes taken from outlines"),
        (lambda data: outlines(data, lambda b: polygon(b)[0] + polygon(b)[1]), "4 boxes taken from outlines"),
        (lambda data: data["annotations"][0].update(iscrowd="0"), ""),
        (lambda data: data["annotations"][0].update(iscrowd=False), ""),
    ],
)
def test_values(tmp_path: Path, edit: Callable[[Data], Any], said: str) -> None:
    dataset = open_with(tmp_path, edit)
    same(dataset, tmp_path)
    assert said in str(dataset.report)


@pytest.mark.parametrize("compressed", [False, True])
def test_run_length_encoded_masks(tmp_path: Path, compressed: bool) -> None:
    dataset = open_with(tmp_path, lambda data: outlines(data, lambda box: mask_of(box, compressed)))
    same(dataset, tmp_path, tolerance=0.5)  # of the box between pixels


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3]],
        [["a"] * 6],
        {"size": [40, 60], "counts": [5, 3]},
        {"counts": "!!"},
        7,
    ],
)
def test_a_malformed_outline_in_place_of_a_box(tmp_path: Path, segmentation: Any) -> None:
    def edit(data: Data) -> None:
        data["annotations"][0].pop("bbox")
        data["annotations"][0]["segmentation"] = segmentation

    with pytest.raises(ValueError, match=r"annotations\[0\] \(id 5\): there is no 'bbox', and 'segmentation'"):
        open_with(tmp_path, edit)


@pytest.mark.parametrize(
    "of", [lambda i: f"uuid-{i}", lambda i: 2**70 + i, lambda i: -(2**90) - i, lambda i: "9" * 60 + str(i)]
)
def test_ids_of_any_kind_and_size_lead_back_to_the_files_own(tmp_path: Path, of: Callable[[int], Any]) -> None:
    def edit(data: Data) -> None:
        for table, keys in (
            ("images", ["id"]),
            ("categories", ["id"]),
            ("annotations", ["id", "image_id", "category_id"]),
        ):
            for key in keys:
                every(table, key, of)(data)

    dataset = open_with(tmp_path, edit)
    assert [dataset[i].image_id for i in range(3)] == [1, 2, 3]
    truth = dataset.ground_truth()
    data = content()
    edit(data)
    expected = {(a["image_id"], a["category_id"], a["bbox"][0]) for a in data["annotations"]}
    assert {
        (a["image_id"], a["category_id"], a["bbox"][0]) for a in dataset.with_own_ids(truth["annotations"])
    } == expected


def shapes(root: Path, edit: Callable[[Data], Any], count: int = 8) -> tuple[Path, Path]:
    images, annotations = SyntheticShapes(count, 0).export_coco(root, "train")
    data = json.loads(annotations.read_text())
    edit(data)
    annotations.write_text(json.dumps(data))
    return images, annotations


FORMATS: dict[str, Callable[[list[float]], list[float]]] = {
    "xyxy": lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]],
    "cxcywh": lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]],
    "xywh-fractions": lambda b: [v / 128 for v in b],
    "xyxy-fractions": lambda b: [b[0] / 128, b[1] / 128, (b[0] + b[2]) / 128, (b[1] + b[3]) / 128],
    "cxcywh-fractions": lambda b: [(b[0] + b[2] / 2) / 128, (b[1] + b[3] / 2) / 128, b[2] / 128, b[3] / 128],
}


@pytest.mark.parametrize("box_format", FORMATS)
def test_boxes_of_another_format_are_refused_with_the_flag_that_reads_them(tmp_path: Path, box_format: Any) -> None:
    paths = shapes(tmp_path, every("annotations", "bbox", FORMATS[box_format]))
    with pytest.raises(ValueError, match=r"train\.json: its boxes look like") as refused:
        CocoDetection(*paths)
    seen = box_format if not box_format.endswith("fractions") else "xywh-fractions"
    assert f"--annotations.box-format {seen}" in str(refused.value)
    assert "--annotations.box-format xywh" in str(refused.value)
    assert str(paths[1]) in str(refused.value)
    read, original = CocoDetection(*paths, options=AnnotationOptions(box_format=box_format)), SyntheticShapes(8, 0)
    for mine, theirs in zip([read[i] for i in range(8)], [original[i] for i in range(8)], strict=True):
        np.testing.assert_allclose(mine.boxes_xyxy, theirs.boxes_xyxy, atol=1e-9)
    CocoDetection(*paths, options=AnnotationOptions(box_format="xywh"))  # if one insists


def test_careless_corners_are_refused_too(tmp_path: Path) -> None:
    """Drawn a little beyond the border, one of them a point."""

    def careless(data: Data) -> None:
        every("annotations", "bbox", FORMATS["xyxy"])(data)
        for number, annotation in enumerate(data["annotations"]):
            x0, y0, x1, y1 = annotation["bbox"]
            annotation["bbox"] = [x0 - 2, y0, x1, y1 + 2] if number else [x1, y1, x1, y1]

    with pytest.raises(ValueError, match=r"look like two corners.* lie within it"):
        CocoDetection(*shapes(tmp_path, careless, 20))


def test_percentages_are_refused(tmp_path: Path) -> None:
    images, annotations = SyntheticShapes(16, 0, image_size=320).export_coco(tmp_path, "train")
    data = json.loads(annotations.read_text())
    every("annotations", "bbox", lambda b: [v / 3.2 for v in b])(data)
    annotations.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"look like percent of the image.*--annotations.box-format xywh-percent"):
        CocoDetection(images, annotations)
    CocoDetection(images, annotations, options=AnnotationOptions(box_format="xywh-percent"))


def test_right_boxes_are_not_refused(tmp_path: Path) -> None:
    """Boxes that reach out of their image at every side, as of tiles cut from larger pictures, and very small ones."""
    rng = np.random.default_rng(0)

    def spread(data: Data) -> None:
        for annotation in data["annotations"]:
            x, y = rng.uniform(-15, 120, 2)
            annotation["bbox"] = [x, y, *rng.uniform(10, 60, 2)]

    assert CocoDetection(*shapes(tmp_path / "tiles", spread, 20)).report.clipped > 10
    # One too many, as of tools that count from 1.
    CocoDetection(*shapes(tmp_path / "whole", every("annotations", "bbox", lambda b: [1, 1, 128, 128])))
    CocoDetection(*shapes(tmp_path / "small", every("annotations", "bbox", lambda b: [b[0], b[1], 1, 1])))
    CocoDetection(*shapes(tmp_path / "corner", every("annotations", "bbox", lambda b: [0, 0, 1, 1])))


def test_all_crowd_is_refused(tmp_path: Path) -> None:
    paths = shapes(tmp_path, lambda data: [a.update(iscrowd=1) for a in data["annotations"]])
    with pytest.raises(ValueError, match=r'all 30 annotations have "iscrowd": 1.*--annotations.crowd objects.*regions'):
        CocoDetection(*paths)
    assert CocoDetection(*paths, options=AnnotationOptions(crowd="objects")).report.boxes == 30
    regions = CocoDetection(*paths, options=AnnotationOptions(crowd="regions"))
    assert (regions.report.boxes, regions.report.crowds) == (0, 30)


def test_mutated_files_load_or_are_refused_by_name(tmp_path: Path) -> None:
    """Values exchanged at random for what a broken exporter or a damaged disk may leave."""
    images, annotations = write(tmp_path, content())
    text = json.dumps(content())
    rng = np.random.default_rng(0)
    odd: list[Any] = [None, True, -1, 0, 1.5, 1e308, -1e308, float("nan"), float("inf"), 10**400, 2**63, "", "x" * 3000, "nan", [],
    {},
                      [[[]]], {"a": 1}, [1] * 500, "1e400", "-0", 1e-320, 5e-324]  # fmt: skip
    loaded, messages = 0, []
    for _ in range(1500):
        data = copy.deepcopy(json.loads(text))
        table = data[("images", "annotations", "categories")[rng.integers(3)]]
        entry = table[rng.integers(len(table))]
        key = list(entry)[rng.integers(len(entry))]
        if isinstance(entry[key], list) and rng.random() < 0.5:
            entry[key][rng.integers(len(entry[key]))] = odd[rng.integers(len(odd))]
        else:
            entry[key] = odd[rng.integers(len(odd))]
        annotations.write_text(json.dumps(data))
        try:
            dataset = CocoDetection(images, annotations, cache=True)
            for index in range(len(dataset)):
                sample = dataset[index]
                boxes = sample.boxes_xyxy.astype(np.float32) / np.float32(60)
                assert (boxes[:, 2:] > boxes[:, :2]).all()
            json.dumps(dataset.ground_truth(), allow_nan=False)
            loaded += 1
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error))
    assert 200 < loaded < 1300
    assert all("annotations.json" in message for message in messages)
    assert max(map(len, messages)) < 700
