"""Full configurations by name: ``smca train NAME``. A preset is a plain function; copy one to make your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from smca.datasets import Augmentation
from smca.gpu.config import BackboneConfig, ModelConfig, OptimConfig, RunConfig, SyntheticConfig


def tiny_resnet(*depths: int) -> BackboneConfig:
    """A ResNet of two stages (strides 4 and 8) with so many blocks each: what trains from scratch on a laptop's CPU."""
    options = {"embedding_size": 32, "hidden_sizes": [32, 96], "depths": list(depths), "layer_type": "basic"}
    return BackboneConfig(name="resnet", options=options, frozen_norm=False)


RESNET50 = BackboneConfig(name="resnet", weights="microsoft/resnet-50", frozen_norm=True, frozen_stages=2)
"""ResNet-50 with ImageNet weights, batch norm fixed, stem and first stage untrained: the published setting."""


def demo() -> RunConfig:
    """The built-in data on a laptop's CPU in a few minutes: 128×128 images, stride 8."""
    return RunConfig(
        data="synthetic",
        output=Path("runs/demo"),
        model=ModelConfig(
            backbone=tiny_resnet(2, 3),
            stride=8,
            hidden_dim=128,
            num_heads=4,
            num_queries=30,
            encoder_layers=1,
            decoder_layers=3,
            feedforward_dim=256,
            dropout=0.0,
            prior_sigma_px=11.3,
            query_init="grid",
            box_refinement=True,
            pre_norm=True,
            image_short_side=128,
            image_max_size=128,
        ),
        optim=OptimConfig(lr=4e-4, backbone_lr=4e-4, warmup_steps=100, schedule="cosine"),
        augmentation=Augmentation(short_sides=(128,), max_size=128, horizontal_flip=0.5),
        synthetic=SyntheticConfig(image_size=128, train_images=5200, val_images=300),
        epochs=4,
        batch_size=8,
        workers=0,
        cache_images=True,
    )


def small() -> RunConfig:
    """Your own data from scratch on a laptop's CPU: 192×256 pixels, stride 8, half an hour for a few hundred images."""
    base = demo()
    return RunConfig(
        output=Path("runs/small"),
        model=replace(base.model, num_queries=60, feedforward_dim=512, image_short_side=192, image_max_size=256),
        optim=replace(base.optim, ema_decay=0.998),
        augmentation=Augmentation(
            short_sides=(192,),
            max_size=256,
            horizontal_flip=0.5,
            vertical_flip=0.5,
            zoom=(0.7, 1.4),
            brightness=0.2,
            contrast=0.2,
            tint=0.1,
            stretch=0.15,
            gamma=0.15,
        ),
        epochs=160,
        eval_every=10,
        batch_size=base.batch_size,
        workers=0,
        cache_images=True,
    )


def smca_r50() -> RunConfig:
    """SMCA as published: ResNet-50, stride 32, 300 queries, 6 + 6 layers, 50 epochs (arXiv 2101.07448, section 4)."""
    return RunConfig(
        output=Path("runs/smca_r50"),
        model=ModelConfig(backbone=RESNET50),
        optim=OptimConfig(lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4, clip_norm=0.1, schedule="step", drop_epoch=40),
        augmentation=Augmentation.detr(),
        epochs=50,
    )


def detr_r50() -> RunConfig:
    """The baseline: DETR with every setting of ``smca_r50`` but the prior."""
    run = smca_r50()
    return replace(run, output=Path("runs/detr_r50"), model=replace(run.model, cross_attention="dense"))


PRESETS: dict[str, Callable[[], RunConfig]] = {f.__name__: f for f in (demo, small, smca_r50, detr_r50)}
"""Every preset by the name that ``smca train`` takes."""
