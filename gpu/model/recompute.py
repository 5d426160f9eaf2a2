"""Gradient checkpointing: activations inside a layer are computed anew in the backward pass, rather than kept for it.

Loss and gradients stay what they are, bit for bit where operations are: what is drawn (dropout) is drawn again alike, and norms
that learn from images do not count them twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from smca.gpu.model.detector import SMCADETR


def recompute(model: SMCADETR, parts: Collection[str]) -> None:
    """Let layers of the `parts` of `model`, in place, compute their activations anew. A copy made of it later would not be its own.

    Args:
        model: to be trained.
        parts: of "backbone", "encoder" and "decoder".
    """
    methods: list[tuple[nn.Module, str]] = []
    if "backbone" in parts:
        methods += [(block, "forward") for block in blocks_of(model.backbone.body)]
    if "encoder" in parts:
        methods += [(layer, "forward") for layer in model.encoder.layers]
    if "decoder" in parts:
        for layer in model.decoder.layers:
            methods += [(layer, name) for name in ("attend_queries", "attend_image", "feed_forward")]
    for module, name in methods:
        setattr(module, name, _anew(getattr(module, name), module))


def blocks_of(body: nn.Module) -> list[nn.Module]:
    """The smallest layers that transformers marks; where it marks none, the blocks of each stage, or stages without blocks."""
    marked = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    if marked:
        return [m for m in marked if not any(isinstance(c, GradientCheckpointingLayer) for c in list(m.modules())[1:])]
    return [block for stage in _members(body) for block in (_members(stage) or [stage])]


def _members(module: nn.Module) -> list[nn.Module]:
    """Of the outermost lists of modules below `module`."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else _members(child)
    return found


def _anew(method: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """`method` of `module`, whose inner activations are computed anew."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(module)

    @functools.wraps(method)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        if torch.compiler.is_compiling():  # a compiler computes anew only what changes nothing
            return checkpoint(method, *args, use_reentrant=False, **kwargs)
        return checkpoint(method, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return recomputed


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms below `module` normalise as they did, without counting the images a second time."""
    kept = [(m._buffers, dict(m._buffers)) for m in module.modules() if isinstance(m, _BatchNorm)]
    for buffers, values in kept:
        buffers.update({name: None if value is None else value.clone() for name, value in values.items()})
    try:
        yield
    finally:
        for buffers, values in kept:
            buffers.update(values)
