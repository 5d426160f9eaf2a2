"""The conventions of DETR's and the authors' code that can be chosen, and what their weights start from (docs/deviations.md)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from smca.gpu.config import ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.model.layers import Attention
from smca.gpu.model.position import counted_position_encoding, nearest_padding_mask
from smca.gpu.presets import PRESETS, tiny_resnet

PUBLISHED: dict[str, Any] = {
    "prior_state": "entering",
    "position_encoding": "detr",
    "padding_cells": "nearest",
    "initialization": "published",
}


def small(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "num_classes": 3,
            "backbone": tiny_resnet(1, 1, 1),
            "strides": (8,),
            "hidden_dim": 64,
            "num_heads": 4,
            "num_queries": 7,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "feedforward_dim": 96,
            **changes,
        }
    )


def made(**changes: Any) -> SMCADETR:
    torch.manual_seed(0)
    return SMCADETR(small(**changes))


def pixel_mask(valid_sizes: Tensor, padded_size: tuple[int, int]) -> Tensor:
    mask = torch.ones(len(valid_sizes), *padded_size, dtype=torch.bool)
    for row, (height, width) in zip(mask, valid_sizes.tolist(), strict=True):
        row[:height, :width] = False
    return mask


@pytest.mark.parametrize("stride", [8, 32])
@pytest.mark.parametrize("padded_size", [(64, 96), (70, 65), (33, 47), (9, 200)])
def test_padding_and_positions_are_detrs(padded_size: tuple[int, int], stride: int) -> None:
    """As it computes them: the mask of pixels by nearest neighbour, counted along both axes."""
    height, width = padded_size
    valid_sizes = torch.tensor([[h, w] for h in (height, height // 2, 1) for w in (width, width // 3, 7)])
    size = (-(-height // stride), -(-width // stride))
    pixels = pixel_mask(valid_sizes, padded_size)
    expected = functional.interpolate(pixels[:, None].double(), size=size)[:, 0].bool()
    got = nearest_padding_mask(valid_sizes.double(), padded_size, size)
    assert torch.equal(got, expected)

    halves = []
    for axis in (1, 2):
        counts = (~expected).double().cumsum(axis)
        last = counts.select(axis, -1).unsqueeze(axis)
        angle = (counts / (last + 1e-6) * 2 * math.pi)[..., None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        halves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(3))
    wanted = torch.cat(halves, dim=-1).flatten(1, 2)
    encoded = counted_position_encoding(got.flatten(1), size, 16, dtype=torch.float64)
    torch.testing.assert_close(encoded, wanted, rtol=1e-6, atol=1e-6)  # the divisors above are in float32


def test_each_convention_is_read() -> None:
    usual = made(**PUBLISHED).double()
    # Two maps of 3 × 3 cells for images of 24 × 17 pixels and less.
    features = [torch.randn(2, usual.backbone.channels[0], 3, 3, dtype=torch.float64)]
    sizes = torch.tensor([[24, 17], [17, 6]])
    for layer in usual.decoder.layers:  # scales and offsets that depend on the state
        nn.init.normal_(layer.prior.scale_head.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    expected = usual.detect(features, sizes, padded_size=(24, 17))["boxes"]
    for name, other in (("prior_state", "attended"), ("position_encoding", "centers"), ("padding_cells", "covered")):
        changed = SMCADETR(dataclasses.replace(usual.config, **{name: other})).double()
        changed.load_state_dict(usual.state_dict())
        difference = (changed.detect(features, sizes, padded_size=(24, 17))["boxes"] - expected).abs().amax((0, 2, 3))
        assert difference[1] > 1e-7, name


@pytest.mark.parametrize("padding_cells", ["covered", "nearest"])
def test_in_evaluation_an_image_is_as_if_it_were_alone(padding_cells: str) -> None:
    """Also where the padded batch says which cells are padding, which training does."""
    model = made(**{**PUBLISHED, "padding_cells": padding_cells}).double()
    images, sizes = torch.rand(2, 3, 24, 17, dtype=torch.float64), [(24, 17), (17, 6)]
    mask = pixel_mask(torch.tensor(sizes), (24, 17))
    trained = model.train()(images, mask)["boxes"]
    together = model.eval()(images, mask)["boxes"]
    for index, (height, width) in enumerate(sizes):
        alone = model(images[index : index + 1, :, :height, :width])["boxes"]
        torch.testing.assert_close(together[:, index : index + 1], alone, rtol=0, atol=1e-12)
    assert (trained - together).abs().max() > 1e-9


def spread(parameter: Tensor) -> float:
    return parameter.std().item()


def test_published_weights_start_as_the_authors_code_draws_them() -> None:
    model = made(hidden_dim=256, num_heads=8, feedforward_dim=512, **PUBLISHED)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(attentions) == 5
    for attention in attentions:  # of one matrix [3C, C], and one [C, C]
        for name, rows in (("q_proj", 3), ("k_proj", 3), ("v_proj", 3), ("out_proj", 1)):
            projection = getattr(attention, name)
            assert spread(projection.weight) == pytest.approx(math.sqrt(2 / (256 * (1 + rows))), rel=0.02)
            assert projection.bias.count_nonzero() == 0
    decoder = model.decoder
    by_default = 1 / math.sqrt(3 * 256)  # PyTorch's own: uniform up to 1/√C
    assert spread(decoder.class_head.weight) == pytest.approx(by_default, rel=0.1)
    assert torch.equal(decoder.class_head.bias, torch.full((3,), math.log(0.01 / 0.99)))
    for layer in decoder.box_heads[0].layers:  # type: ignore[union-attr]
        assert spread(layer.weight) == pytest.approx(by_default, rel=0.1)
        assert layer.bias.abs().max() > 0
    assert spread(decoder.center_head.layers[0].weight) == pytest.approx(math.sqrt(2 / 512), rel=0.02)  # type: ignore[union-attr]
    assert spread(decoder.query_position) == pytest.approx(1.0, rel=0.05)  # type: ignore[arg-type]
    for layer in decoder.layers:
        prior: Any = layer.prior
        assert spread(prior.offset_head.weight) == pytest.approx(math.sqrt(2 / (256 + 16)), rel=0.05)
        assert prior.offset_head.bias.mean().item() == pytest.approx(0.5, abs=0.05), "their cells are at (i, j)"
        assert prior.scale_head.weight.count_nonzero() == 0
        assert torch.equal(prior.scale_head.bias, torch.ones(16))


def test_detrs_own_scores_start_from_pytorchs_bias() -> None:
    model = made(cross_attention="dense", class_scores="softmax", **{**PUBLISHED, "prior_state": "attended"})
    bias = model.decoder.class_head.bias
    assert bias.shape == (4,)
    assert bias.abs().max() <= 1 / 8  # 1/√C


def test_published_levels_start_as_the_authors_code_draws_them() -> None:
    model = made(strides=(8, 16), encoder_layers=1, cross_level_blocks=(0,), hidden_dim=256, **PUBLISHED)
    assert spread(model.level_embed) == pytest.approx(1.0, rel=0.1)  # type: ignore[arg-type]
    head: Any = model.decoder.layers[0].level_head
    assert spread(head.weight) == pytest.approx(math.sqrt(2 / 258), rel=0.1)
    usual: Any = made(strides=(8, 16), encoder_layers=1).decoder.layers[0].level_head
    assert usual.weight.count_nonzero() == 0


def test_a_width_for_each_level() -> None:
    model = made(strides=(8, 16), prior_sigma_px=(12.0, 48.0))
    priors: Any = model.decoder.layers[0].prior
    assert priors.unit_precision == pytest.approx([(8 / 12) ** 2, (16 / 48) ** 2])
    again = ModelConfig.from_json(model.config.to_json())
    assert again == model.config
    assert ModelConfig.from_json(small().to_json()).prior_sigma_px == 64.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prior_sigma_px": (1.0, 2.0)},
            r"prior_sigma_px must be one number, or one for each of the 1 levels, got \(1.0, 2.0\)",
        ),
        ({"prior_sigma_px": (-1.0,)}, r"prior_sigma_px must be positive, got \(-1.0,\)"),
        ({"initialization": "published", "query_init": "grid"}, "query_init must be left at its default"),
        (
            {"initialization": "published", "dense_head": True},
            "dense_head must be left at its default with initialization",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


ROWS = [
    ("smca_r50", {}, 41_760_482),
    ("smca_r50", {"encoder_layers": 3}, 37_815_266),
    ("smca_r50", {"encoder_layers": 5}, 40_445_410),
    ("smca_r50", {"feedforward_dim": 1024}, 35_456_738),
    ("smca_r50", {"encoder_layers": 5, "feedforward_dim": 1024}, 34_666_978),
    ("smca_r50", {"prior_scale": "fixed"}, 41_735_810),
    ("smca_r50", {"prior_scale": "single"}, 41_748_146),
    ("smca_r50", {"num_heads": 4}, 41_735_810),
    ("smca_r50", {"num_heads": 16}, 41_809_826),
    ("smca_r50", {"prior_heads": "shared"}, 41_717_306),
    ("smca_r50", {"cross_attention": "dense"}, 41_575_968),
    ("detr_r50", {}, 41_524_768),
    ("smca_r50_multiscale", {}, 39_752_308),
    ("smca_r50_multiscale", {"scale_selection": False}, 39_747_682),
    ("smca_r50_multiscale_conv", {}, 40_985_914),
]
"""Presets with changes to the model, and their parameters with the authors' 92 outputs of the class head: docs/method.md §4."""


@pytest.mark.parametrize(("preset", "changes", "parameters"), ROWS)
def test_rows_of_the_ablation_have_the_published_size(preset: str, changes: dict[str, Any], parameters: int) -> None:
    config = PRESETS[preset]().model
    config = dataclasses.replace(config, num_classes=92 - (config.class_scores == "softmax"), **changes)
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None))
    with torch.device("meta"):
        model = SMCADETR(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    row = " ".join(f"--model.{name.replace('_', '-')} {value}" for name, value in changes.items()) or preset
    line = f"| `{row}` | {parameters:,} |"
    assert line in (Path(__file__).parents[2] / "docs/method.md").read_text(encoding="utf-8"), line
