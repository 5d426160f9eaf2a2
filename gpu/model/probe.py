"""What a network of transformers is made of, found by measuring: on the meta device, where nothing is computed."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig

_PROBE_PIXELS = 256
"""Side of the blank image with which strides are measured; a multiple of every stride in use."""

_READ = frozenset({"out_features", "out_indices", "stage_names"})
"""Keys of a transformers configuration that say which outputs are read, not what is built."""
FORBIDDEN = frozenset({"auto_map", "attn_implementation", "experts_implementation", "custom_pipelines"})
"""Keys that make transformers load code from the hub."""


def known_options(settings: Any) -> set[str]:
    """What the class of `settings` has over any other transformers configuration."""
    known = (type(settings)().to_dict().keys() - PreTrainedConfig().to_dict().keys()) | settings.attribute_map.keys()
    return {key for key in known - _READ - FORBIDDEN if not key.startswith("_")}


class Probe(NamedTuple):
    """What was measured of a network. One is measured several times while it is built, so the answers are kept: read only."""

    maps: list[torch.Size]
    """Shape of each feature map."""
    trained: dict[str, torch.Size]
    """Shape of each parameter, by name, that they depend on."""


def _stages(settings: Any) -> list[str]:
    return [name for name in settings.stage_names if name != "stem"]


def measure_strides(settings: Any) -> dict[str, int]:
    """Pixels per cell of each stage."""
    every = type(settings).from_dict(settings.to_dict())
    every.out_features = _stages(settings)
    maps = probe(every).maps
    return {n: round(_PROBE_PIXELS / shape[-1]) for n, shape in zip(every.out_features, maps, strict=True)}


def probe(settings: Any, side: int = _PROBE_PIXELS) -> Probe:
    """What a blank image of `side` × `side` pixels shows (on the meta device: nothing is computed)."""
    return _probe_once(cast(Any, type(settings)), settings.to_json_string(use_diff=False), side)


@lru_cache(maxsize=64)
def _probe_once(kind: Any, settings_json: str, side: int) -> Probe:
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        network = build(kind.from_dict(json.loads(settings_json))).eval()
        maps = network(torch.empty(1, 3, side, side)).feature_maps
        torch.autograd.backward([features.sum() for features in maps])
    trained = {name: p.shape for name, p in network.named_parameters() if p.grad is not None}
    return Probe([features.shape for features in maps], trained)


def parts_of(settings: Any) -> tuple[list[str], dict[str, int]]:
    """Names of the parts up to the last one that is read; and which of them each parameter, by name, belongs to: the last one that
    reads it, as maps after each part show."""
    named = settings.stage_names[: settings.stage_names.index(settings.out_features[-1]) + 1]
    kind, settings_json = cast(Any, type(settings)), settings.to_json_string(use_diff=False)
    try:
        return _parts_once(kind, settings_json, tuple(named))
    except ValueError:  # a family that does not hand out what its stem gives: the first stage includes it
        return _parts_once(kind, settings_json, tuple(name for name in named if name != "stem"))


@lru_cache(maxsize=64)
def _parts_once(kind: Any, settings_json: str, names: tuple[str, ...]) -> tuple[list[str], dict[str, int]]:
    settings = kind.from_dict(json.loads(settings_json))
    settings.out_features = list(names)
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        network = build(settings).eval()
        maps = network(torch.empty(1, 3, _PROBE_PIXELS, _PROBE_PIXELS)).feature_maps
    parts: dict[Tensor, int] = {}
    seen: set[Any] = set()
    for number, features in enumerate(maps):
        waiting = [features.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for before, _ in node.next_functions:
                if hasattr(before, "variable"):  # where a gradient ends: a parameter
                    parts[before.variable] = number
                else:
                    waiting.append(before)
    return list(names), {name: parts[p] for name, p in network.named_parameters() if p in parts}


def without_unread_stages(settings: Any) -> Any:
    """`settings` without the stages behind the last one that is read; as they are where that cannot be had.

    A list in them is taken to have a value for each stage if it is as long as there are stages, here and in its class's own
    settings. The result is looked at: what is read must come from the same parameters.
    """
    plain, names = type(settings)(), _stages(settings)
    total, kept = len(names), names.index(settings.out_features[-1]) + 1
    if kept == total:
        return settings
    lengths = {key: len(value) for key, value in plain.to_dict().items() if isinstance(value, list)}
    known = known_options(settings)
    options = {key: value for key, value in settings.to_dict().items() if key in known}
    for key, value in options.items():
        if isinstance(value, list) and len(value) == total and lengths.get(key) == len(_stages(plain)):
            options[key] = value[:kept]
        elif key in ("num_stages", "num_encoder_blocks", "num_layers", "num_hidden_layers") and value == total:
            options[key] = kept
    try:
        shorter = type(settings)(**options, out_features=list(settings.out_features))
        same = _stages(shorter) == names[:kept] and probe(shorter) == probe(settings)
    except Exception:  # a family whose settings hang together in another way
        return settings
    return shorter if same else settings


def side_divisor(settings: Any, stride: int) -> int:
    """1, or `stride` if the network drops what is left over when an image is no multiple of it."""
    side = _PROBE_PIXELS + 1
    try:
        last = probe(settings, side).maps[-1]
    except Exception:  # a family that takes whole multiples only refuses with an error of any type
        return stride
    return 1 if last[-1] == -(-side // stride) else stride


def build(settings: Any) -> nn.Module:
    """The network of a transformers configuration, with random weights."""
    return cast(nn.Module, AutoBackbone.from_config(settings, trust_remote_code=False))  # type: ignore[no-untyped-call]
