"""A prediction depends on the picture alone: not on its batch, its padding, or its place."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from smca.datasets import Batch, CocoDetection, Sample, collate
from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.evaluation import detect, evaluation_loader
from smca.gpu.model import SMCADETR

EXACT = 1e-9
"""Of scores and of boxes in 0–1, in float64: what is left is rounding, however badly a random network is conditioned."""
TOLERANCE = 2e-5
"""The same in float32, for a network that amplifies rounding little."""

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_type": "basic"}
BACKBONES: dict[str, tuple[BackboneConfig, tuple[int, ...]]] = {
    "resnet": (BackboneConfig(options=RESNET, frozen_norm=False), (16,)),
    "resnet, frozen norms": (BackboneConfig(options=RESNET), (8,)),
    "resnet, levels": (BackboneConfig(options=RESNET, frozen_norm=False), (8, 16, 32, 64)),
    "convnext": (BackboneConfig("convnext", {"hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 1, 1]}), (16,)),
    "convnextv2": (BackboneConfig("convnextv2", {"hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 1, 1]}), (16, 32)),
    "swin": (
        BackboneConfig(
            "swin",
            {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64},
        ),
        (16,),
    ),
    "dinov2": (
        BackboneConfig(
            "dinov2",
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 64},
        ),
        (16,),
    ),
}
ENCODERS: list[dict[str, Any]] = [
    {"encoder_layers": 1},
    {"encoder": "conv", "encoder_layers": 1, "halve_finest": True},
    {"encoder": "pyramid_conv", "encoder_layers": 1},
    {"encoder_layers": 0, "halve_finest": True},
]


@functools.cache
def built(backbone: str, changes: tuple[tuple[str, Any], ...]) -> SMCADETR:
    """Building takes longer than all that is done with it."""
    config, strides = BACKBONES[backbone]
    return SMCADETR(
        ModelConfig(
            num_classes=3,
            backbone=config,
            strides=strides,
            hidden_dim=16,
            num_heads=2,
            num_queries=5,
            decoder_layers=2,
            feedforward_dim=16,
            prior_sigma_px=20.0,
            image_short_side=32,
            image_max_size=1000,
            **dict(changes),
        )
    )


def network(backbone: str, seed: int, **changes: Any) -> SMCADETR:
    """A random network whose norms have random statistics: what a trained one may be."""
    model = built(backbone, tuple(changes.items())).eval().double()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    for projection in model.input_proj:  # what is seen should count for more than what the queries bring along
        nn.init.normal_(projection.weight, std=1.0)  # type: ignore[arg-type]
    for module in model.modules():
        if hasattr(module, "running_var"):
            nn.init.normal_(module.running_mean, std=0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.2, 1.5)  # type: ignore[arg-type]
            nn.init.normal_(module.bias, std=0.5)  # type: ignore[arg-type]
    return model


def picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Patches of random colours: noise alone is grey to a network that averages."""
    patches = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    rows, columns = (np.arange(side) // 16 for side in size)
    return patches[rows[:, None], columns]


def sample(image: np.ndarray[Any, Any], image_id: int = 1) -> Sample:
    height, width = image.shape[:2]
    return Sample(image, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), image_id, (height, width))


def padded(batch: Batch, rows: int, columns: int) -> Batch:
    """More padding, in which anything may stand."""
    images = nn.functional.pad(batch.images, (0, columns, 0, rows), value=77)
    mask = nn.functional.pad(batch.padding_mask, (0, columns, 0, rows), value=True)
    return dataclasses.replace(batch, images=images, padding_mask=mask)


@torch.inference_mode()
def last_layer(model: SMCADETR, batch: Batch) -> tuple[Tensor, Tensor]:
    outputs = model(batch.images, batch.padding_mask)
    return outputs["logits"][-1].sigmoid(), outputs["boxes"][-1]


SIZES = st.tuples(st.integers(20, 90), st.integers(20, 90))


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_alone_in_a_batch_and_padded(backbone: str, data: st.DataObject) -> None:
    options: Any = data.draw(st.sampled_from(ENCODERS if "swin" not in backbone else ENCODERS[:1]), label="encoder")
    model = network(backbone, data.draw(st.integers(0, 10**6), label="seed"), **options)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6), label="pictures"))
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=3), label="sizes")
    pictures = [picture(rng, size) for size in sizes]
    rows, columns = data.draw(st.tuples(st.integers(0, 70), st.integers(0, 70)), label="padding")
    order = data.draw(st.permutations(range(len(pictures))), label="order")

    together = padded(collate([sample(pictures[i]) for i in order]), rows, columns)
    scores, boxes = last_layer(model, together)
    for place, index in enumerate(order):
        alone = collate([sample(pictures[index])])
        with torch.inference_mode():
            outputs = model(alone.images)
        assert (outputs["logits"][-1].sigmoid() - scores[place]).abs().max() <= EXACT
        assert (outputs["boxes"][-1] - boxes[place]).abs().max() <= EXACT


@pytest.mark.parametrize("backbone", BACKBONES)
def test_these_networks_see_the_pictures(backbone: str) -> None:
    """Or else nothing would be proved above: a darker picture gives other scores and boxes."""
    model = network(backbone, 0)
    image = picture(np.random.default_rng(0), (64, 64))
    bright, dark = (last_layer(model, collate([sample(each)])) for each in (image, image // 10))
    for a, b in zip(bright, dark, strict=True):
        assert (a - b).abs().max() > 100 * TOLERANCE


def test_images_of_one_size_go_through_the_authors_encoder_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """And come out in their order; no mask is needed."""
    model = network("resnet, levels", 0, **ENCODERS[1])
    rng = np.random.default_rng(0)
    pictures = [picture(rng, size) for size in ((40, 60), (64, 32), (40, 60), (32, 32))]
    seen: list[tuple[int, ...]] = []
    detect_in = model.detect

    def noted(features: Any, valid_sizes: Tensor, *others: Any, padded: bool = True) -> Any:
        assert not padded
        seen.append((len(valid_sizes), *valid_sizes[0].tolist()))
        return detect_in(features, valid_sizes, *others, padded=padded)

    monkeypatch.setattr(model, "detect", noted)
    outputs = model(*(getattr(collate([sample(p) for p in pictures]), name) for name in ("images", "padding_mask")))
    assert sorted(seen) == [(1, 32, 32), (1, 64, 32), (2, 40, 60)]
    assert outputs.keys() == {"logits", "boxes"}
    assert outputs["logits"].shape == (2, 4, 5, 3)


def test_in_training_the_authors_encoder_sees_the_padding() -> None:
    """Behind a backbone that does not: its maps are given."""
    model = network("resnet, levels", 0, encoder="conv", encoder_layers=1)
    torch.manual_seed(0)
    sizes = torch.tensor([[64, 64]])
    features = [
        torch.randn(1, c, 64 // s, 64 // s).double() for c, s in zip(model.backbone.channels, (8, 16, 32), strict=True)
    ]
    larger = [
        nn.functional.pad(x, (0, 64 // s, 0, 64 // s), value=torch.nan)
        for x, s in zip(features, (8, 16, 32), strict=True)
    ]
    with torch.inference_mode():
        alone, beside = model.detect(features, sizes), model.detect(larger, sizes)
    assert beside["boxes"].isfinite().all(), "what padded cells hold does not spread"
    assert (alone["boxes"] - beside["boxes"]).abs().max() > TOLERANCE


def test_in_training_the_backbone_sees_the_padding() -> None:
    """The other half of the claim. If this fails, docs are out of date."""
    model = network("resnet, frozen norms", 0).train()
    image = picture(np.random.default_rng(0), (40, 60))
    batch = padded(collate([sample(image)]), 0, 40)
    alone, beside = last_layer(model, collate([sample(image)])), last_layer(model, batch)
    assert (alone[0] - beside[0]).abs().max() > TOLERANCE


def test_the_evaluation_the_method_and_the_batch_agree() -> None:
    model = network("resnet", 3).float()
    rng = np.random.default_rng(1)
    pictures = [picture(rng, size) for size in ((32, 50), (47, 32), (32, 32), (32, 90))]
    by_method = model.predict(pictures, max_detections=100)
    one_by_one = [model.predict([each], max_detections=100)[0] for each in pictures]
    batches = [collate([sample(p, i) for i, p in enumerate(pictures[:3])]), collate([sample(pictures[3], 3)])]
    by_evaluation = detect(model, batches)
    for index, (a, b) in enumerate(zip(by_method, one_by_one, strict=True)):
        found = sorted((r["score"] for r in by_evaluation if r["image_id"] == index), reverse=True)
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(torch.tensor(found), b.scores, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(a.boxes_xyxy[0], b.boxes_xyxy[0], rtol=0, atol=90 * TOLERANCE)


def test_a_backbone_that_drops_pixels_gets_whole_cells() -> None:
    """ConvNeXt's first layer would leave out what is no multiple of its patches: here the right and lower border."""
    model = network("convnext", 0)
    assert model.backbone.divisor == 16
    assert network("resnet", 0).backbone.divisor == 1
    image = torch.rand(1, 3, 33, 49, dtype=torch.float64)
    changed = image.clone()
    changed[:, :, 32:, 48:] = 1 - changed[:, :, 32:, 48:]
    with torch.inference_mode():
        (before,), (after,) = model.backbone(image), model.backbone(changed)
    assert before.shape[-2:] == (3, 4)
    assert not torch.equal(before, after)


def test_evaluation_batches_have_little_padding_and_every_image_once(tmp_path: Path) -> None:
    """Upright and wide photographs by turns in the file, apart in the batches."""
    images = [(40, 60) if index % 2 else (60, 40) for index in range(8)]
    for index, size in enumerate(images):
        Image.fromarray(picture(np.random.default_rng(index), size)).save(tmp_path / f"{index}.png")
    entries = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(images)]
    truth = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(truth))
    batches = list(evaluation_loader(CocoDetection(tmp_path, tmp_path / "a.json"), network("resnet", 0).config, 4, 0))
    assert not any(batch.padding_mask.any() for batch in batches)
    assert sorted(i for batch in batches for i in batch.image_ids.tolist()) == list(range(8))
