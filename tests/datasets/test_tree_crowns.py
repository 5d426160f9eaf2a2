"""docs/tree_crowns.py on made-up photographs: every pixel in one tile, boxes where their crowns are, folders that load."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smca.datasets import CocoDetection

SCRIPT = Path(__file__).parents[2] / "docs" / "tree_crowns.py"
SPEC: Any = importlib.util.spec_from_file_location("tree_crowns", SCRIPT)
trees: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trees)


def photograph(folder: Path, name: str, boxes: list[tuple[int, int, int, int]]) -> None:
    """250 × 120 pixels, with annotations in Pascal VOC's format: corners counted from 1, the last included."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((120, 250, 3), np.uint8)).save(folder / f"{name}.png")
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>Tree</name><bndbox>{''.join(f'<{s}>{v}</{s}>' for s, v in zip(sides, box, strict=True))}"
        "</bndbox></object>"
        for box in boxes
    )
    (folder / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")


@pytest.mark.parametrize(("width", "height", "side"), [(250, 120, 100), (99, 401, 200), (30, 40, 200)])
def test_every_pixel_is_in_one_tile(width: int, height: int, side: int) -> None:
    count = np.zeros((height, width), int)
    for left, top, right, bottom in trees.tiles_of(width, height, side):
        count[top:bottom, left:right] += 1
    assert (count == 1).all()


def test_a_box_is_in_the_tiles_that_show_half_of_it_or_more() -> None:
    boxes = np.array([[10.0, 10, 20, 30], [90, 0, 110, 10], [95, 0, 115, 10], [150, 50, 160, 60]])
    np.testing.assert_array_equal(trees.boxes_in((0, 0, 100, 100), boxes), [[10, 10, 20, 30], [90, 0, 100, 10]])
    np.testing.assert_array_equal(
        trees.boxes_in((100, 0, 200, 100), boxes), [[0, 0, 10, 10], [0, 0, 15, 10], [50, 50, 60, 60]]
    )


def test_the_folder_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    photograph(tmp_path / "in", "elsewhere", [(1, 1, 250, 120), (11, 21, 30, 40)])
    photograph(tmp_path / "in", trees.HELD_OUT, [(201, 101, 210, 120)])
    monkeypatch.setattr(sys, "argv", ["tree_crowns.py", str(tmp_path / "in"), str(tmp_path / "out"), "--tile", "125"])
    trees.main()
    assert capsys.readouterr().out.splitlines() == [
        "train: 2 tiles from 1 photographs, 3 boxes",
        "val: 2 tiles from 1 photographs, 1 boxes",
    ]
    boxes = {}
    for split in ("train", "val"):
        data = CocoDetection(tmp_path / "out" / split, tmp_path / "out" / "annotations" / f"instances_{split}.json")
        boxes[split] = [(a["image_id"], *a["bbox"]) for a in data.ground_truth()["annotations"]]
        assert [data[index].image.shape[:2] for index in range(2)] == [(120, 125)] * 2
    assert boxes["train"] == [(1, 0, 0, 125, 120), (1, 10, 20, 20, 20), (2, 0, 0, 125, 120)]
    assert boxes["val"] == [(2, 75, 100, 10, 20)]


def test_another_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tree_crowns.py", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        trees.main()
    assert "give deepforest/data of the package" in capsys.readouterr().err
