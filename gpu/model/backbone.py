"""The feature extractor: any ``transformers.AutoBackbone``, whose stages of the wanted strides are found by measuring."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoBackbone, AutoConfig

from smca.gpu.config import BackboneConfig

_PROBE_PIXELS = 256
"""Side of the blank image with which strides are measured; a multiple of every stride in use."""

_NOT_ARCHITECTURE = (
    "architectures",
    "dtype",
    "model_type",
    "out_features",
    "out_indices",
    "stage_names",
    "transformers_version",
)
"""Keys of a transformers configuration that describe its origin or which outputs are read, not what is built."""


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and parameters: y = scale·x + shift. It keeps what was learned before and trains nothing."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    zeros: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        ones = torch.ones(norm.num_features)
        self.register_buffer("weight", ones if norm.weight is None else norm.weight.detach().clone())
        self.register_buffer("bias", ones * 0 if norm.bias is None else norm.bias.detach().clone())
        self.register_buffer("running_mean", ones * 0 if norm.running_mean is None else norm.running_mean.clone())
        self.register_buffer("running_var", ones if norm.running_var is None else norm.running_var.clone())
        self.register_buffer("zeros", ones * 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], in the dtype of x."""
        statistics = (self.running_mean, self.running_var, self.weight, self.bias, self.zeros)
        return cast(Tensor, _Normalize.apply(x, *statistics, self.eps))  # type: ignore[no-untyped-call]


class _Normalize(torch.autograd.Function):
    """Batch norm with fixed statistics and no trained parameters. Unlike ``batch_norm``, it does not keep x for the backward pass;
    the kernel of ``batch_norm`` serves both directions, since the gradient is scaled as x is. (Written as arithmetic on broadcast
    tensors, it takes half as long again on a GPU, and a third of a training step's launches.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, zeros: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(var, weight, zeros)
        ctx.eps = eps
        return functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        var, weight, zeros = ctx.saved_tensors
        return functional.batch_norm(grad, zeros, var, weight, zeros, training=False, eps=ctx.eps), *[None] * 6


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by a ``FrozenBatchNorm`` with the same values, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm(child))
        else:
            freeze_batch_norm(child)


class Backbone(nn.Module):
    """Images in, one feature map per level out, as far as the network's own stages reach.

    Attributes:
        channels: channels of each feature map.
        strides: pixels of the input per cell of each, finest first.
        divisor: images are zero-padded to multiples of so many pixels, if the network would drop what is left over; 1 = it does
        not.
    """

    def __init__(self, config: BackboneConfig, strides: Sequence[int], *, download: bool = True) -> None:
        """Build the network and find the stages of the wanted strides.

        Args:
            config: which network, with which weights.
            strides: wanted pixels per cell of each level, finest first. The caller makes levels beyond the deepest stage; each
                of them must have twice the stride of the one before it.
            download: False builds the network without published weights (they are about to be loaded from elsewhere).

        Raises:
            ValueError: the network has no stage of a wanted stride (names those it has), or its weights cannot be loaded.
        """
        super().__init__()
        settings = _backbone_settings(config)
        offered = _measure_strides(settings)
        taken = [stride for stride in strides if stride <= max(offered.values())]
        absent = [stride for stride in taken if stride not in offered.values()]
        if absent or not taken:
            listing = ", ".join(f"{name}: {value}" for name, value in offered.items())
            raise ValueError(
                f"backbone {config.name!r} has no stage of stride {(absent or strides)[0]}; it offers {listing}. "
                "Set model.strides."
            )
        for before, stride in itertools.pairwise(strides[len(taken) - 1 :]):
            if stride != 2 * before:
                raise ValueError(
                    f"backbone {config.name!r} has no stage of stride {stride}, and a level beyond its stages has twice the stride "
                    f"of the level before it, here {2 * before}. Set model.strides."
                )
        # The last stage of a stride is the deepest: the most context at the same resolution.
        settings.out_features = [[name for name, value in offered.items() if value == stride][-1] for stride in taken]
        self.body = _load_weights(config, settings) if config.weights and download else _build(settings)
        self.strides = tuple(taken)
        self.channels = tuple(int(channels) for channels in cast(Any, self.body).channels)
        self.divisor = _side_divisor(settings, taken[-1])
        if config.frozen_norm:
            freeze_batch_norm(self.body)
        if config.frozen_stages:
            _freeze_stages(self.body, config)

    def resolved(self, config: BackboneConfig) -> BackboneConfig:
        """`config` with all that was built spelled out, so that it can be rebuilt without the published weights' repository."""
        settings = cast(Any, self.body).config
        options = {key: value for key, value in settings.to_diff_dict().items() if key not in _NOT_ARCHITECTURE}
        return replace(config, name=settings.model_type, options=options, weights=None)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] → for each level features [B, channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        height, width = (-side % self.divisor for side in images.shape[-2:])
        return list(
            self.body(functional.pad(images, (0, width, 0, height)) if height or width else images).feature_maps
        )

    def each_alone(self, images: Tensor, valid_sizes: Tensor) -> list[Tensor]:
        """The same for padded images, each as if it were in no batch: those of one size together, without their padding.

        A network sees padding otherwise: after its first layer, a padded pixel is no longer what lies beyond an image's border, and
        attention and statistics over an image take it in. This holds for any network, but waits for the device.

        Args:
            images: [B, 3, H, W] normalised, each in the top left corner.
            valid_sizes: [B, 2] (height, width) of the unpadded images in pixels.

        Returns:
            For each level [B, channels, h, w], of the largest image's size, 0 where padded.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (height, width) in enumerate(valid_sizes.tolist()):
            groups.setdefault((int(height), int(width)), []).append(index)
        parts = [(rows, self(images[rows, :, :height, :width])) for (height, width), rows in groups.items()]
        maps = []
        for level, channels in enumerate(self.channels):
            sides = [max(features[level].shape[axis] for _, features in parts) for axis in (-2, -1)]
            joined = parts[0][1][level].new_zeros(len(images), channels, *sides)
            for rows, features in parts:
                joined[rows, :, : features[level].shape[-2], : features[level].shape[-1]] = features[level]
            maps.append(joined)
        return maps


def _backbone_settings(config: BackboneConfig) -> Any:
    if config.weights is not None and not config.options:
        try:
            return AutoConfig.from_pretrained(config.weights)
        except OSError as error:
            raise _unreachable(config) from error
    try:
        return AutoConfig.for_model(config.name, **config.options)
    except ValueError as error:
        raise ValueError(
            f"transformers knows no model type {config.name!r}: {error}. Set model.backbone.name."
        ) from error


def _measure_strides(settings: Any) -> dict[str, int]:
    """Pixels per cell of each stage, read off a blank image's feature maps (on the meta device: nothing is computed)."""
    names = [name for name in settings.stage_names if name != "stem"]
    probe_settings = type(settings).from_dict(settings.to_dict())
    probe_settings.out_features = names
    with torch.device("meta"):
        probe = _build(probe_settings).eval()
        maps = probe(torch.empty(1, 3, _PROBE_PIXELS, _PROBE_PIXELS)).feature_maps
    return {name: round(_PROBE_PIXELS / features.shape[-1]) for name, features in zip(names, maps, strict=True)}


def _side_divisor(settings: Any, stride: int) -> int:
    """1, or `stride` if the network drops what is left over when an image is no multiple of it."""
    side = _PROBE_PIXELS + 1
    with torch.device("meta"):
        maps = _build(settings).eval()(torch.empty(1, 3, side, side)).feature_maps
    return 1 if maps[-1].shape[-1] == -(-side // stride) else stride


def _build(settings: Any) -> nn.Module:
    return cast(nn.Module, AutoBackbone.from_config(settings))  # type: ignore[no-untyped-call]


def _load_weights(config: BackboneConfig, settings: Any) -> nn.Module:
    with torch.device("meta"):
        network: Any = type(_build(settings))
    try:
        # Not AutoBackbone.from_pretrained: it asks the hub even for a local folder or for what is already downloaded.
        return cast(nn.Module, network.from_pretrained(config.weights, config=settings, use_safetensors=True))
    except OSError as error:
        raise _unreachable(config) from error


def _unreachable(config: BackboneConfig) -> ValueError:
    return ValueError(
        f"backbone weights {config.weights!r} are neither a local folder with safetensors weights nor reachable on the hub: "
        "download them first (huggingface_hub.snapshot_download), or train from scratch (--model.backbone.weights None)"
    )


def _freeze_stages(body: nn.Module, config: BackboneConfig) -> None:
    embedder, encoder = getattr(body, "embedder", None), getattr(body, "encoder", None)
    stages = getattr(encoder, "stages", None)
    if embedder is None or stages is None:
        raise ValueError(
            f"model.backbone.frozen_stages needs a ResNet-like backbone; {config.name!r} has no such stages: set it to 0"
        )
    for part in [embedder, *stages][: config.frozen_stages]:
        part.requires_grad_(False)
