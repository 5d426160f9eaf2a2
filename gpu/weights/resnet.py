"""ResNets by torchvision's names, which timm uses too, in the names of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_STEM = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}
_WITHIN = re.compile(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d+)|downsample\.(\d))$")


def renamed(name: str) -> str | None:
    """A weight's name in transformers' ResNet; None if torchvision's has no such weight.

    layer2.0.conv1.weight → encoder.stages.1.layers.0.layer.0.convolution.weight
    """
    module, _, kind = name.rpartition(".")
    if module in _STEM:
        return f"{_STEM[module]}.{kind}"
    found = _WITHIN.match(module)
    if found is None:
        return None
    stage, block, what, number, shortcut = found.groups()
    place = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if shortcut is not None:
        return f"{place}.shortcut.{('convolution', 'normalization')[int(shortcut) > 0]}.{kind}"
    return f"{place}.layer.{int(number) - 1}.{'convolution' if what == 'conv' else 'normalization'}.{kind}"


def architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """transformers' options of the ResNet that has these weights, by transformers' names, with all its stages.

    Raises:
        KeyError: they are not those of a ResNet.
    """
    stem = "embedder.embedder.convolution.weight"
    stages = count(weights, r"encoder\.stages\.(\d+)\.")
    depths = [count(weights, rf"encoder\.stages\.{stage}\.layers\.(\d+)\.") for stage in range(stages)]
    convolutions = count(weights, r"encoder\.stages\.0\.layers\.0\.layer\.(\d+)\.")
    last = f"layers.0.layer.{convolutions - 1}.convolution.weight"
    return {
        "num_channels": weights[stem].shape[1],
        "embedding_size": weights[stem].shape[0],
        "hidden_sizes": [weights[f"encoder.stages.{stage}.{last}"].shape[0] for stage in range(stages)],
        "depths": depths,
        "layer_type": "bottleneck" if convolutions == 3 else "basic",
    }


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that `pattern`'s group has at the beginning of a name; 0 if none matches."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
