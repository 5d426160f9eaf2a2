"""The feature extractor: any ``transformers.AutoBackbone``, its stage of the wanted stride found by measuring."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig

from smca.gpu.config import BackboneConfig

_PROBE_PIXELS = 256
"""Side of the blank image with which strides are measured; a multiple of every stride in use."""


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and parameters: y = scale·x + shift. Holds what was learned before, trains nothing."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        ones = torch.ones(norm.num_features)
        self.register_buffer("weight", ones if norm.weight is None else norm.weight.detach().clone())
        self.register_buffer("bias", ones * 0 if norm.bias is None else norm.bias.detach().clone())
        self.register_buffer("running_mean", ones * 0 if norm.running_mean is None else norm.running_mean.clone())
        self.register_buffer("running_var", ones if norm.running_var is None else norm.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # In x's own dtype, or the map would leave a half-precision network twice as large; x itself is not kept for backward.
        return torch.addcmul(shift[:, None, None].to(x.dtype), x, scale[:, None, None].to(x.dtype))


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by a ``FrozenBatchNorm`` with the same values, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm(child))
        else:
            freeze_batch_norm(child)


class Backbone(nn.Module):
    """Images in, one feature map out.

    Attributes:
        channels: channels of the feature map.
        stride: pixels of the input per cell.
    """

    def __init__(self, config: BackboneConfig, stride: int, *, download: bool = True) -> None:
        """Build the network and find the stage of the wanted stride.

        Args:
            config: which network, with which weights.
            stride: wanted pixels per cell.
            download: False builds the network without published weights (they are about to be loaded from elsewhere).

        Raises:
            ValueError: the network has no stage of that stride (names those it has), or its weights cannot be had.
        """
        super().__init__()
        settings = _backbone_settings(config)
        strides = _measure_strides(settings)
        if stride not in strides.values():
            offered = ", ".join(f"{name}: {value}" for name, value in strides.items())
            raise ValueError(
                f"backbone {config.name!r} has no stage of stride {stride}; it offers {offered}. Set model.stride."
            )
        # The last stage of that stride is the deepest: the most context at the same resolution.
        stage = [name for name, value in strides.items() if value == stride][-1]
        settings.out_features = [stage]
        self.body = _load_weights(config, settings) if config.weights and download else _build(settings)
        self.stride = stride
        self.channels = int(cast(Any, self.body).channels[0])
        if config.frozen_norm:
            freeze_batch_norm(self.body)
        if config.frozen_stages:
            _freeze_stages(self.body, config)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        return cast(Tensor, self.body(images).feature_maps[0])


def _backbone_settings(config: BackboneConfig) -> Any:
    if config.weights is not None:
        try:
            return AutoConfig.from_pretrained(config.weights, **config.options)
        except OSError as error:
            raise ValueError(
                f"backbone weights {config.weights!r} are neither a local folder nor reachable on the hub: download them first "
                "(huggingface_hub.snapshot_download), or set model.backbone.weights to None to train from scratch"
            ) from error
    try:
        return AutoConfig.for_model(config.name, **config.options)
    except ValueError as error:
        raise ValueError(f"transformers knows no model type {config.name!r} (model.backbone.name): {error}") from error


def _measure_strides(settings: Any) -> dict[str, int]:
    """Pixels per cell of each stage, read off a blank image's feature maps (on the meta device: nothing is computed)."""
    names = [name for name in settings.stage_names if name != "stem"]
    probe_settings = type(settings).from_dict(settings.to_dict())
    probe_settings.out_features = names
    with torch.device("meta"):
        probe = _build(probe_settings).eval()
        maps = probe(torch.empty(1, 3, _PROBE_PIXELS, _PROBE_PIXELS)).feature_maps
    return {name: round(_PROBE_PIXELS / features.shape[-1]) for name, features in zip(names, maps, strict=True)}


def _build(settings: Any) -> nn.Module:
    return cast(nn.Module, AutoBackbone.from_config(settings))  # type: ignore[no-untyped-call]


def _load_weights(config: BackboneConfig, settings: Any) -> nn.Module:
    try:
        return cast(nn.Module, AutoBackbone.from_pretrained(config.weights, config=settings, use_safetensors=True))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ValueError(f"no safetensors weights for backbone {config.weights!r}: {error}") from error


def _freeze_stages(body: nn.Module, config: BackboneConfig) -> None:
    embedder, encoder = getattr(body, "embedder", None), getattr(body, "encoder", None)
    stages = getattr(encoder, "stages", None)
    if embedder is None or stages is None:
        raise ValueError(
            f"model.backbone.frozen_stages needs a ResNet-like backbone; {config.name!r} has no such stages: set it to 0"
        )
    for part in [embedder, *stages][: config.frozen_stages]:
        part.requires_grad_(False)
