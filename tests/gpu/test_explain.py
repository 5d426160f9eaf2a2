"""Why a model says what it says: the numbers are the specification's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smca.conformance.implementations.pytorch import production_config
from smca.conformance.inputs.model import SMALL
from smca.gpu.model import SMCADETR
from smca.gpu.model.explanation import Explanation
from smca.reference import decoder
from smca.reference.attention_forward import attention_weights, multi_scale_smca_attention
from smca.reference.model import forward
from smca.reference.prior import spatial_prior

PHOTO = np.random.default_rng(0).integers(0, 256, (50, 77, 3), dtype=np.uint8)
"""Neither side a multiple of a stride, and the network's input another size."""
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "refined": {"query_init": "grid", "box_refinement": True, "decoder_layers": 3},
    "three levels": {"strides": (4, 8, 16), "prior_sigma_px": (8.0, 16.0, 20.0)},
    "levels alike": {"strides": (4, 8), "scale_selection": False, "prior_heads": "shared"},
    "boxes": {"query_init": "anchors", "box_refinement": True, "prior_unit": "box"},
    "dense": {"strides": (4, 8), "cross_attention": "dense", "scale_selection": False},
    "softmax": {"class_scores": "softmax", "prior_scale": "fixed", "pre_norm": True},
}


def model(changes: dict[str, Any]) -> tuple[SMCADETR, Any]:
    config = dataclasses.replace(SMALL, **changes)
    torch.manual_seed(0)
    sizes = {"image_short_side": 45, "image_max_size": 90}
    made = SMCADETR(dataclasses.replace(production_config(config), **sizes)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # zeros at the start would hide what multiplies them
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made, config


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
