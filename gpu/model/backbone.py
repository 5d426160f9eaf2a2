"""The feature extractor: any ``transformers.AutoBackbone``, whose stages of the wanted strides are found by measuring."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from smca.datasets.settings import shown
from smca.gpu.config import BackboneConfig
from smca.gpu.config_json import cut
from smca.gpu.model.efficientnet_lite import LITE0, MODEL_TYPE, load_lite0
from smca.gpu.model.frozen_norm import freeze_batch_norm
from smca.gpu.model.probe import (
    FORBIDDEN,
    build,
    known_options,
    measure_strides,
    parts_of,
    probe,
    side_divisor,
    without_unread_stages,
)

_COUNTS = ("depth", "layers", "blocks", "levels", "stages")
"""What is in the name of an option that counts layers."""
_MOST_LAYERS, _MOST_TOGETHER, _MOST = 1_000, 10_000, 1_000_000
"""Layers in one option, the product over such options (blocks of layers), and the largest number in any other option: a
configuration may come from anywhere."""


class Backbone(nn.Module):
    """Images in, one feature map per level out, as far as the network's own stages reach.

    Attributes:
        channels: channels of each feature map.
        strides: pixels of the input per cell of each, finest first.
        divisor: images are zero-padded to multiples of so many pixels, if the network would drop what is left over; 1 if not.
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
        try:
            offered = measure_strides(settings)
        except Exception as error:  # transformers refuses combinations of options with errors of any type
            raise _unbuildable(config.name, error) from error
        taken = [stride for stride in strides if stride <= max(offered.values())]
        absent = [stride for stride in taken if stride not in offered.values()]
        if absent or not taken:
            listing = cut(", ".join(f"{name}: {value}" for name, value in offered.items()), 200)
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
        settings = without_unread_stages(settings)
        maps, trained = probe(settings)
        self.body = _load_weights(config, settings, trained) if config.weights and download else build(settings)
        for name, parameter in self.body.named_parameters():
            if name not in trained:  # such as a mask token: processes that train together would wait for its gradient
                parameter.requires_grad_(False)
        self.strides = tuple(taken)
        self.channels = tuple(shape[1] for shape in maps)
        self.divisor = side_divisor(settings, taken[-1])
        if config.frozen_norm:
            freeze_batch_norm(self.body)
        if config.frozen_stages:
            self._freeze_stages(config)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by the part that they belong to, in the order in which an image passes through the parts: "stem"
        (patches, embeddings), then the stages up to the last one that is read; in a plain vision transformer each layer is a stage.
        """
        names, part_of = parts_of(cast(Any, self.body).config)
        parts: dict[str, list[nn.Parameter]] = {name: [] for name in names}
        for name, parameter in self.body.named_parameters():
            if parameter.requires_grad:
                parts[names[part_of[name]]].append(parameter)
        return parts

    def _freeze_stages(self, config: BackboneConfig) -> None:
        """Take the first parts out of the training, with the statistics of their norms."""
        parts = list(self.parts().items())
        if config.frozen_stages > len(parts):
            raise ValueError(
                f"model.backbone.frozen_stages is {config.frozen_stages}, but {config.name!r} has only {len(parts)} parts up to "
                f"the last one that is read: {cut(', '.join(name for name, _ in parts), 200)}. Set it to at most {len(parts)}"
            )
        for _, parameters in parts[: config.frozen_stages]:
            for parameter in parameters:
                parameter.requires_grad_(False)
        freeze_batch_norm(self.body, only_untrained=True)

    def resolved(self, config: BackboneConfig) -> BackboneConfig:
        """`config` with all that was built spelled out, so that it can be rebuilt without the published weights' repository."""
        settings = cast(Any, self.body).config
        return replace(config, name=settings.model_type, options=_options_of(settings), weights=None)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] → for each level features [B, channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        height, width = images.shape[-2:]
        rows, columns = -height % self.divisor, -width % self.divisor
        if not (rows or columns):
            return list(self.body(images).feature_maps)
        maps = self.body(functional.pad(images, (0, columns, 0, rows))).feature_maps
        # Without the cells that hold only what was added.
        return [
            features[:, :, : -(-height // stride), : -(-width // stride)]
            for features, stride in zip(maps, self.strides, strict=True)
        ]

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
        groups = rows_by_size(valid_sizes)
        parts = [(rows, self(images[rows, :, :height, :width])) for (height, width), rows in groups.items()]
        maps = []
        for level, channels in enumerate(self.channels):
            sides = [max(features[level].shape[axis] for _, features in parts) for axis in (-2, -1)]
            joined = parts[0][1][level].new_zeros(len(images), channels, *sides)
            for rows, features in parts:
                joined[rows, :, : features[level].shape[-2], : features[level].shape[-1]] = features[level]
            maps.append(joined)
        return maps


def rows_by_size(valid_sizes: Tensor) -> dict[tuple[int, int], list[int]]:
    """Sizes [B, 2] (height, width) → which images have each. Waits for the device."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, (height, width) in enumerate(valid_sizes.tolist()):
        rows.setdefault((int(height), int(width)), []).append(row)
    return rows


def _backbone_settings(config: BackboneConfig) -> Any:
    """transformers' configuration of the network, from the options alone or else from the published weights' repository."""
    name, options = config.name, config.options
    if config.weights == LITE0 and not options:
        name = MODEL_TYPE
    elif config.weights is not None and not options:
        try:
            published: Any = AutoConfig.from_pretrained(config.weights, trust_remote_code=False)
        except OSError as error:
            raise _unreachable(config) from error
        except Exception as error:  # transformers refuses foreign configurations with errors of any type
            raise ValueError(
                f"backbone weights {shown(config.weights)}: {cut(error, 300)}. Set model.backbone.name"
            ) from error
        name = published.model_type
    if name not in MODEL_FOR_BACKBONE_MAPPING_NAMES and name != MODEL_TYPE:
        raise ValueError(
            f"transformers knows no model type {cut(name)!r} that is a backbone; resnet, convnext and swin are. "
            "Set model.backbone.name."
        )
    try:
        if config.weights not in (None, LITE0) and not options:
            options = _options_of(published)
        _check_options(name, options)
        settings: Any = AutoConfig.for_model(name, **options)
        # With lists for tuples, which some families cannot add to lists.
        return type(settings).from_dict(settings.to_dict())
    except _OptionError:
        raise
    except Exception as error:  # transformers refuses options with errors of any type
        raise _unbuildable(name, error) from error


class _OptionError(ValueError):
    """An option that is not handed to transformers."""


def _unbuildable(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"backbone {name!r} cannot be built: {cut(error, 200) or type(error).__name__}. Set model.backbone.options"
    )


def _options_of(settings: Any) -> dict[str, Any]:
    """What is to be given to the class of `settings` to build the same network."""
    known = known_options(settings)
    return {key: value for key, value in settings.to_diff_dict().items() if key in known}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Only what describes the architecture, in sizes that can be built."""
    settings: Any = AutoConfig.for_model(name)
    known = known_options(settings)
    for key, value in options.items():
        if key not in known:
            raise _OptionError(
                f"backbone {name!r} has no option {cut(key)!r}: it has {cut(', '.join(sorted(known)), 200)}. "
                "Set model.backbone.options"
            )
        numbers, inner = _contents(value)
        if hostile := [k for k in inner if k in FORBIDDEN or k.startswith("_")]:
            raise _OptionError(f"option {shown(key)} of backbone {name!r} must not hold {cut(hostile[0])!r}: remove it")
        counts = _is_count(key)
        if (sum(numbers) if counts else max(numbers, default=0)) > (_MOST_LAYERS if counts else _MOST):
            limit = f"{_MOST_LAYERS} in all" if counts else str(_MOST)
            raise _OptionError(f"option {shown(key)} of backbone {name!r} must be at most {limit}, got {shown(value)}")
    counts_of = {
        k: sum(_contents(v)[0]) for k, v in {**settings.to_dict(), **options}.items() if k in known and _is_count(k)
    }
    if math.prod(max(1, count) for count in counts_of.values()) > _MOST_TOGETHER:
        raise _OptionError(
            f"backbone {name!r} would have too many layers: lower {cut(', '.join(sorted(counts_of)), 200)}"
        )


def _is_count(key: str) -> bool:
    return any(part in key for part in _COUNTS)


def _contents(value: Any) -> tuple[list[float], list[str]]:
    """All numbers, without their signs, and all keys in a nested value."""
    if isinstance(value, Mapping):
        numbers, keys = _contents(list(value.values()))
        return numbers, [*map(str, value), *keys]
    if isinstance(value, list | tuple):
        parts = [_contents(item) for item in value]
        return [n for numbers, _ in parts for n in numbers], [k for _, keys in parts for k in keys]
    return [abs(value)] if isinstance(value, int | float) else [], []


def _load_weights(config: BackboneConfig, settings: Any, trained: Container[str]) -> nn.Module:
    """The network with published weights; all that it reads must be among them.

    Args:
        config: names the weights.
        settings: of the network.
        trained: names of the parameters that the feature maps depend on.
    """
    if config.weights == LITE0:
        body = build(settings)
        load_lite0(body)
        return body
    with torch.device("meta"):
        blank: Any = build(settings)
    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(
        logging.ERROR
    )  # the report is looked at below, and says too much of what is not read
    try:
        # Not AutoBackbone.from_pretrained: it asks the hub even for a local folder or for what is already downloaded.
        network, report = type(blank).from_pretrained(
            config.weights,
            config=settings,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are reported
            output_loading_info=True,
        )
    except OSError as error:
        raise _unreachable(config) from error
    except Exception as error:  # damaged files end in errors of any type
        raise ValueError(
            f"backbone weights {shown(config.weights)} cannot be read ({cut(error, 200)}): copy or download them again, "
            "with `git lfs pull` if they come from a clone"
        ) from error
    finally:
        transformers_logging.set_verbosity(said)
    unread = {name for name, _ in blank.named_parameters() if name not in trained}
    # Counters that nothing reads, and norms of the feature maps, which published classifiers do not have.
    missing = {
        k for k in report["missing_keys"] if not k.endswith("num_batches_tracked") and "hidden_states_norms." not in k
    }
    wrong = sorted((missing | {key for key, *_ in report["mismatched_keys"]}) - unread)
    if wrong:
        raise ValueError(
            f"backbone weights {shown(config.weights)} do not fit {settings.model_type!r} with its options: {len(wrong)} of "
            f"{len(blank.state_dict())} tensors are missing or of another shape, such as {cut(', '.join(wrong[:3]), 200)}. Name "
            "weights that transformers published for this model type (a model that this trainer saved has other names)"
        )
    return cast(nn.Module, network)


def _unreachable(config: BackboneConfig) -> ValueError:
    return ValueError(
        f"backbone weights {shown(config.weights)} are neither a local folder with safetensors weights nor reachable on the hub: "
        "download them first (huggingface_hub.snapshot_download), or train from scratch (--model.backbone.weights None)"
    )
