"""The settings that convergence.md compares: SMCA without what goes beyond the paper, on several levels, and without each part.

    python docs/ablations.py plain --model.cross-attention dense
    python docs/ablations.py small_objects_multiscale --seed 1 --output runs/scales-small_objects_multiscale-1

Takes every option of ``smca train``.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from smca.gpu.cli import run
from smca.gpu.config import LossConfig, OptimConfig, RunConfig
from smca.gpu.presets import demo, small, tiny_resnet, with_model
from smca.gpu.train import parse, train

OPTIM = OptimConfig(lr=4e-4, backbone_lr=4e-4, warmup_steps=100, schedule="cosine")


def _without_beyond(run: RunConfig, name: str) -> RunConfig:
    """`run` with the paper's queries, prior and loss, three layers and AdamW."""
    run = with_model(
        replace(run, loss=LossConfig(), optim=replace(OPTIM, ema_decay=run.optim.ema_decay)),
        name,
        decoder_layers=3,
        prior_sigma_px=11.3,
        query_init="grid",
        dense_head=False,
        prior_unit="pixels",
        denoising_groups=0,
    )
    return replace(run, epochs=4)


def plain() -> RunConfig:
    """``demo`` without what goes beyond the paper: what the Gaussian is measured with."""
    return _without_beyond(demo(), "plain")


def plain_small() -> RunConfig:
    """``small`` likewise."""
    return replace(_without_beyond(small(), "plain_small"), epochs=160)


def published_demo() -> RunConfig:
    """``plain`` with the choices of ``smca_r50``: random queries, one reference for all layers, post-norm, dropout, a drop."""
    run = with_model(plain(), "published_demo", query_init="random", box_refinement=False, pre_norm=False, dropout=0.1)
    return replace(run, optim=replace(run.optim, schedule="step", drop_epoch=(10,)), epochs=12)


def small_objects() -> RunConfig:
    """One level of stride 16 on built-in data with up to 12 objects of 5 to 40 pixels: many are smaller than a cell."""
    run = with_model(plain(), "small_objects", backbone=tiny_resnet(2, 2, 2), strides=(16,))
    synthetic = replace(run.synthetic, train_images=2000, max_objects=12, min_side=5 / 128, max_side=40 / 128)
    return replace(run, synthetic=synthetic)


def small_objects_multiscale() -> RunConfig:
    """``small_objects`` with three levels, one finer and one coarser: strides 8, 16 and 32."""
    return with_model(small_objects(), "small_objects_multiscale", strides=(8, 16, 32))


def ablation_fixed_scale() -> RunConfig:
    """``small_objects_multiscale`` with Gaussians of one width that is not predicted."""
    return with_model(small_objects_multiscale(), "ablation_fixed_scale", prior_scale="fixed")


def ablation_single_scale() -> RunConfig:
    """``small_objects_multiscale`` with one predicted width for both axes of a Gaussian."""
    return with_model(small_objects_multiscale(), "ablation_single_scale", prior_scale="single")


def ablation_shared_heads() -> RunConfig:
    """``small_objects_multiscale`` with one Gaussian for all attention heads."""
    return with_model(small_objects_multiscale(), "ablation_shared_heads", prior_heads="shared")


def ablation_no_selection() -> RunConfig:
    """``small_objects_multiscale`` without scale selection: every level weighs the same."""
    return with_model(small_objects_multiscale(), "ablation_no_selection", scale_selection=False)


PRESETS = {
    preset.__name__: preset
    for preset in (
        plain,
        plain_small,
        published_demo,
        small_objects,
        small_objects_multiscale,
        ablation_fixed_scale,
        ablation_single_scale,
        ablation_shared_heads,
        ablation_no_selection,
    )
}


def main(argv: list[str]) -> None:
    """Train one of them."""
    train(parse(argv, PRESETS, prog="python docs/ablations.py"))


if __name__ == "__main__":
    run(main, sys.argv[1:] or ["--help"])
