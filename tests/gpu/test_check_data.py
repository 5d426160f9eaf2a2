"""check-data and what training says before it starts: settings that do not suffice, with flags that do; exit status; files."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smca.datasets import Augmentation, Category, SyntheticShapes
from smca.datasets.boxes import check_boxes
from smca.datasets.table import AnnotationTable, table_of
from smca.gpu import check_data, train
from smca.gpu.config import ModelConfig
from smca.gpu.evaluation import warnings_of
from smca.gpu.evaluation.fit import Resize, find_in_settings
from smca.gpu.presets import PRESETS
from tiny_run import tiny

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"
CLASSES = (Category(1, "cell"), Category(2, "dot"))
AUGMENTATION = Augmentation(short_sides=(100,), max_size=200)


def squares(sides: list[float], labels: list[int] | None = None, per_image: int = 10) -> AnnotationTable:
    """Square objects in images of 200×400 pixels."""
    count, images = len(sides), -(-len(sides) // per_image)
    boxes_xywh = np.array([[n % per_image * 13.0, n % 7 * 20.0, side, side] for n, side in enumerate(sides)])
    return AnnotationTable(
        images=np.arange(count) // per_image,
        labels=np.array(labels or [0] * count),
        checked=check_boxes(boxes_xywh, np.full((count, 2), [400.0, 200.0])),
        crowd=np.zeros(count, np.bool_),
        ids=np.arange(count) + 1,
        sizes=np.array([[200, 400]] * images),
        image_ids=np.arange(images) + 1,
        file_names=[f"{n}.png" for n in range(images)],
    )


def model(**changes: Any) -> ModelConfig:
    base = PRESETS["small"]().model
    return dataclasses.replace(base, **{"image_short_side": 100, "image_max_size": 200, "num_queries": 60, **changes})


def parse(flags: str, of: ModelConfig, augmentation: Augmentation) -> check_data.CheckDataArgs:
    """The settings with the options that a finding advises, as the command line takes them."""
    default = check_data.CheckDataArgs(model=of, augmentation=augmentation)
    return check_data.tyro.cli(check_data.CheckDataArgs, args=flags.split(), default=default)


def told(table: AnnotationTable, of: ModelConfig, augmentation: Augmentation = AUGMENTATION) -> dict[str, str]:
    return {each.kind: each.text for each in find_in_settings(table, CLASSES, of, augmentation)}


def test_sizes_are_those_after_the_resize() -> None:
    shapes = SyntheticShapes(4, 0, image_size=64)
    resized = Augmentation.evaluation(96, 96)
    sides = [s for i in range(4) for b in [resized(shapes[i], np.random.default_rng(0)).boxes_xyxy] for s in b]
    expected = [np.sqrt((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in sides]
    np.testing.assert_allclose(Resize(96, 96).sides(table_of(shapes)), expected, rtol=1e-6)
    assert Resize(100, 150).sides(squares([20.0])) == pytest.approx([20 * 150 / 400]), "the longer side limits it"


def test_settings_that_suffice_are_left_alone() -> None:
    assert told(squares([40.0] * 40), model()) == {}
    nothing = dataclasses.replace(squares([40.0]), crowd=np.array([True]))
    assert told(nothing, model()) == {}


def test_too_few_queries_and_the_flag_for_enough() -> None:
    data = squares([40.0] * 50, per_image=25)
    text = told(data, model(num_queries=20))["too-few-queries"]
    assert "an image has 25 objects, but the model has 20 queries" in text
    assert "2 images have more objects than queries" in text
    flags = text[text.index("--") : text.index(" or so")]
    enough = parse(flags, model(num_queries=20), AUGMENTATION).model
    assert enough.num_queries == 37
    assert told(data, enough) == {}
    assert "few-queries" in told(data, model(num_queries=28))


def test_pixels_scaled_otherwise_than_for_the_weights_and_the_flags_that_mend_it() -> None:
    lite, data = PRESETS["small_pretrained"]().model, squares([40.0] * 40)
    assert "pixels-scaled-otherwise" not in told(data, lite)
    plain = model(backbone=lite.backbone)
    text = told(data, plain)["pixels-scaled-otherwise"]
    mended = parse(text[text.index("--") :], plain, AUGMENTATION).model
    assert mended.pixel_mean == pytest.approx(lite.pixel_mean, abs=1e-4)
    assert mended.pixel_std == pytest.approx(lite.pixel_std, abs=1e-4)
    assert "pixels-scaled-otherwise" not in told(data, mended)
    assert (
        "--model.pixel-std"
        not in told(data, dataclasses.replace(plain, pixel_std=lite.pixel_std))["pixels-scaled-otherwise"]
    )


@pytest.mark.parametrize("strides", [(8,), (16,), (8, 16)])
def test_objects_under_a_cell_and_flags_that_mend_it(strides: tuple[int, ...]) -> None:
    data = squares([10.0] * 10 + [60.0] * 30)  # half as large after the resize
    text = told(data, model(strides=strides))["objects-under-a-cell"]
    assert text.startswith(
        f"25.0% of the objects (25% of cell) are less than a cell of {strides[0]}×{strides[0]} pixels"
    )
    options = text.split(": ")[1].split("; or ")
    assert len(options) == 2, "a finer stride, and larger images"
    for flags in options:
        mended = parse(flags.split(" (")[0], model(strides=strides), AUGMENTATION)
        assert told(data, mended.model, mended.augmentation) == {}, flags
    (other,) = [e for e in find_in_settings(data, CLASSES, model(strides=strides), AUGMENTATION)]
    entries = list(other.entries())
    assert (len(entries), entries[0]["annotation_id"], entries[0]["side_px"]) == (10, 1, 5.0)


def test_a_rare_class_under_a_cell_and_objects_for_tiles() -> None:
    data = squares([60.0] * 96 + [6.0] * 4, labels=[0] * 96 + [1] * 4)
    assert "(100% of dot)" in told(data, model(strides=(8,)))["objects-under-a-cell"]
    assert told(squares([1.0] * 20), model(strides=(8,)))["objects-under-a-cell"].endswith(
        "cut the images into tiles, and train and predict on those"
    )


def test_width_of_the_prior_and_unequal_sizes() -> None:
    data = squares([40.0] * 40)
    pixels = model(prior_unit="pixels", prior_sigma_px=64.0, denoising_groups=0)
    assert told(data, pixels)["prior-width"].endswith("--model.prior-sigma-px 8 or so")
    assert told(data, dataclasses.replace(pixels, prior_sigma_px=8.0)) == {}
    other = dataclasses.replace(AUGMENTATION, short_sides=(48,))
    assert "belong together" in told(data, model(), other)["resized-otherwise"]


def test_presets_suffice_for_the_built_in_data() -> None:
    run = PRESETS["demo"]()
    tables = [table_of(SyntheticShapes(n, seed)) for n, seed in ((300, 0), (100, 1))]
    assert warnings_of(run, tables[0], tables[1], SyntheticShapes(1).categories) == []


def test_training_does_not_repeat_its_report() -> None:
    flat = squares([40.0] * 20 + [0.0] * 20)
    run = dataclasses.replace(PRESETS["small"](), model=model(), augmentation=AUGMENTATION)
    assert warnings_of(run, flat, squares([40.0] * 20), CLASSES) == []


def test_the_warnings_of_training_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    data = squares(rng.uniform(1, 90, 200_000).tolist(), labels=rng.integers(0, 2, 200_000).tolist())
    run = dataclasses.replace(PRESETS["small"](), model=model(num_queries=4))
    start = time.perf_counter()
    said = warnings_of(run, data, data, CLASSES)
    assert time.perf_counter() - start < 2  # a third of a second on a machine that does nothing else
    assert [line for line in said if line.startswith("training images: an image has 10 objects")]


def export(root: Path, train_images: int = 6) -> dict[str, Any]:
    """A small folder; the annotations of its training images."""
    SyntheticShapes(train_images, 0, image_size=64).export_coco(root, "train")
    SyntheticShapes(3, 1, image_size=64).export_coco(root, "val")
    data: dict[str, Any] = json.loads((root / "annotations" / "train.json").read_text())
    return data


def write(root: Path, data: dict[str, Any], split: str = "train") -> None:
    (root / "annotations" / f"{split}.json").write_text(json.dumps(data))


def check(root: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and findings."""
    status = 0
    try:
        check_data.main([str(root), "--output", str(root / "out"), *more])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return status, json.loads((root / "out" / "findings.json").read_text())


def test_the_command_says_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = export(tmp_path)
    first = data["annotations"][0]
    for number in range(5):
        data["annotations"].append({**first, "id": 900 + number})
    data["categories"].append({"id": 6, "name": "Disc "})
    write(tmp_path, data)
    val = json.loads((tmp_path / "annotations" / "val.json").read_text())
    write(tmp_path, {**val, "categories": data["categories"]}, "val")
    (tmp_path / "val" / "000002.png").write_bytes((tmp_path / "train" / "000004.png").read_bytes())
    status, found = check(tmp_path, "--preset", "demo", "--model.num-queries", "3")
    said = capsys.readouterr().out
    assert status == 0, "nothing of it would end training"
    by_kind = {each["kind"]: each for each in found}
    assert len(by_kind["near-duplicate-boxes"]["entries"]) == 15, "all pairs of six"
    shared = by_kind["shared-images"]["entries"]
    assert [(e["file"], e["other_file"], e["other_image_id"]) for e in shared] == [("000004.png", "000002.png", 2)]
    assert {"class-named-twice", "too-few-queries"} <= by_kind.keys()
    assert "train  6 images" in said
    assert "settings of demo: 3 queries" in said
    assert "warning  train: 15 pairs of boxes of one class that are nearly the same" in said
    assert f"000001.png (id 1), annotation {first['id']} and 900" in said
    assert said.count("… all of them are in findings.json") >= 1
    with Image.open(tmp_path / "out" / "overview.png") as picture:
        assert picture.width == 2400


def test_what_would_end_training_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_data, "draw_data", lambda *_: None)  # a second each
    data = export(tmp_path)
    damaged = tmp_path / "train" / "000003.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    status, found = check(tmp_path)
    (fault,) = [each for each in found if each["level"] == "error"]
    assert (status, fault["kind"], fault["entries"][0]["file"]) == (1, "undecodable-images", "000003.png")
    assert "1 error (training would end)" in capsys.readouterr().out
    status, found = check(tmp_path, "--quick")
    assert (status, [each["kind"] for each in found if each["level"] == "error"]) == (1, ["undecodable-images"])

    damaged.write_bytes(whole)
    write(tmp_path, {**data, "annotations": []})
    status, found = check(tmp_path, "--quick")
    assert (status, [each["kind"] for each in found if each["level"] == "error"]) == (1, ["no-boxes"])

    write(tmp_path, {**data, "categories": data["categories"] + [{"id": 9, "name": "other"}]})
    status, found = check(tmp_path, "--quick")
    assert (status, [each["kind"] for each in found if each["level"] == "error"]) == (1, ["other-categories"])

    write(tmp_path, data)
    (tmp_path / "annotations" / "val.json").unlink()
    status, found = check(tmp_path, "--quick")
    assert (status, [each["kind"] for each in found if each["level"] == "error"]) == (1, ["no-held-out-images"])
    (tmp_path / "annotations" / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match="no annotation file of the split 'train'"):
        check_data.main([str(tmp_path)])
    with pytest.raises(ValueError, match="no preset 'smal': choose one of demo, small"):
        check_data.main([str(tmp_path), "--preset", "smal"])


def test_files_are_named_as_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "draw_data", lambda *_: None)
    export(tmp_path)
    (tmp_path / "annotations").rename(tmp_path / "elsewhere")
    names = ["--val-json", str(tmp_path / "elsewhere/val.json"), "--val-images", str(tmp_path / "val")]
    names += ["--train-json", str(tmp_path / "elsewhere/train.json"), "--train-images", str(tmp_path / "train")]
    check_data.main([*names, "--output", str(tmp_path / "out"), "--quick"])
    assert "no-held-out" not in (tmp_path / "out" / "findings.json").read_text()
    with pytest.raises(SystemExit):
        check_data.main([*names[4:], "--output", str(tmp_path / "out"), "--quick"])
    assert "--val-json FILE" in (tmp_path / "out" / "findings.json").read_text()


def test_training_warns_of_the_same_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "detect", lambda *_: [])  # a new model finds some by chance
    config = tiny(tmp_path / "run", epochs=1)
    train.train(dataclasses.replace(config, model=dataclasses.replace(config.model, num_queries=4)))
    said = capsys.readouterr().out
    assert said.count("warning: training images: an image has 6 objects, but the model has 4 queries") == 1
    assert said.count("AP is zero: ") == said.count("AP is zero: 3 steps are few") == 1


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD blood cells are not at ../shared/data/bccd")
def test_bccd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "draw_data", lambda *_: None)
    check_data.main([str(BCCD), "--output", str(tmp_path)])
    found = {each["kind"]: each for each in json.loads((tmp_path / "findings.json").read_text())}
    assert found.keys() == {"degenerate-boxes", "near-duplicate-boxes", "shared-pictures"}
    (pair,) = found["shared-pictures"]["entries"]
    assert {pair["file"], pair["other_file"]} == {"BloodImage_00037.jpg", "BloodImage_00038.jpg"}, (
        "one view at two focuses"
    )
