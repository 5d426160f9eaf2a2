"""A photograph and models that look at it, for the tests of explanations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from smca.conformance.implementations.pytorch import production_config
from smca.conformance.inputs.model import SMALL
from smca.gpu.model import SMCADETR
from smca.gpu.model.explanation import Explanation

PHOTO = np.random.default_rng(0).integers(0, 256, (50, 77, 3), dtype=np.uint8)
"""Neither side a multiple of a stride, and the network's input another size."""
NAME = '</script><b>it\'s "one" & two</b>.png'
CLASSES = ("a <i>class</i>", "<script>", "c")


def model(changes: dict[str, Any]) -> tuple[SMCADETR, Any]:
    config = dataclasses.replace(SMALL, **changes)
    torch.manual_seed(0)
    sizes = {"image_short_side": 45, "image_max_size": 90}
    made = SMCADETR(dataclasses.replace(production_config(config), **sizes)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # zeros at the start would hide what multiplies them
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made, config


def explained() -> tuple[Explanation, Explanation]:
    """Three queries of a model of two levels and three layers, and all of them without maps."""
    made, _ = model({"strides": (4, 8), "decoder_layers": 3, "num_classes": len(CLASSES)})
    return made.explain(PHOTO, most=3), made.explain(PHOTO, queries=range(made.config.num_queries), maps=False)
