"""Under autocast in bfloat16, what ends in positions is computed in float32: centres, offsets and widths of the prior, and
boxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from smca.gpu.config import ModelConfig
from smca.gpu.model import SMCADETR, decoder, layers, prior
from smca.gpu.presets import tiny_resnet


def network(**changes: Any) -> SMCADETR:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_dim": 32,
        "num_heads": 4,
        "num_queries": 20,
        "feedforward_dim": 64,
        "dropout": 0.0,
    }
    options |= {"encoder_layers": 1, "decoder_layers": 3, "pre_norm": True, "prior_sigma_px": 20.0, "num_classes": 3}
    config = ModelConfig(backbone=tiny_resnet(1, 1), strides=(8,), **{**options, **changes})
    model = SMCADETR(config).eval()
    with torch.no_grad():
        for head in (model.decoder.center_head, *model.decoder.box_heads):  # boxes all over the image
            nn.init.normal_(head.last.weight, std=0.02)  # type: ignore[union-attr, arg-type]
            nn.init.normal_(head.last.bias, std=2.0)  # type: ignore[union-attr, arg-type]
        for layer in model.decoder.layers:
            nn.init.normal_(layer.prior.offset_head.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return model


def boxes(model: SMCADETR, images: torch.Tensor, *, autocast: bool) -> torch.Tensor:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(images)["boxes"]


@pytest.mark.parametrize("refinement", [False, True])
def test_heads_of_positions_compute_in_float32(refinement: bool) -> None:
    model = network(box_refinement=refinement)
    heads = {name: module for name, module in model.decoder.named_modules() if name.split(".")[-1].endswith("_head")}
    heads |= {f"box_heads.{i}": head for i, head in enumerate(model.decoder.box_heads)}
    seen: dict[str, set[torch.dtype]] = {name: set() for name in heads}
    for name, head in heads.items():
        for part in head.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_hook(lambda _, __, out, name=name: seen[name].add(out.dtype))
    boxes(model, torch.rand(2, 3, 64, 96), autocast=True)
    in_half = {name for name, dtypes in seen.items() if dtypes != {torch.float32}}
    assert in_half == {"class_head"}
    assert {"center_head", "layers.0.prior.offset_head", "layers.2.prior.scale_head", "box_heads.0"} <= seen.keys()


@pytest.mark.parametrize(("refinement", "times_less"), [(False, 4), (True, 10)])
def test_boxes_move_less(refinement: bool, times_less: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By far: rounded to the three digits of bfloat16, the logit of a coordinate moves an edge by up to 1/256 of the image.

    Measured, in pixels of 128: 0.006 on average and 0.04 at most, for 0.04 and 0.19; with refinement, where every layer would
    add its share, 0.003 and 0.03, for 0.06 and 0.9.
    """
    images = torch.rand(4, 3, 128, 128)
    model = network(box_refinement=refinement)
    exact = boxes(model, images, autocast=False)
    moved = (boxes(model, images, autocast=True) - exact).abs()
    for module in (decoder, prior):
        monkeypatch.setattr(module, "in_full_precision", lambda head, x: head(x))
    moved_in_half = (boxes(model, images, autocast=True) - exact).abs()
    assert moved.mean() * times_less < moved_in_half.mean()
    assert moved.max() * 2 < moved_in_half.max()
    assert moved.max() * 128 < 0.1


@pytest.mark.parametrize("autocast", [False, True])
def test_a_double_model_stays_double(autocast: bool) -> None:
    model, images = network().double(), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    found = boxes(model, images, autocast=autocast)
    assert found.dtype == torch.float64
    assert torch.equal(found, boxes(model, images, autocast=False))


def test_without_autocast_the_heads_are_called_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cast and no context is entered: it costs nothing."""
    head, x = nn.Linear(3, 2), torch.rand(1, 3)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: pytest.fail("entered"))
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("cast"))
    assert torch.equal(layers.in_full_precision(head, x), head(x))


def test_it_is_traced_whole() -> None:
    """As ``smca train --compile --precision bf16`` does it: the network in one graph, with the same boxes."""
    model, images = network(decoder_layers=1), torch.rand(1, 3, 64, 64)
    expected = boxes(model, images, autocast=True)
    model.compile(backend="eager", fullgraph=True)
    assert (boxes(model, images, autocast=True) - expected).abs().max() < 1e-3


def test_gradients_reach_the_heads() -> None:
    model = network().train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(1, 3, 64, 64))
    outputs["boxes"].sum().backward()
    for name in ("center_head", "box_heads.0", "layers.1.prior.offset_head", "layers.1.prior.scale_head"):
        for parameter in model.decoder.get_submodule(name).parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0, name
