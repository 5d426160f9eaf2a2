"""The queries' Gaussians as a run trains: numbers, tags and the picture; and a run that does not notice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explained_photo import PHOTO, model
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smca.datasets import SyntheticShapes
from smca.gpu import train
from smca.gpu.model import SMCADETR
from smca.gpu.model.explanation import Explanation
from smca.gpu.model.prior_statistics import measure
from smca.gpu.pictures.priors import draw_priors
from smca.gpu.training import priors
from smca.gpu.training.priors import PRIORS_FILE, PRIORS_PICTURE, read_priors
from smca.gpu.training.resume import clear
from tiny_run import tiny


class OneAnswer:
    """Stands in for a model, of one layer, two queries, one head and two levels of strides 8 and 16."""

    class config:
        decoder_strides = (8, 16)
        num_queries = 2

    def explain(self, image: Any, *, queries: Any, maps: bool) -> Explanation:
        """Of an image of 100×200 pixels, which the network sees at half its size: 6.25×12.5 cells of 16 pixels."""
        assert list(queries) == [0, 1]
        assert not maps
        return Explanation(
            image_size=(100, 200),
            cell_sizes_xy=np.array([[16.0, 16.0], [32.0, 32.0]]),
            queries=np.arange(2),
            scores=np.array([[[0.1, 0.9], [0.3, 0.2]]]),
            boxes_xyxy=np.array([[[0, 0, 40, 10], [0, 0, 20, 20]]], dtype=float),
            level_weights=np.array([[[0.5, 0.5], [1.0, 0.0]]]),
            attention=[],
            attention_without_prior=[],
            references_xy=np.zeros((1, 2, 2)),
            centers_xy=np.array([[[[[40, 50], [60, 50]]], [[[100, 25], [0, 0]]]]], dtype=float),
            sigmas_xy=np.array([[[[[4, 16], [10, 40]]], [[[30, 30], [2, 2]]]]], dtype=float),
        )


def test_a_case_by_hand() -> None:
    found = measure(OneAnswer(), [PHOTO], 0)  # type: ignore[arg-type]
    assert (found["images"], found["strides"]) == (1, [8, 16])
    (layer,) = found["layers"]
    # Widths √(σx·σy) 8 and 20, 30 and 2 pixels of the photograph, of which the network has half as many.
    # They weigh 0.9·0.5 twice, 0.3·1 and nothing.
    assert layer["sigma_px"] == [[4.0, 4.0, 15.0], [10.0, 10.0, 10.0]]
    assert layer["sigma_of_box"] == [0.4, 1.0, 1.5]  # boxes of √(40·10) = 20 and √(20·20) = 20: 0.4, 1, 1.5
    # The first query's mean is (50, 50), the second's (100, 25): 0.25 apart along both axes of an image of 200×100.
    assert layer["spread"] == 0.125
    assert found["map"]["scores"] == [0.9, 0.3]
    first, second = found["map"]["queries"][0]
    x, y = np.sqrt((4**2 + 10**2) / 2 + 10**2) / 200, np.sqrt((16**2 + 40**2) / 2) / 100
    assert first == pytest.approx([0.25, 0.5, x, y], rel=1e-3)
    assert second == [0.5, 0.25, 0.15, 0.3]


def test_all_queries_count_and_flat_priors_have_no_width() -> None:
    made, _ = model({"strides": (4, 8), "decoder_layers": 3})
    found = measure(made, [PHOTO, PHOTO[:40]], 1)
    assert np.shape([layer["sigma_px"] for layer in found["layers"]]) == (3, 2, 3)
    assert found["map"]["layers"] == [0, 2]
    assert np.shape(found["map"]["queries"]) == (2, made.config.num_queries, 4)
    seen = made.explain(PHOTO, queries=[1], maps=False)
    assert seen.sigmas_xy is not None
    with torch.no_grad():
        for layer in made.decoder.layers:
            layer.prior.scale_head.weight.zero_()  # type: ignore[union-attr,operator]
            layer.prior.scale_head.bias.zero_()  # type: ignore[union-attr,operator]
    flat = measure(made, [PHOTO], 0)
    assert flat["layers"][0]["sigma_px"] == [[None] * 3] * 2
    assert np.isfinite(np.array(flat["map"]["queries"], dtype=float)[..., :2]).all()


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


class Mine:
    """A tracker of one's own, which takes no pictures."""

    def __init__(self) -> None:
        self.told: dict[int, dict[str, float]] = {}

    def start(self, first_step: int, settings: Mapping[str, Any]) -> None: ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.told[step] = {name: value for name, value in values.items() if name.startswith("priors/")}

    def flush(self) -> None: ...

    def finish(self, failed: bool) -> None: ...


def test_a_run_leaves_picture_and_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(priors, "draw_priors", draw_priors)
    tracker, config = Mine(), tiny(tmp_path, optim=dataclasses.replace(tiny(tmp_path).optim, ema_decay=0.5))
    train.train(config, trackers=[tracker])
    said = capsys.readouterr().out
    assert "told nothing more" not in said
    assert "priors.png        where the queries look" in said
    with Image.open(tmp_path / PRIORS_PICTURE) as picture:
        assert picture.width > 900
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20, "it is blank"
    assert (tmp_path / PRIORS_PICTURE).stat().st_size < 300_000
    lines, events = read_priors(tmp_path), board(tmp_path)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    for line in lines:
        expected = {}
        for number, layer in enumerate(line["layers"], 1):
            expected[f"priors/sigma_px/layer{number}"] = layer["sigma_px"][0][1]
            expected[f"priors/sigma_of_box/layer{number}"] = layer["sigma_of_box"][1]
            expected[f"priors/spread_of_centers/layer{number}"] = layer["spread"]
        assert tracker.told[line["step"]] == expected
        points = {tag: e.value for tag in expected for e in events.Scalars(tag) if e.step == line["step"]}
        assert points == pytest.approx(expected)
    assert [image.step for image in events.Images("priors")] == [3, 6]
    # What is measured are the averaged weights, which are those that are saved, on all images that have objects.
    saved = SMCADETR.from_pretrained(tmp_path / "model_last")
    data = SyntheticShapes(config.synthetic.val_images, 1, image_size=64)
    images = [data[i].image for i in range(len(data)) if len(data[i].boxes_xyxy)]
    assert measure(saved, images, 0)["layers"] == lines[-1]["layers"]


def test_training_does_not_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are the same bits without it; nothing is drawn from a generator, and the model is left as it was."""
    states = []

    def state(run: Any) -> Any:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.trained.modules())
        modes = [m.training for m in run.trained.modules()]
        legacy = str(np.random.get_state())  # noqa: NPY002 - not to be drawn from either
        return torch.get_rng_state().tolist(), legacy, random.getstate(), hooks, modes

    def watched(run: Any, evaluated: Any) -> None:
        before = state(run)
        priors.note_priors(run, evaluated)
        states.append((before, state(run)))

    weights = {}
    for name, note in (("with", watched), ("without", lambda *_: None)):
        monkeypatch.setattr(train, "note_priors", note)
        config = tiny(tmp_path / name)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))
        weights[name] = load_file(train.train(config).parent / "model_last/model.safetensors")
        assert (tmp_path / name / PRIORS_FILE).exists() == (name == "with")
    assert len(states) == 2
    assert all(before == after for before, after in states)
    assert all(torch.equal(value, weights["without"][name]) for name, value in weights["with"].items())


def test_a_model_without_prior_has_none(tmp_path: Path) -> None:
    config = tiny(tmp_path, max_steps=1)
    dense = dataclasses.replace(config.model, cross_attention="dense", prior_unit="pixels")
    train.train(dataclasses.replace(config, model=dense))
    assert not list(tmp_path.glob("priors*"))
    assert not [tag for tag in board(tmp_path).Tags()["scalars"] if "priors" in tag]
    assert board(tmp_path).Tags()["images"] == []


def test_a_run_that_goes_on_keeps_its_earlier_epochs(tmp_path: Path) -> None:
    """And drops what was measured in a run that was cut off; --overwrite drops all."""
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    optim = dataclasses.replace(tiny(whole).optim, schedule="step")
    train.train(tiny(whole, epochs=2, optim=optim))
    train.train(tiny(cut, epochs=1, optim=optim))
    lost = {**read_priors(cut)[0], "epoch": 2, "step": 5}
    (cut / PRIORS_FILE).write_text((cut / PRIORS_FILE).read_text() + json.dumps(lost) + "\n")
    train.train(tiny(cut, epochs=2, optim=optim, resume=True))
    assert [line["step"] for line in read_priors(cut)] == [3, 6]
    assert (cut / PRIORS_FILE).read_bytes() == (whole / PRIORS_FILE).read_bytes()
    tag = "priors/sigma_px/layer1"
    points = [[(e.step, e.value) for e in board(folder).Scalars(tag)] for folder in (whole, cut)]
    assert points[0] == points[1]
    assert [step for step, _ in points[0]] == [3, 6]
    assert [image.step for image in board(cut).Images("priors")] == [3, 6]
    clear(cut)
    assert not list(cut.glob("priors*"))
    (cut / PRIORS_FILE).write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match=r"priors\.jsonl, line 1: expected an object with .* remove the file"):
        read_priors(cut)


def test_a_long_run_keeps_maps_of_epochs_evenly_apart() -> None:
    lines: list[dict[str, Any]] = []
    for epoch in range(1, 101):  # as they come, one by one
        lines = priors._thinned([*lines, {"epoch": epoch, "map": {}}])
        kept = [line["epoch"] for line in lines if "map" in line]
        assert len(lines) == epoch
        assert len(kept) <= priors.MAPS + 1
        assert kept[0] == 1
        assert kept[-1] == epoch
        assert epoch <= priors.MAPS or len(kept) > priors.MAPS / 2
        apart = {after - before for before, after in itertools.pairwise(kept[:-1])}
        assert len(apart) <= 1, kept


def test_the_picture_shows_what_was_found(tmp_path: Path) -> None:
    made, _ = model({"strides": (4, 8, 16), "prior_sigma_px": (8.0, 16.0, 20.0), "decoder_layers": 1})
    red = []
    for score, shape in ((0.0, (60, 200)), (0.9, (200, 60))):
        image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
        line = {"epoch": 1, "step": 1, **measure(made, [image], 0)}
        line["map"]["scores"] = [score] * made.config.num_queries
        line["map"]["queries"] = [[[0.5, 0.5, 0.2, 0.2]] * made.config.num_queries]
        line["map"]["queries"][0][0] = [0.5, 0.5, None, 0.2]  # a flat prior has a centre
        draw_priors([line], image, np.array([[10.0, 10, 50, 50]]), tmp_path / "priors.png")
        with Image.open(tmp_path / "priors.png") as picture:
            r, g, b = np.asarray(picture.convert("RGB"), dtype=int).transpose(2, 0, 1)
        red.append(int(((r > 150) & (g < 90) & (b < 90)).sum()))
    assert 0 < 2 * red[0] < red[1], "beside the legend's dot"
