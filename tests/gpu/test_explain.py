"""Why a model says what it says: the numbers are the specification's."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explained_photo import CLASSES, NAME, PHOTO, explained, model
from PIL import Image

from smca.gpu import explain
from smca.gpu.model.explanation import Explanation
from smca.gpu.pictures.explanation import attention_on_image, draw_explanation
from smca.gpu.pictures.files import find_images
from smca.reference import decoder
from smca.reference.attention_forward import attention_weights, multi_scale_smca_attention
from smca.reference.model import forward
from smca.reference.prior import spatial_prior

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "refined": {"query_init": "grid", "box_refinement": True, "decoder_layers": 3},
    "three levels": {"strides": (4, 8, 16), "prior_sigma_px": (8.0, 16.0, 20.0)},
    "levels alike": {"strides": (4, 8), "scale_selection": False, "prior_heads": "shared"},
    "boxes": {"query_init": "anchors", "box_refinement": True, "prior_unit": "box"},
    "dense": {"strides": (4, 8), "cross_attention": "dense", "scale_selection": False},
    "softmax": {"class_scores": "softmax", "prior_scale": "fixed", "pre_norm": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_numbers_are_the_specifications(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, config = model(changes)
    asked, references = [], []

    def noted_prior(state: Any, reference_logits: Any, *others: Any) -> Any:
        references.append(1 / (1 + np.exp(-reference_logits[0, :, :2])))
        return spatial_prior(state, reference_logits, *others)

    def noted(q: Any, levels: Any, level_weights: Any) -> Any:
        asked.append((q, levels, level_weights))
        return multi_scale_smca_attention(q, levels, level_weights)

    monkeypatch.setattr(decoder, "spatial_prior", noted_prior)
    monkeypatch.setattr(decoder, "multi_scale_smca_attention", noted)
    images, _, _ = made._prepared([PHOTO])
    size = np.array([images.shape[2:]])
    with torch.no_grad():
        features = [f.numpy() for f in made.backbone(made.normalize(images, None))]
    expected = forward({name: value.numpy() for name, value in made.state_dict().items()}, features, size, config)
    best = np.argsort(-expected["logits"][-1, 0].max(-1), kind="stable")[:3]

    got = made.explain(PHOTO, most=3)
    assert got.image_size == (50, 77)
    assert got.queries.tolist() == best.tolist()
    close(got.scores, 1 / (1 + np.exp(-expected["logits"][:, 0, best])))
    x, y, w, h = np.moveaxis(expected["boxes"][:, 0, best] * [77, 50, 77, 50], -1, 0)
    close(got.boxes_xyxy, np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1))
    close(got.level_weights, np.stack([weights[0, best] for _, _, weights in asked]))
    if config.cross_attention == "smca":
        close(got.references_xy, np.stack(references)[:, best] * [77, 50])
    for j, stride in enumerate(config.strides):
        cell_xy = np.array([77, 50]) * stride / size[0, ::-1]  # pixels of the photograph per cell
        close(got.cell_sizes_xy[j], cell_xy)
        for m, (q, levels, _) in enumerate(asked):
            k, _, center, precision, shape, mask = levels[j]
            close(got.attention[j][m], per_query(attention_weights(q, k, center, precision, shape, mask), best, shape))
            flat = attention_weights(q, k, center, np.zeros_like(precision), shape, mask)
            close(got.attention_without_prior[j][m], per_query(flat, best, shape))
            if config.cross_attention == "dense":
                assert got.centers_xy is got.sigmas_xy is got.references_xy is None
                continue
            assert got.centers_xy is not None
            assert got.sigmas_xy is not None
            close(got.centers_xy[m, :, :, j], np.moveaxis(center[0][:, best], 0, 1) * cell_xy)
            close(got.sigmas_xy[m, :, :, j], np.moveaxis(precision[0][:, best], 0, 1) ** -0.5 * cell_xy)


def per_query(weights: Any, queries: Any, shape: tuple[int, int]) -> Any:
    """[1, h, N, L] → [Q, h, H, W]."""
    return np.moveaxis(weights[0][:, queries], 0, 1).reshape(len(queries), -1, *shape)


def close(got: Any, want: Any) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_queries_by_number_and_a_model_left_as_it_was() -> None:
    made, _ = model({})
    made.train()
    got = made.explain(PHOTO, queries=[2, 0])
    assert got.queries.tolist() == [2, 0]
    assert made.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
    with pytest.raises(ValueError, match=rf"no query 99: the model has {made.config.num_queries}, numbered from 0"):
        made.explain(PHOTO, queries=[0, 99])
    with pytest.raises(ValueError, match="image 0: "):
        made.explain(np.zeros((2, 3, 4, 5), dtype=np.uint8))


def test_without_a_prior_widths_are_infinite() -> None:
    made, _ = model({})
    with torch.no_grad():
        for layer in made.decoder.layers:
            layer.prior.scale_head.weight.zero_()  # type: ignore[union-attr,operator]
            layer.prior.scale_head.bias.zero_()  # type: ignore[union-attr,operator]
    got = made.explain(PHOTO)
    assert got.sigmas_xy is not None
    assert np.isinf(got.sigmas_xy).all()
    close(got.attention[0], got.attention_without_prior[0])
    assert np.abs(got.attention[0].sum((-1, -2)) - 1).max() < 1e-9


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs/explain.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [f.name for f in dataclasses.fields(Explanation)]


@pytest.fixture(scope="module")
def photo() -> tuple[Explanation, Explanation]:
    return explained()


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_what_does_not_fit_is_left_out(photo: tuple[Explanation, Explanation], monkeypatch: pytest.MonkeyPatch) -> None:
    shown, everyone = photo
    whole, count = explain.page(PHOTO, NAME, shown, everyone, CLASSES)
    monkeypatch.setattr(explain, "PAGE_BYTES", len(whole.encode()) - 200)
    smaller, fewer = explain.page(PHOTO, NAME, shown, everyone, CLASSES)
    assert (count, fewer) == (3, 2)
    assert len(smaller.encode()) < len(whole.encode()) - 200
    assert [d["query"] for d in data_of(smaller)["detections"]] == shown.queries[:2].tolist()


def test_the_command_writes_pages_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = model({"strides": (4, 8)})
    made.float().save_pretrained(tmp_path / "model")
    Image.fromarray(PHOTO).save(tmp_path / "photo.one.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    command = [str(tmp_path / "model"), str(tmp_path / "photo.one.png"), str(tmp_path / "broken.png")]
    with pytest.raises(SystemExit) as stop:
        explain.main([*command, "--output", str(tmp_path / "out"), "--threshold", "0", "--most", "2"])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert re.search(r"0001_photo.one.html: 2 detections, 0\.\d\d MB", out)
    assert "skipped 1 of 2 files:\n  " in err
    assert "broken.png" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001_photo.one.html", "0001_photo.one.png"]
    found = data_of((tmp_path / "out/0001_photo.one.html").read_text(encoding="utf-8"))
    assert len(found["queries"]) == made.config.num_queries
    (best, *_) = made.predict([PHOTO], max_detections=1)
    first = found["detections"][0]
    assert first["scores"][-1] == pytest.approx(float(best.scores[0]), abs=1e-4)
    assert first["label"] == int(best.labels[0])
    assert find_images((tmp_path,), tmp_path) == [tmp_path / "broken.png", tmp_path / "photo.one.png"], "not its own"
    with pytest.raises(SystemExit):
        explain.main([*command, "--most", "0"])
    assert "--most must be at least 1, got 0" in capsys.readouterr().err


def test_attention_on_the_image_is_where_the_model_looks(photo: tuple[Explanation, Explanation]) -> None:
    """All of it is there, and its middle is the cells' own: where every head looks, weighed as the query does."""
    shown, _ = photo
    for prior, levels in ((True, shown.attention), (False, shown.attention_without_prior)):
        heat = attention_on_image(shown, 1, 2, prior=prior)
        assert heat.shape == (130, 200)
        assert heat.sum() == pytest.approx(1)
        middle = np.zeros(2)
        for level, cell_xy, weight in zip(levels, shown.cell_sizes_xy, shown.level_weights[2, 1], strict=True):
            rows, columns = (np.arange(n) + 0.5 for n in level.shape[-2:])
            cells = level[2, 1].mean(0)
            middle += weight * cell_xy * [(cells.sum(0) * columns).sum(), (cells.sum(1) * rows).sum()]
        y, x = ((heat.sum(1 - axis) * (np.arange(heat.shape[axis]) + 0.5)).sum() * 77 / 200 for axis in (0, 1))
        assert np.abs(middle - [x, y]).max() < 4  # pixels: cells of 9 that reach beyond the image are cut there
    picture = draw_explanation(PHOTO, shown, CLASSES)
    assert picture.width > picture.height  # three rows of three layers and the last one without its prior
    blank = draw_explanation(PHOTO, Explanation(**{**vars(shown), "queries": shown.queries[:0]}), CLASSES)
    assert blank.width / blank.height == pytest.approx(77 / 50, abs=0.01)
