"""evaluate and predict on a model fresh from training's format; saving and loading; backbones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smca.datasets import SyntheticShapes
from smca.gpu import evaluate, predict
from smca.gpu.config import ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.presets import tiny_resnet

NAMES = ("disc", "rectangle", "triangle", "ring", "cross")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose classes are those of the built-in data."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_classes=5,
        class_names=NAMES,
        category_ids=(1, 2, 3, 4, 5),
        backbone=tiny_resnet(1, 1),
        strides=(8,),
        hidden_dim=16,
        num_heads=2,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=1,
        feedforward_dim=16,
        prior_sigma_px=10.0,
        image_short_side=64,
        image_max_size=96,
    )
    directory = tmp_path_factory.mktemp("model")
    SMCADETR(config).save_pretrained(directory)
    return directory


def test_save_and_load_give_the_same_model(model_dir: Path) -> None:
    first, second = SMCADETR.from_pretrained(model_dir), SMCADETR.from_pretrained(str(model_dir))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(first(images)["logits"], second(images)["logits"])
    assert first.config == second.config
    assert not first.training


def test_weights_that_do_not_fit_are_named(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_queries": 7}))
    with pytest.raises(ValueError, match=r"decoder\.query_position is \(6, 16\), the model needs \(7, 16\)"):
        SMCADETR.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_quarries": 7}))
    with pytest.raises(ValueError, match=r"unknown keys .'num_quarries'"):
        SMCADETR.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        SMCADETR.from_pretrained(tmp_path)


def test_predict_gives_pixels_of_the_original_image(model_dir: Path) -> None:
    model = SMCADETR.from_pretrained(model_dir)
    small = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    # The same picture at three times the size: the network sees almost the same pixels, boxes are three times as large.
    large = small.repeat(3, axis=0).repeat(3, axis=1)
    a, b = model.predict([small, Image.fromarray(large)], max_detections=6)
    assert a.boxes_xyxy.shape == (6, 4)
    assert (a.boxes_xyxy[:, 2] <= 80).all()
    assert (b.boxes_xyxy[:, 2] <= 240).all()
    torch.testing.assert_close(a.boxes_xyxy.mean(0) * 3, b.boxes_xyxy.mean(0), rtol=0.05, atol=2.0)
    assert (a.scores.diff() <= 0).all()
    assert model.predict([]) == []
    with pytest.raises(ValueError, match=r"image 1: expected a PIL image, or an array"):
        model.predict([small, np.zeros((4, 4))])


def test_predict_command_writes_pictures_and_results_and_reports_bad_files(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    Image.new("RGB", (90, 60), "red").save(images / "a.png")
    Image.new("L", (50, 70)).save(images / "deeper" / "b.JPG", "JPEG")
    (images / "broken.jpg").write_bytes(b"not an image")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        predict.main([str(model_dir), str(images), "--output", str(out), "--threshold", "0"])
    assert stopped.value.code == 1, "a file that could not be read must show in the exit status"
    said = capsys.readouterr()
    assert "skipped 1 of 3 files:\n  cannot read" in said.err
    assert "broken.jpg: not a picture of a known format" in said.err
    assert " objects in 2 images → " in said.out
    assert {p.suffix for p in out.iterdir()} == {".png", ".json"}
    assert len(list(out.glob("*.png"))) == 2
    results = json.loads((out / "results.json").read_text())
    assert {Path(r["file_name"]).name for r in results} == {"a.png", "b.JPG"}
    assert {"image_id", "category_id", "bbox", "score"} <= results[0].keys()
    assert {r["category_id"] for r in results} <= {1, 2, 3, 4, 5}
    with pytest.raises(FileNotFoundError, match="no image or folder at"):
        predict.main([str(model_dir), str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        predict.main([str(model_dir), str(tmp_path / "empty")])


def test_the_command_and_the_method_read_a_picture_alike(model_dir: Path, tmp_path: Path) -> None:
    """Turned by EXIF, of 16 bits, with a palette: as a viewer shows it, whichever way it comes in."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 64), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90° to view"
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels).convert("RGB").quantize(200).save(tmp_path / "b.png", exif=exif)
    predict.main([str(model_dir), str(tmp_path), "--output", str(tmp_path / "out"), "--threshold", "0"])
    model = SMCADETR.from_pretrained(model_dir)
    by_command = json.loads((tmp_path / "out" / "results.json").read_text())
    for number, name in enumerate(("a.png", "b.png"), start=1):
        (by_method,) = model.predict([Image.open(tmp_path / name)])
        boxes = [r["bbox"] for r in by_command if r["image_id"] == number]
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes])
        torch.testing.assert_close(corners, by_method.boxes_xyxy, rtol=0, atol=1e-3)
    upright = np.rot90(pixels, -1)[..., None].repeat(3, axis=2)
    (as_array,) = model.predict([upright])
    (as_file,) = model.predict([Image.open(tmp_path / "a.png")])
    assert torch.equal(as_array.boxes_xyxy, as_file.boxes_xyxy)


def test_predict_does_not_take_its_own_pictures_as_input(model_dir: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 50), "blue").save(tmp_path / "a.png")
    for output in ("predictions", "others"):
        predict.main([str(model_dir), str(tmp_path), "--output", str(tmp_path / output), "--threshold", "0"])
        predict.main([str(model_dir), str(tmp_path), "--output", str(tmp_path / output), "--threshold", "0"])
        assert [p.name for p in (tmp_path / output).glob("*.png")] == ["0001_a.png"]
    for _ in range(2):  # images and results in one folder
        predict.main([str(model_dir), str(tmp_path), "--output", str(tmp_path), "--threshold", "0"])
        assert sorted(p.name for p in tmp_path.glob("*.png")) == ["0001_a.png", "a.png"]
    predict.main([str(model_dir), str(tmp_path / "others/0001_a.png"), "--output", str(tmp_path / "named")])


def test_what_was_found_is_kept_when_predict_is_stopped(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        Image.new("RGB", (60, 50), "blue").save(tmp_path / f"{name}.png")
    read = predict.read_image

    def stop_at_c(path: Path) -> Any:
        if path.name == "c.png":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(predict, "read_image", stop_at_c)
    with pytest.raises(KeyboardInterrupt):
        predict.main([str(model_dir), str(tmp_path), "--output", str(tmp_path / "out"), "--threshold", "0"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {Path(r["file_name"]).name for r in results} == {"a.png", "b.png"}
    assert "in 2 images of 3; the others were not looked at" in capsys.readouterr().out


def test_a_network_that_gives_nan_does_not_say_that_there_is_nothing(model_dir: Path) -> None:
    model = SMCADETR.from_pretrained(model_dir)
    with torch.no_grad():
        model.decoder.class_head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="the network's output is not finite"):
        model.predict([np.zeros((64, 64, 3), np.uint8)])


def test_evaluate_reads_any_file_and_writes_its_ids(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = SyntheticShapes(2, 0, image_size=64).export_coco(tmp_path, "train")
    data = json.loads(annotations.read_text())
    for table, key in (("images", "id"), ("annotations", "image_id")):
        for entry in data[table]:
            entry[key] = f"picture-{entry[key]}"
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    (tmp_path / "elsewhere.json").write_text(json.dumps(data))
    arguments = [str(model_dir), "--json", str(tmp_path / "elsewhere.json"), "--images", str(images), "--workers", "0"]
    with pytest.raises(ValueError, match="look like two corners"):
        evaluate.main(arguments)
    options = ["--annotations.box-format", "xyxy", "--output", str(tmp_path / "found.json")]
    evaluate.main([*arguments, *options])
    assert "ids written as text" not in capsys.readouterr().out, "a text that is no number is an id as it is"
    assert {r["image_id"] for r in json.loads((tmp_path / "found.json").read_text())} == {"picture-1", "picture-2"}


def test_evaluate_command(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    evaluate.main(
        [
            str(model_dir),
            "--synthetic.val-images",
            "3",
            "--synthetic.image-size",
            "64",
            "--workers",
            "0",
            "--output",
            str(results),
        ]
    )
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)
    assert len(json.loads(results.read_text())) == 3 * 6 * 5, (
        "every (query, class) pair of three images, at most 100 each"
    )


def test_evaluate_refuses_other_categories(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "class_names": ["a", "b", "c", "d", "e"]}))
    (tmp_path / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="are not those of synthetic"):
        evaluate.main([str(tmp_path), "--synthetic.val-images", "2", "--workers", "0"])
