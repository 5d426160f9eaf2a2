"""Gradient checkpointing: the same step, bit for bit, with less kept for the backward pass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smca.datasets import Targets
from smca.gpu import train
from smca.gpu.config import BackboneConfig, LossConfig, ModelConfig
from smca.gpu.loss import SetCriterion
from smca.gpu.model import SMCADETR
from smca.gpu.model.recompute import recompute
from smca.gpu.model.synced_norm import synchronize_norms
from smca.gpu.presets import tiny_resnet
from smca.gpu.training.resume import settings_of
from tiny_run import tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": dict(tiny_resnet(2, 2).options),
    "convnext": {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2},
    "swin": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 64},
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 64},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16],
        "stage_mid_channels": [8, 8],
        "stage_out_channels": [16, 16],
        "stage_num_blocks": [2, 2],
        "stage_downsample": [False, True],
        "stage_light_block": [False, False],
        "stage_kernel_size": [3, 3],
        "stage_numb_of_layers": [2, 2],
        "hidden_sizes": [16, 16],
        "depths": [2, 2],
        "embedding_size": 8,
    },
}
"""With norms that learn from images (resnet, hgnet_v2), layers that transformers marks (swin, dinov2), and neither."""


def network(backbone: BackboneConfig, **changes: Any) -> SMCADETR:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_dim": 16,
        "num_heads": 2,
        "num_queries": 4,
        "feedforward_dim": 64,
        "num_classes": 2,
    }
    small |= {"encoder_layers": 2, "decoder_layers": 2, "dropout": 0.1, "strides": (8,)}
    return SMCADETR(ModelConfig(backbone=backbone, **{**small, **changes})).train()


def step_of(model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """The loss, the gradients and all buffers after a step, by name; and the bytes that the network kept for its backward pass."""
    kept = 0
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    targets = Targets(
        torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1, 4), 0.4), torch.ones(2, 1, dtype=torch.bool)
    )
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1, 48:] = True

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(images, mask, targets)
    loss = SetCriterion(LossConfig())(outputs, targets)["loss"]
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **dict(model.named_buffers()), "loss": loss.detach(), "drawn": torch.rand(3)}, kept


def require_same_step(
    model: SMCADETR, parts: tuple[str, ...], at_most: float, wrap: Callable[[nn.Module], nn.Module] = lambda m: m
) -> None:
    again = copy.deepcopy(model)
    recompute(again, parts)
    expected, kept = step_of(wrap(model))
    found, still_kept = step_of(wrap(again))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert still_kept < at_most * kept, f"{still_kept} of {kept} bytes are kept"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backbone_takes_the_same_step(name: str) -> None:
    """Running statistics are counted once, too."""
    model = network(BackboneConfig(name, FAMILIES[name], frozen_norm=False), encoder_layers=1, decoder_layers=1)
    require_same_step(model, ("backbone",), 0.7)


@pytest.mark.parametrize("encoder", ["attention", "conv", "pyramid_conv"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_transformer_takes_the_same_step(part: str, encoder: Any) -> None:
    """The same masks of dropout are drawn again; with noised queries, several levels and refinement."""
    further: dict[str, Any] = {
        "query_init": "selected",
        "dense_head": True,
        "denoising_groups": 1,
        "box_refinement": True,
    }
    model = network(tiny_resnet(1, 1), strides=(4, 8), encoder=encoder, num_queries=50, **further)
    require_same_step(model, (part,), 0.9)


def test_all_parts_at_once_and_in_bfloat16() -> None:
    model = network(tiny_resnet(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        require_same_step(model, ("backbone", "encoder", "decoder"), 0.5)


@pytest.mark.usefixtures("job")
def test_processes_that_share_norms_and_gradients_take_the_same_step() -> None:
    """What they share, they share again where they compute anew."""
    model = network(tiny_resnet(1, 1))
    synchronize_norms(model, torch.device("cpu"))
    require_same_step(model, ("backbone", "encoder", "decoder"), 0.5, wrap=DistributedDataParallel)


def test_nothing_is_computed_anew_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(tiny_resnet(1, 1)).eval()
    expected = model(torch.ones(1, 3, 64, 64))["logits"]
    recompute(model, ("backbone", "encoder", "decoder"))
    monkeypatch.setattr("smca.gpu.model.recompute.checkpoint", lambda *_, **__: pytest.fail("kept"))
    with torch.inference_mode():
        assert torch.equal(model(torch.ones(1, 3, 64, 64))["logits"], expected)


def test_a_run_is_the_same_and_may_go_on_without(tmp_path: Path) -> None:
    """With norms that learn, and an average of the weights, which stays a network of its own."""
    optim = dataclasses.replace(tiny(tmp_path).optim, ema_decay=0.9)
    plain = tiny(tmp_path / "plain", max_steps=2, optim=optim)
    every = ("backbone", "encoder", "decoder")
    anew = dataclasses.replace(plain, output=tmp_path / "anew", gradient_checkpointing=every)
    weights = [(train.train(config) / "model.safetensors").read_bytes() for config in (plain, anew)]
    assert weights[0] == weights[1]
    assert settings_of(plain) == settings_of(anew)
    with pytest.raises(ValueError, match="gradient_checkpointing must be different parts"):
        dataclasses.replace(plain, gradient_checkpointing=("encoder", "encoder"))
