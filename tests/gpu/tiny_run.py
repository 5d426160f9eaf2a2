"""A run of a few steps, for the tests of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from smca.gpu.config import RunConfig
from smca.gpu.presets import demo


def tiny(output: Path, **changes: Any) -> RunConfig:
    """A run of a few steps: 64×64 images, one layer each."""
    run = demo()
    model = dataclasses.replace(
        run.model, hidden_dim=32, num_heads=4, num_queries=8, decoder_layers=2, feedforward_dim=32, image_short_side=64
    )
    base = dataclasses.replace(
        run,
        output=output,
        model=model,
        augmentation=dataclasses.replace(run.augmentation, short_sides=(64,)),
        synthetic=dataclasses.replace(run.synthetic, image_size=64, train_images=12, val_images=6),
        optim=dataclasses.replace(run.optim, warmup_steps=2),
        epochs=2,
        batch_size=4,
        workers=0,
        device="cpu",
    )
    return dataclasses.replace(base, **changes)
