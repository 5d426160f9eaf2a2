"""Pictures: what is drawn, where, and the errors for wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smca.gpu.pictures.drawing import (
    LARGEST_SIDE,
    class_color,
    compare_curves,
    contact_sheet,
    draw_detections,
    training_curves,
)

NAMES = ("circle", "square")
GREY = np.full((600, 800, 3), 128, dtype=np.uint8)
BOX = [[200.0, 250.0, 400.0, 450.0]]


def pixels(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture)


def test_box_is_drawn_in_the_colour_of_its_class() -> None:
    image = GREY.copy()
    drawn = pixels(draw_detections(image, BOX, [1], [0.9], NAMES, 0.5))
    assert drawn.shape == image.shape
    for x, y in ((200, 350), (400, 350), (300, 450)):  # left, right and bottom edge: (x, y), not (y, x)
        assert tuple(drawn[y, x]) == class_color(1)
    assert tuple(drawn[350, 300]) == (128, 128, 128)
    assert (image == GREY).all()


def test_label_stands_above_its_box_on_a_ground_of_its_colour() -> None:
    drawn = pixels(draw_detections(GREY, BOX, [0], [0.9], NAMES, 0.5))
    above = drawn[235:250, 200:260].reshape(-1, 3)
    assert (above == class_color(0)).all(axis=1).mean() > 0.3
    assert len(np.unique(above, axis=0)) > 2  # and text on it


def test_threshold_is_inclusive_and_hides_what_is_below() -> None:
    assert (pixels(draw_detections(GREY, BOX, [0], [0.49], NAMES, 0.5)) == GREY).all()
    assert (pixels(draw_detections(GREY, BOX, [0], [0.5], NAMES, 0.5)) != GREY).any()


def test_truth_is_drawn_white_and_dashed() -> None:
    drawn = pixels(draw_detections(GREY, [], [], [], NAMES, 0.5, truth_xyxy=BOX))
    edge = {tuple(p) for p in drawn[250, 200:401].tolist()}
    assert edge == {(255, 255, 255), (0, 0, 0)}


def test_small_images_are_enlarged_by_a_whole_factor_and_boxes_with_them() -> None:
    small = np.full((64, 96, 3), 128, dtype=np.uint8)
    picture = draw_detections(small, [[10.0, 20.0, 50.0, 60.0]], [0], [0.9], NAMES, 0.5)
    factor = picture.width // 96
    assert picture.size == (96 * factor, 64 * factor)
    assert picture.height >= 480
    assert tuple(pixels(picture)[40 * factor, 10 * factor]) == class_color(0)


def test_narrow_images_do_not_grow_without_bound() -> None:
    narrow = np.zeros((4, 1500, 3), dtype=np.uint8)
    assert max(draw_detections(narrow, [[0.0, 0.0, 9.0, 3.0]], [0], [0.9], NAMES, 0.5).size) <= LARGEST_SIDE


def test_boxes_beyond_the_border_labels_at_the_border_and_crowds_of_boxes() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(-300, 1100, (60, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    picture = draw_detections(GREY, boxes, rng.integers(0, 2, 60), rng.uniform(0, 1, 60), NAMES, 0.0)
    assert picture.size == (800, 600)


def test_two_labels_do_not_cover_each_other() -> None:
    # The same box twice: the second text finds another place, and what is above the box stays as it was with one.
    one = pixels(draw_detections(GREY, BOX, [0], [0.9], NAMES, 0.5))
    two = pixels(draw_detections(GREY, BOX * 2, [0, 1], [0.9, 0.8], NAMES, 0.5))
    assert (one[:250] == two[:250]).all()
    assert (two[252:275] == class_color(1)).all(axis=2).sum() > 500


def test_pil_images_of_any_mode_and_names_in_any_script() -> None:
    picture = draw_detections(Image.new("L", (500, 500)), [[5.0, 5.0, 90.0, 90.0]], [0], [0.9], ("Тромбоцит",), 0.5)
    assert picture.mode == "RGB"


def test_class_colours_differ() -> None:
    assert len({class_color(label) for label in range(80)}) == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4), dtype=np.uint8)}, r"uint8 \[H, W, 3\]"),
        ({"image": np.zeros((4, 4, 3))}, "float64"),
        ({"boxes_xyxy": [[1.0, 2.0, 3.0]]}, r"\[T, 4\]"),
        ({"boxes_xyxy": [[1.0, 2.0, np.nan, 3.0]]}, "finite"),
        ({"boxes_xyxy": [[50.0, 50.0, 20.0, 20.0]]}, "cxcywh"),
        ({"labels": [2]}, "2 class names"),
        ({"labels": [-1]}, "2 class names"),
        ({"scores": [0.5, 0.5]}, "1 boxes, 1 labels and 2 scores"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"image": GREY, "boxes_xyxy": BOX, "labels": [0], "scores": [0.9]}
    with pytest.raises(ValueError, match=message):
        draw_detections(**(arguments | change), class_names=NAMES, threshold=0.5)


def test_contact_sheet_places_row_by_row() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (100, 60), colour) for colour in colours]
    sheet = contact_sheet(images, columns=2)
    assert sheet.size == (2 * 104 + 4, 2 * 64 + 4)
    assert [sheet.getpixel(at) for at in ((54, 34), (158, 34), (54, 98))] == colours
    assert sheet.getpixel((158, 98)) == (255, 255, 255)
    assert contact_sheet(images[:1], columns=4).width == 108


def test_contact_sheet_rejects_nothing() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], columns=2)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        contact_sheet([Image.new("RGB", (8, 8))], columns=0)


def run(values: list[float | None], first_epoch: int = 1) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "loss": 10.0 / epoch, "ap": value, "ap50": value, "train_seconds": 20.0 * epoch}
        for epoch, value in enumerate(values, start=first_epoch)
    ]


@pytest.mark.parametrize("values", [[0.1, 0.3, 0.4], [0.2], [None, None], [None, 0.1]])
def test_training_curves_are_written(values: list[float | None], tmp_path: Path) -> None:
    training_curves(run(values), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 200


def test_an_epoch_written_twice_counts_once(tmp_path: Path) -> None:
    training_curves(run([0.1, 0.2]) + run([0.3], first_epoch=2), tmp_path / "resumed.png")
    training_curves(run([0.1, 0.3]), tmp_path / "straight.png")
    assert (tmp_path / "resumed.png").read_bytes() == (tmp_path / "straight.png").read_bytes()


def test_compare_curves_takes_the_epochs_that_all_seeds_have(tmp_path: Path) -> None:
    whole = {"SMCA": [run([0.1, 0.2]), run([0.2, 0.3])], "DETR": [run([0.0, None])]}
    longer = {"SMCA": [run([0.1, 0.2]), run([0.2, 0.3, 0.4])], "DETR": [run([0.0, None])]}
    compare_curves(whole, tmp_path / "whole.png", title="AP by epoch")
    compare_curves(longer, tmp_path / "longer.png", title="AP by epoch")
    compare_curves(whole, tmp_path / "log.png", metric="ap50", log_epochs=True)
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "longer.png").read_bytes()


def test_curves_reject_wrong_metrics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics to draw"):
        training_curves([], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="line 1 of the metrics has no ap, ap50"):
        training_curves([{"epoch": 1, "loss": 1.0, "train_seconds": 2.0}], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="at least one recipe"):
        compare_curves({}, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no runs"):
        compare_curves({"SMCA": []}, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no epoch in common"):
        compare_curves({"SMCA": [run([0.1]), run([0.1], first_epoch=5)]}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
