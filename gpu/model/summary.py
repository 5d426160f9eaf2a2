"""Parameters, multiply-adds and levels of a configuration, without building it in memory (``smca train --dry-run``)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from smca.gpu.config import ModelConfig
from smca.gpu.model.detector import SMCADETR

_ASPECT = 4 / 3
"""Width over height of the image whose multiply-adds are counted: COCO's most common."""


def summarize(config: ModelConfig) -> str:
    """Parameters and multiply-adds of the network, by part, as a table for a terminal.

    Counted by ``torch.utils.flop_counter`` on the meta device (nothing is computed, no weights are loaded) for one unpadded
    image of ``image_short_side``: matrix products, convolutions and attention products. That counter gives two operations per
    multiply-add; the table shows half of it, the convention of fvcore and of the DETR paper's tables.
    """
    height = config.image_short_side
    width = min(round(height * _ASPECT), config.image_max_size)
    with torch.device("meta"):
        model = SMCADETR(config, attention_backend="eager", download=False).eval()
        images = torch.empty(1, 3, height, width)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the counter refuses views of parameters that are trained
    with FlopCounterMode(display=False) as counter:
        model(images)
    for parameter in trained:
        parameter.requires_grad_(True)
    counts = counter.get_flop_counts()
    optional = {"halve": config.halve_finest, "dense_head": config.dense_head}
    parts = ["backbone", "input_proj", "encoder", "decoder", *(name for name, there in optional.items() if there)]
    lines = [f"{'part':<12} {'parameters':>12} {'trained':>12} {'multiply-adds':>15}"]
    for name in parts:
        parameters = list(model.get_submodule(name).parameters())
        # A list of modules is never called itself; its entries are.
        part = model.get_submodule(name)
        called = [f"{name}.{i}" for i in range(len(part))] if isinstance(part, torch.nn.ModuleList) else [name]
        macs = sum(sum(counts.get(f"{type(model).__name__}.{each}", {}).values()) for each in called) / 2
        lines.append(_row(name, parameters, macs))
    lines.append(_row("all", list(model.parameters()), counter.get_total_flops() / 2))
    lines.append(f"one image of {height}×{width} px; torch.utils.flop_counter, two operations = one multiply-add")
    for stride, sigma in zip(config.decoder_strides, config.sigma_of_levels, strict=True):
        beta = 2 * (sigma / stride) ** 2
        width_of_prior = f", β = {beta:.3g} cells²" if config.prior_unit == "pixels" else ""
        lines.append(f"level of stride {stride}: {-(-height // stride)}×{-(-width // stride)} cells{width_of_prior}")
    return "\n".join(lines)


def _row(name: str, parameters: list[torch.nn.Parameter], macs: float) -> str:
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{name:<12} {total / 1e6:>10.2f} M {trained / 1e6:>10.2f} M {macs / 1e9:>13.2f} G"
