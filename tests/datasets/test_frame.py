"""Which frame boxes refer to in photographs with an EXIF orientation: from evidence, or by the user's word."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smca.datasets import AnnotationOptions, CocoDetection
from smca.datasets.frame import Headers

UPRIGHT = (60, 100)
"""(height, width) of every picture as a viewer shows it."""
WIDE_BOX, MIDDLE_BOX = [70.0, 5.0, 25.0, 30.0], [10.0, 12.0, 30.0, 20.0]
"""In the upright frame: one that the stored picture (100 high, 60 wide) does not hold, and one that both hold."""


def folder(
    root: Path, pictures: Sequence[tuple[int, str, list[float]]], upright: tuple[int, int] = UPRIGHT
) -> tuple[Path, Path]:
    """pictures: (EXIF orientation, size written: "upright", "stored" or "none", box)."""
    images = []
    for number, (orientation, written, _) in enumerate(pictures):
        stored = upright[::-1] if orientation >= 5 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.random.default_rng(number).integers(0, 256, (*stored, 3), dtype=np.uint8)
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png", exif=exif)
        size = {"upright": upright, "stored": stored, "none": (None, None)}[written]
        images.append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})
    annotations = [
        {"id": n + 1, "image_id": n, "category_id": 1, "bbox": box} for n, (_, _, box) in enumerate(pictures) if box
    ]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "a.json").write_text(json.dumps(data))
    return root / "images", root / "a.json"


STORED_BOX = [5.0, 70.0, 30.0, 25.0]


@pytest.mark.parametrize(
    ("pictures", "frame"),
    [
        ([(6, "upright", MIDDLE_BOX)], "upright"),  # most tools
        ([(6, "stored", WIDE_BOX)], "upright"),  # Label Studio: the size as stored, the boxes as shown
        ([(8, "none", WIDE_BOX)], "upright"),
        ([(6, "stored", STORED_BOX)], "stored"),  # COCO itself
        ([(6, "upright", MIDDLE_BOX), (3, "upright", MIDDLE_BOX), (2, "stored", MIDDLE_BOX)], "upright"),
        ([(5, "stored", STORED_BOX), (3, "stored", MIDDLE_BOX), (7, "stored", MIDDLE_BOX)], "stored"),
        ([(1, "stored", MIDDLE_BOX)], "upright"),
        ([(6, "stored", []), (1, "stored", MIDDLE_BOX)], "upright"),  # nothing to misplace
    ],
)
def test_evidence_decides_for_the_whole_data_set(tmp_path: Path, pictures: Any, frame: Any) -> None:
    images, annotations = folder(tmp_path, pictures)
    dataset = CocoDetection(images, annotations)
    assert dataset.frame == frame
    for index, (orientation, _, box) in enumerate(pictures):
        sample = dataset[index]
        stored = np.asarray(Image.open(images / f"{index}.png"))
        turned = orientation >= 5 and frame == "upright"
        assert sample.image.shape == ((*stored.shape[:2][::-1], 3) if turned else stored.shape)
        assert sample.original_size == sample.image.shape[:2]
        if box:
            assert sample.boxes_xyxy.tolist() == [[box[0], box[1], box[0] + box[2], box[1] + box[3]]]
        if frame == "stored":
            np.testing.assert_array_equal(sample.image, stored)
    truth = dataset.ground_truth()
    assert [(i["height"], i["width"]) for i in truth["images"]] == [
        dataset[i].original_size for i in range(len(pictures))
    ]
    said = "as viewers show them" if frame == "upright" else "as stored"
    assert (said in str(dataset.report)) == any(orientation > 1 for orientation, _, _ in pictures)


@pytest.mark.parametrize(
    "pictures",
    [
        [(6, "stored", MIDDLE_BOX)],  # both frames hold the box, and tools write either size
        [(3, "stored", MIDDLE_BOX)],  # a half turn leaves the size
        [(2, "upright", MIDDLE_BOX), (1, "upright", WIDE_BOX)],
    ],
)
def test_without_evidence_the_user_decides(tmp_path: Path, pictures: Any) -> None:
    paths = folder(tmp_path, pictures)
    with pytest.raises(
        ValueError, match=r"a\.json: the EXIF orientation of 1 image \(0\.png\).*--annotations.frame upright"
    ) as refused:
        CocoDetection(*paths)
    assert "--annotations.frame stored" in str(refused.value)
    for frame in ("upright", "stored"):
        assert CocoDetection(*paths, options=AnnotationOptions(frame=frame)).frame == frame  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pictures",
    [
        [(6, "upright", MIDDLE_BOX), (6, "stored", STORED_BOX)],
        [(6, "upright", MIDDLE_BOX), (6, "stored", MIDDLE_BOX)],
        [(6, "stored", WIDE_BOX), (6, "stored", STORED_BOX)],
    ],
)
def test_contradicting_evidence_is_shown(tmp_path: Path, pictures: Any) -> None:
    with pytest.raises(
        ValueError, match=r"upright picture in 1 image \(0\.png\), but to the stored one in 1 image \(1\.png\)"
    ):
        CocoDetection(*folder(tmp_path, pictures))


def test_square_pictures_have_one_size_either_way(tmp_path: Path) -> None:
    paths = folder(tmp_path, [(6, "upright", MIDDLE_BOX)], upright=(80, 80))
    with pytest.raises(ValueError, match="neither sizes nor boxes tell"):
        CocoDetection(*paths)
    image = CocoDetection(*paths, options=AnnotationOptions(frame="upright"))[0].image
    np.testing.assert_array_equal(image, np.rot90(np.asarray(Image.open(paths[0] / "0.png")), -1))


def test_a_size_that_is_neither(tmp_path: Path) -> None:
    paths = folder(tmp_path, [(6, "upright", MIDDLE_BOX)])
    paths[1].write_text(paths[1].read_text().replace('"width": 100', '"width": 99'))
    with pytest.raises(ValueError, match=r"0\.png is 60×100 pixels, but .*a\.json says 99×60"):
        CocoDetection(*paths)


def test_sizes_of_headers() -> None:
    headers = Headers(np.array([(60, 100)] * 3), np.array([1, 6, 3]))
    assert headers.sizes("upright").tolist() == [[60, 100], [100, 60], [60, 100]]
    assert headers.sizes("stored").tolist() == [[60, 100]] * 3
    assert headers.turned.tolist() == [False, True, True]
