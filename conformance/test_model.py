"""One set of random weights through the oracle and through SMCADETR: logits and boxes agree (docs/method.md §1 to §5)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from smca.conformance.tolerances import assert_close
from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.model import SMCADETR
from smca.reference.model import forward

BACKBONE = BackboneConfig(
    options={"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}, frozen_norm=False
)
SMALL: dict[str, Any] = {
    "backbone": BACKBONE,
    "strides": (8,),
    "num_classes": 3,
    "hidden_dim": 24,
    "num_heads": 3,
    "num_queries": 5,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "feedforward_dim": 20,
    "prior_sigma_px": 10.0,
}
DENSE: list[dict[str, Any]] = [
    {"cross_attention": "dense", "pre_norm": p, "box_refinement": r} for p in (False, True) for r in (False, True)
]
SMCA: list[dict[str, Any]] = [
    {"pre_norm": p, "box_refinement": r, "query_init": c, "prior_scale": s}
    for p, (r, c), s in itertools.product(
        (False, True), ((False, "random"), (True, "grid")), ("fixed", "single", "independent")
    )
]
# Two levels of the backbone and one made beyond them; images of 33×47 pixels have maps of 9×12, 5×6 and 3×3 cells: no nesting.
MULTI: list[dict[str, Any]] = [
    {"strides": (4, 8, 16), **options}
    for options in (
        {"cross_level_blocks": (1,)},
        {"cross_level_blocks": (0, 1), "cross_attention": "dense"},
        {"cross_attention": "dense", "scale_selection": False, "pre_norm": True},
        {"encoder": "conv"},
        {"encoder": "conv", "pre_norm": True, "query_init": "grid", "box_refinement": True},
        {"scale_selection": False, "prior_scale": "fixed"},
        {"prior_heads": "shared", "prior_scale": "single", "cross_level_blocks": (0,)},
        {"strides": (4, 8, 16, 32), "pre_norm": True, "box_refinement": True},
        {"strides": (8, 16), "encoder": "conv"},
    )
]
ONE_LEVEL: list[dict[str, Any]] = [{"encoder": "conv"}, {"prior_heads": "shared"}]
# Sizes in pixels of the unpadded images in a batch: padded in both directions, not multiples of the stride; and unpadded.
BATCHES = {"padded": [(37, 61), (64, 24), (8, 8)], "unpadded": [(40, 56), (40, 56)], "odd": [(33, 47), (17, 47)]}


def random_model(options: dict[str, Any], backend: str, dtype: torch.dtype) -> SMCADETR:
    """A model all of whose parameters are random: zeros at the start would hide what multiplies them."""
    torch.manual_seed(0)
    model = SMCADETR(ModelConfig(**{**SMALL, **options}), attention_backend=backend).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def random_batch(sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(len(sizes), 3, height, width, generator=generator, dtype=torch.float64)
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for index, (h, w) in enumerate(sizes):
        mask[index, :h, :w] = False
    return images, mask


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", ["eager", "lifted"])
@pytest.mark.parametrize("options", DENSE + SMCA + ONE_LEVEL + MULTI, ids=lambda o: "-".join(map(str, o.values())))
def test_logits_and_boxes_equal_the_oracle(options: dict[str, Any], backend: str, batch: str) -> None:
    images, mask = random_batch(BATCHES[batch])
    expected = None
    for dtype in ("float64", "float32"):
        model = random_model(options, backend, getattr(torch, dtype))
        with torch.no_grad():
            got = model(images.to(getattr(torch, dtype)), mask if mask.any() else None)
            if expected is None:
                features = [f.numpy() for f in model.backbone(model.normalize(images, mask))]
                params = {name: value.numpy() for name, value in model.state_dict().items()}
                expected = forward(params, features, np.array(BATCHES[batch]), model.config)
        for name in ("logits", "boxes"):
            assert_close(got[name], expected[name], "model", dtype, f"{backend}, {batch}: {name} as the oracle's")


def test_uint8_and_float_images_are_the_same() -> None:
    model = random_model({}, "auto", torch.float32)
    images = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert_close(
            model(images)["logits"], model(images / 255)["logits"].numpy(), "model", "float32", "uint8 is 0–255"
        )


def test_padded_cells_change_nothing() -> None:
    """From the backbone's features on, what stands in padded cells is never seen, NaN included."""
    model = random_model({}, "auto", torch.float64)
    features = torch.randn(1, 12, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    padded = torch.full((1, 12, 4, 7), torch.nan, dtype=torch.float64)
    padded[:, :, :2, :3] = features
    valid_sizes = torch.tensor([[13, 24]])
    with torch.no_grad():
        alone, beside = model.detect([features], valid_sizes), model.detect([padded], valid_sizes)
    assert_close(beside["boxes"], alone["boxes"].numpy(), "model", "float64", "padding changes no box")


def test_the_comparison_can_fail() -> None:
    """The order of head offsets, (x, y) per head, planted the other way round; the comparison must see it."""
    model = random_model({}, "eager", torch.float64)
    images, mask = random_batch(BATCHES["padded"])
    with torch.no_grad():
        features = [f.numpy() for f in model.backbone(model.normalize(images, mask))]
        params = {name: value.numpy() for name, value in model.state_dict().items()}
        bias = "decoder.layers.0.prior.offset_head.bias"
        params[bias] = params[bias].reshape(3, 2).T.reshape(-1)
        expected = forward(params, features, np.array(BATCHES["padded"]), model.config)
        got = model(images, mask)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close(got["boxes"], expected["boxes"], "model", "float64", "boxes")
