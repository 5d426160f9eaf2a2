"""The score thresholds of a model: saved by training and by evaluate, kept by files, and what is drawn from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smca.datasets import SyntheticShapes
from smca.gpu import convert_weights, evaluate, explain, predict, train
from smca.gpu.config import ModelConfig
from smca.gpu.evaluation.operating_point import operating_points
from smca.gpu.files import write_thresholds
from smca.gpu.model import DRAW_THRESHOLD, SMCADETR, draw_thresholds
from smca.gpu.model.encoded import EncodedImage
from smca.gpu.pictures import run as run_pictures
from smca.gpu.training.setup import set_up
from tiny_run import tiny

THRESHOLDS = (0.1, None, 0.25, 1.0, 0.0)
DATA = ["--synthetic.val-images", "2", "--synthetic.image-size", "64", "--workers", "0"]


def found_in(model: Any, loader: Any) -> list[dict[str, Any]]:
    """In place of detections: each object of the data, with a score of 0.6, and another in every corner, with 0.2."""
    truth = loader.dataset.dataset.ground_truth()
    right = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.6} for a in truth["annotations"]]
    return right + [{**entry, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.2} for entry in right]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch whose model seems to find everything."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "detect", found_in)
        train.train(tiny(output, epochs=1))
    return output


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's model, with thresholds."""
    shutil.copytree(run / "model", tmp_path / "model")
    write_thresholds(tmp_path / "model", THRESHOLDS)
    return tmp_path / "model"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def changed(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


# Training


def test_training_saves_thresholds_with_its_models(run: Path) -> None:
    data = set_up(tiny(run), 0, 1, None, None, None).val_data
    there = {a["category_id"] for a in data.ground_truth()["annotations"]}
    expected = [0.4 if category in there else None for category in config_of(run / "model")["category_ids"]]
    for folder in ("model", "model_last"):
        assert config_of(run / folder)["score_thresholds"] == pytest.approx(expected)


def test_a_run_goes_on_whatever_thresholds_it_has(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    shutil.copytree(run, output)
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    config = json.loads(state["config"])
    assert config.pop("score_thresholds") is None, "a run that goes on is compared by what it was configured as"
    torch.save({**state, "config": json.dumps(config)}, output / "checkpoint.pt")  # of a version without the field
    monkeypatch.setattr(train, "detect", lambda *_: [])
    train.train(tiny(output, epochs=2, resume=True, resume_changed=True))
    assert config_of(output / "model_last")["score_thresholds"] == [None] * 5
    assert config_of(output / "model")["score_thresholds"] == config_of(run / "model")["score_thresholds"], "the best"


def test_a_start_from_a_model_takes_no_thresholds_over(model: Path, tmp_path: Path) -> None:
    base = tiny(tmp_path / "run", init=str(model))
    with_others = dataclasses.replace(base, model=ModelConfig.from_json((model / "config.json").read_text()))
    for config in (base, with_others):
        started = set_up(config, 0, 1, None, None, None)
        assert started.model.config.score_thresholds is started.config.model.score_thresholds is None


# Files


def test_thresholds_survive_saving_loading_and_converting(model: Path, tmp_path: Path) -> None:
    loaded = SMCADETR.from_pretrained(model)
    assert loaded.config.score_thresholds == THRESHOLDS
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(model)
    convert_weights.main([str(model), str(tmp_path / "converted")])
    assert SMCADETR.from_pretrained(tmp_path / "converted").config.score_thresholds == THRESHOLDS


def test_a_configuration_without_thresholds_still_loads(model: Path) -> None:
    config = config_of(model)
    del config["score_thresholds"]
    (model / "config.json").write_text(json.dumps(config))
    assert SMCADETR.from_pretrained(model).config.score_thresholds is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5], r"model\.score_thresholds must be None, or num_classes = 5 long, got 1"),
        ([0.5] * 4 + [1.5], r"model\.score_thresholds must be None or in \[0, 1\] each, got 1\.5"),
        ([0.5] * 4 + [-0.1], r"in \[0, 1\] each, got -0\.1"),
        ([0.5] * 4 + [float("nan")], r"score_thresholds\[4\] must be a finite number"),
        (["0.5"] * 5, r"score_thresholds\[0\] must be a finite number"),
        (0.5, r"score_thresholds must be a list"),
    ],
)
def test_damaged_thresholds_are_refused(model: Path, value: Any, message: str) -> None:
    changed(model, score_thresholds=value)
    with pytest.raises(ValueError, match=rf"^{model}/config\.json: .*{message}"):
        SMCADETR.from_pretrained(model)


def test_writing_thresholds_changes_nothing_else(model: Path) -> None:
    before = config_of(model)
    write_thresholds(model, (0.5,) * 5)
    assert config_of(model) == before | {"score_thresholds": [0.5] * 5}
    with pytest.raises(ValueError, match="num_classes = 5 long, got 2"):
        write_thresholds(model, (0.5, 0.5))
    assert config_of(model)["score_thresholds"] == [0.5] * 5
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


# Commands


def test_evaluate_saves_thresholds_only_when_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "detect", found_in)
    before = {path: path.read_bytes() for path in model.iterdir()}
    evaluate.main([str(model), *DATA, "--errors", str(tmp_path / "new" / "errors")])
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    written = {path.name for path in (tmp_path / "new/errors").iterdir()}
    assert {"errors.json", "precision_recall.png", "confusion.png"} <= written
    errors = json.loads((tmp_path / "new/errors/errors.json").read_text())
    assert errors.keys() == {"thresholds", "precision_recall", "confusion", "causes"}
    sheets = {f"{error['kind']}-{error['cause']}.png" for error in errors["causes"]["errors"]}
    assert sheets
    assert written == {"errors.json", "precision_recall.png", "confusion.png", *sheets}
    said = capsys.readouterr().out
    assert "at the score of best F1, IoU 0.50:" in said
    assert f"errors written to {tmp_path / 'new/errors'}/" in said
    evaluate.main([str(tmp_path), *DATA, "--save-thresholds"])  # the folder of a run
    assert f"thresholds written to {model / 'config.json'}" in capsys.readouterr().out
    saved = dict(zip(config_of(model)["class_names"], config_of(model)["score_thresholds"], strict=True))
    assert saved == {name: point and point["threshold"] for name, point in errors["thresholds"].items()}
    assert 0.4 in saved.values()


@pytest.mark.parametrize("name", ["somebody/a-model", "checkpoint"])
def test_thresholds_are_saved_in_local_models_only(name: str, run: Path) -> None:
    given = str(run / "checkpoint.pt") if name == "checkpoint" else name
    with pytest.raises(ValueError, match=rf"{given} has no config\.json to write into: give the folder of a model"):
        evaluate.main([given, *DATA, "--save-thresholds"])


def test_one_rule_says_what_is_drawn() -> None:
    config = ModelConfig(num_classes=5, score_thresholds=THRESHOLDS)
    assert draw_thresholds(config).tolist() == [0.1, DRAW_THRESHOLD, 0.25, 1.0, 0.0]
    assert draw_thresholds(config, 0.0).tolist() == [0.0] * 5
    assert draw_thresholds(ModelConfig(num_classes=2)).tolist() == [DRAW_THRESHOLD] * 2


def in_the_middle(folder: Path, image: Image.Image) -> None:
    """Save thresholds that about half of the detections in an image reach, other ones for each class."""
    detected = SMCADETR.from_pretrained(folder).predict([image])[0]
    middle = [detected.scores[detected.labels == label].median().item() for label in range(5)]
    write_thresholds(folder, tuple(middle))


def test_predict_draws_and_writes_from_the_models_thresholds(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.fromarray(SyntheticShapes(1, 0, image_size=64)[0].image)
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images/a.png")
    in_the_middle(model, image)
    thresholds = dict(zip(range(1, 6), config_of(model)["score_thresholds"], strict=True))

    def found(*options: str) -> list[dict[str, Any]]:
        predict.main([str(model), str(tmp_path / "images"), "--output", str(tmp_path / "out"), *options])
        results: list[dict[str, Any]] = json.loads((tmp_path / "out/results.json").read_text())
        return results

    everything, by_default = found("--threshold", "0"), found()
    assert by_default == [r for r in everything if r["score"] >= thresholds[r["category_id"]]]
    assert any(r["score"] == thresholds[r["category_id"]] for r in by_default), "the threshold itself is drawn"
    assert 5 <= len(by_default) < len(everything)
    assert found("--threshold", "1") == []
    changed(model, score_thresholds=None)
    assert found() == [r for r in everything if r["score"] >= DRAW_THRESHOLD]
    with pytest.raises(SystemExit):
        found("--threshold", "1.5")
    assert "--threshold must be in [0, 1], got 1.5" in capsys.readouterr().err


def test_explain_shows_from_the_models_thresholds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "draw_explanation", lambda *_: Image.new("RGB", (8, 8)))
    Image.fromarray(SyntheticShapes(1, 0, image_size=64)[0].image).save(tmp_path / "a.png")

    pages: list[list[int]] = []
    page = explain.page

    def noted(image: Any, name: str, shown: Any, *others: Any) -> Any:
        pages.append([int(query) for query in shown.queries])
        return page(image, name, shown, *others)

    monkeypatch.setattr(explain, "page", noted)

    def shown(*options: str) -> list[int]:
        explain.main([str(model), str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), *options])
        return pages[-1]

    whole = EncodedImage.explain
    scores, labels = np.linspace(0.9, 0.2, 8)[[3, 0, 7, 5, 1, 6, 2, 4]], np.array([0, 1, 2, 3, 1, 0, 4, 2])

    def with_scores(self: EncodedImage, *args: Any, **options: Any) -> Any:
        """In place of a model that is hardly trained and calls everything by one name."""
        found = whole(self, *args, **options)
        if not options.get("maps", True):
            found.scores[-1] = np.where(labels[:, None] == range(5), scores[:, None], 0.0)
        return found

    monkeypatch.setattr(EncodedImage, "explain", with_scores)
    order, best = [int(n) for n in (-scores).argsort()], labels[scores.argmax()]
    write_thresholds(model, tuple(1.0 if label == best else 0.0 for label in range(5)))
    others = [n for n in order if labels[n] != best]
    assert shown() == others
    assert shown("--most", "2") == others[:2], "the best of those that are shown"
    assert shown("--threshold", "0") == order
    write_thresholds(model, (None,) * 5)
    assert shown() == [n for n in order if scores[n] >= DRAW_THRESHOLD]


def test_a_runs_pictures_are_drawn_from_the_models_thresholds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SyntheticShapes(1, 0, image_size=64)
    in_the_middle(model, Image.fromarray(data[0].image))
    drawn: list[int] = []
    draw = run_pictures.draw_detections

    def counted(*args: Any, **options: Any) -> Any:
        drawn.append(len(args[1]))
        return draw(*args, **options)

    monkeypatch.setattr(run_pictures, "draw_detections", counted)
    line = {"epoch": 1, "loss": 1.0, "ap": 0.0, "ap50": 0.0, "train_seconds": 1.0}
    loaded = SMCADETR.from_pretrained(model)
    run_pictures.draw_run(loaded, data, [line], tmp_path)
    found = loaded.predict([data[0].image])[0]
    assert drawn == [len(found.reaching(draw_thresholds(loaded.config)).scores)]
    assert 5 <= drawn[0] < len(found.scores)


def test_a_threshold_between_neighbouring_scores_tells_them_apart() -> None:
    """Scores are float32; a threshold midway between two of them is none, and is compared in float64."""
    low, high = 0.5, torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    box = {"image_id": 1, "category_id": 1}
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{**box, "bbox": [0, 0, 9, 9]}],
    }
    found = [{**box, "bbox": [0, 0, 9, 9], "score": high}, {**box, "bbox": [50, 50, 9, 9], "score": low}]
    point = operating_points(truth, found)[1]
    assert point is not None
    thresholds = draw_thresholds(ModelConfig(num_classes=1, score_thresholds=(point.threshold,)))
    assert (torch.tensor([high, low]) >= thresholds[torch.tensor([0, 0])]).tolist() == [True, False]
