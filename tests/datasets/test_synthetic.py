"""SyntheticShapes: deterministic, exactly labelled, and the same through an export to COCO's format."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from smca.datasets import CocoDetection, SyntheticShapes
from smca.datasets.shapes import CLASSES, Shape, paint, place_shapes


def test_an_image_follows_from_seed_and_index_alone() -> None:
    one, other = SyntheticShapes(20, seed=7), SyntheticShapes(10, seed=7)
    _ = one[3]  # having drawn another image first must not matter
    a, b = one[9], other[9]
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.boxes_xyxy, b.boxes_xyxy)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert not np.array_equal(a.image, one[8].image)
    assert not np.array_equal(a.image, SyntheticShapes(20, seed=8)[9].image)


def test_boxes_are_the_tight_extent_of_what_is_drawn() -> None:
    """Without noise, an image of one object differs from the same background without it exactly on the object."""
    checked = 0
    for index in range(60):
        dataset = SyntheticShapes(60, seed=2, max_objects=1, noise=0.0, empty_fraction=0.0)
        with_object = dataset[index]
        empty = SyntheticShapes(60, seed=2, noise=0.0, empty_fraction=1.0)[index]
        assert len(empty.labels) == 0
        if len(with_object.labels) == 0:  # found no room
            continue
        rows, columns = np.nonzero((with_object.image != empty.image).any(axis=2))
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # A pixel of the object may by chance have the background's colour; a whole side of it does not.
        np.testing.assert_allclose(with_object.boxes_xyxy[0], extent, atol=1)
        checked += np.array_equal(with_object.boxes_xyxy[0], extent)
    assert checked >= 50


def test_every_object_is_seen_and_hidden_parts_count_for_its_box() -> None:
    hidden = 0
    for seed in range(150):
        covered = np.zeros((128, 128), dtype=bool)
        for shape in place_shapes(np.random.default_rng(seed), 128, 6, (12.0, 64.0), 0.3):
            seen = shape.mask & ~covered[shape.window]
            assert seen.sum() >= 0.3 * shape.mask.sum()
            hidden += seen.sum() < shape.mask.sum()
            whole = np.zeros((128, 128), dtype=bool)
            whole[shape.window] = shape.mask
            rows, columns = np.nonzero(whole)
            assert shape.box_xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            covered |= whole
    assert hidden > 100  # occlusion does happen


def test_the_first_shape_is_in_front_and_stands_out() -> None:
    def square(low: int, high: int) -> Shape:
        side = high - low
        mask, along = np.ones((side, side), dtype=bool), np.zeros((side, side), dtype=np.float32)
        return Shape(1, (slice(low, high), slice(low, high)), mask, along)

    front, back = square(50, 70), square(30, 90)
    for seed in range(20):
        image = paint(np.random.default_rng(seed), 128, [front, back], noise=0.0).astype(int)
        assert np.abs(image[60, 60] - image[40, 40]).max() >= 54  # the contrast asked for, less the rounding
        outside = np.concatenate([image[24, 24:96], image[96, 24:96]])
        assert np.abs(image[40, 40] - outside).max() > 20


def test_the_data_vary_as_documented() -> None:
    dataset = SyntheticShapes(400, seed=0)
    gt = dataset.ground_truth()
    per_class = np.bincount([a["category_id"] for a in gt["annotations"]], minlength=6)[1:]
    assert (per_class > 0.14 * per_class.sum()).all()
    counts = np.bincount([a["image_id"] for a in gt["annotations"]], minlength=401)[1:]
    assert 0.01 < (counts == 0).mean() < 0.09
    assert counts.max() == 6
    sides = np.array([a["bbox"][2:] for a in gt["annotations"]])
    assert np.quantile(sides.max(axis=1), 0.95) / np.quantile(sides.max(axis=1), 0.05) > 4
    assert sides.min() >= 2
    boxes = np.array([a["bbox"] for a in gt["annotations"]])
    assert boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 128
    assert str(dataset.report).startswith("400 images")
    assert dataset.report.boxes == len(gt["annotations"])
    assert dataset.report.empty_images == (counts == 0).sum()


def test_colour_says_nothing_about_the_class() -> None:
    """The mean colour in the middle of the objects is the same for every class within the error of the mean."""
    colours: list[list[np.ndarray]] = [[] for _ in CLASSES]
    dataset = SyntheticShapes(300, seed=4, max_objects=1, noise=0.0)
    for i in range(len(dataset)):
        s = dataset[i]
        if len(s.labels) and CLASSES[s.labels[0]] != "ring":  # a ring's middle shows the background
            x0, y0, x1, y1 = s.boxes_xyxy[0].astype(int)
            colours[s.labels[0]].append(s.image[(y0 + y1) // 2, (x0 + x1) // 2].astype(float))
    means = np.array([np.mean(c, axis=0) for c in colours if c])
    assert np.abs(means - means.mean(axis=0)).max() < 4 * 70 / np.sqrt(40)


def test_sizes_grow_with_the_image() -> None:
    small, large = (SyntheticShapes(80, seed=3, image_size=size).ground_truth() for size in (64, 256))
    sides = [np.median([max(a["bbox"][2:]) for a in gt["annotations"]]) for gt in (small, large)]
    assert 3 < sides[1] / sides[0] < 5
    assert SyntheticShapes(1, image_size=256)[0].image.shape == (256, 256, 3)


def test_an_export_read_back_gives_the_same_samples(tmp_path: Path) -> None:
    dataset = SyntheticShapes(40, seed=5, image_size=64)
    images_dir, annotations_file = dataset.export_coco(tmp_path, "val")
    assert (images_dir, annotations_file) == (tmp_path / "val", tmp_path / "annotations" / "val.json")
    read = CocoDetection(images_dir, annotations_file)
    assert read.categories == dataset.categories
    assert len(read) == len(dataset)
    for i in range(len(dataset)):
        a, b = dataset[i], read[i]
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.boxes_xyxy, b.boxes_xyxy)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert (a.image_id, a.original_size) == (b.image_id, b.original_size)
    assert read.ground_truth()["annotations"] == dataset.ground_truth()["annotations"]
    assert read.report == dataset.report
    assert json.loads(annotations_file.read_text()) == dataset.ground_truth()


def test_the_cache_returns_the_same_read_only_image_once_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cached = SyntheticShapes(5, seed=1), SyntheticShapes(5, seed=1, cache=True)
    assert cached.cache_bytes == 5 * 128 * 128 * 3
    assert plain.cache_bytes == 0
    first = [cached[i].image for i in range(5)]
    copy = pickle.loads(pickle.dumps(cached))  # what a spawned worker gets: an empty cache
    monkeypatch.setattr(SyntheticShapes, "_render", lambda self, index: pytest.fail("rendered again"))
    for i in range(5):
        np.testing.assert_array_equal(cached[i].image, first[i])
    monkeypatch.undo()
    for i in range(5):
        np.testing.assert_array_equal(plain[i].image, first[i])
        np.testing.assert_array_equal(copy[i].image, first[i])
    with pytest.raises(ValueError, match="read-only"):
        cached[0].image[0, 0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        cached[0].boxes_xyxy[...] = 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"image_size": 16}, "image_size must be at least 32 px"),
        ({"max_objects": 0}, "max_objects must be"),
        ({"empty_fraction": 1.5}, "empty_fraction must be from 0 to 1"),
        ({"min_side": 0.6, "max_side": 0.5}, "min_side, max_side must be"),
        ({"min_visible": 0}, "min_visible must be"),
        ({"noise": -1}, "noise must be"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticShapes(**{"count": 1, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [3, -1])
def test_an_index_beyond_the_end(index: int) -> None:
    with pytest.raises(IndexError, match=f"from 0 to 2, got {index}"):
        SyntheticShapes(3)[index]
