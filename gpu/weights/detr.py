"""Checkpoints of two programs with the same names: DETR (facebookresearch/detr) and SMCA by its authors (gaopengcuhk/SMCA-DETR).

A file holds {model, optimizer, lr_scheduler, epoch, args}; published ones hold `model` alone, and what `args` would say is
read from shapes as far as it can be. What is not the same there and here is set right, so that the outputs are the same
(measured in float64):

    their cells lie at (i, j), ours at (i + ½, j + ½)         ½ is added to the offset head's bias, on both axes
    log G = −distance·r²/smooth                               prior_sigma_px = stride·√(smooth/2)
    O from the query as it enters the layer                   prior_state="entering"
    positions by counting cells; masks by nearest neighbour   position_encoding="detr", padding_cells="nearest"
    a column for each COCO id from 0 to 90, and one more      the 80 that exist; DETR's last one is "no object"
"""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.config_json import cut
from smca.gpu.weights import resnet
from smca.gpu.weights.coco_classes import COCO_CLASSES
from smca.gpu.weights.source import Source, checked, is_counter

SMCA, DETR = "SMCA by its authors", "DETR (facebookresearch)"
COCO_COLUMNS = 92
"""Rows of a class head whose columns are COCO's category ids."""
_HEADS, _SMOOTH, _DROPOUT = 8, 8.0, 0.1
"""Their defaults, where a file does not say."""
_SCALES = {"type1": "fixed", "type2": "single", "type3": "independent"}
"""--dynamic_scale → prior_scale."""

_NAMES = (
    (r"input_proj\.", "input_proj.0."),
    (r"query_embed\.weight$", "decoder.query_position"),
    (r"class_embed\.", "decoder.class_head."),
    (r"bbox_embed\.", "decoder.box_heads.0."),
    (r"transformer\.decoder\.layers\.0\.point1\.", "decoder.center_head."),
    (r"transformer\.(decoder\.layers\.\d+)\.point2\.", r"\1.prior.offset_head."),
    (r"transformer\.(decoder\.layers\.\d+)\.point3\.", r"\1.prior.scale_head."),
    (r"transformer\.(decoder\.layers\.\d+)\.norm4\.", r"\1.state_norm."),
    (r"transformer\.(decoder\.layers\.\d+)\.multihead_attn\.", r"\1.cross_attn."),
    (r"transformer\.((?:en|de)coder\.layers\.\d+)\.(self_attn|linear[12]|norm[123])\.", r"\1.\2."),
    (r"transformer\.((?:en|de)coder)\.norm\.", r"\1.norm."),
)
"""Their names → ours; those of the ResNet are ``resnet.renamed``'s."""


def is_detr(weights: Mapping[str, Any]) -> bool:
    """Whether these are names of one of the two programs."""
    return any(name.removeprefix("detr.").startswith(("transformer.decoder.", "query_embed.")) for name in weights)


def read_detr(name: str, weights: Mapping[str, Tensor], args: object) -> Source:
    """A checkpoint in this project's names.

    Args:
        name: of the file.
        weights: `model` in it.
        args: `args` in it, if there are.

    Raises:
        ValueError: a variant that this project has no equivalent of; says which.
    """
    _refuse(name, weights)
    said: dict[str, Any] = dict(vars(args)) if isinstance(args, Namespace) else {}
    if said.get("dilation") or (not said and "dc5" in name.lower()):
        raise ValueError(
            f"{name} is a DC5 model, whose last stage is dilated: expected a ResNet of stride 32, which is what there "
            "is here. Take the checkpoint without DC5"
        )
    smca = any(".point2." in key for key in weights)
    own, foreign = _renamed(weights)
    if foreign:
        raise ValueError(
            f"{name} holds {len(foreign)} weights that are neither DETR's nor SMCA's, such as {cut(foreign[0])}: "
            "expected a model as published, without additions. Give one, or remove them from the file"
        )
    fields, notes = _shape_of(own, name), []
    heads = _heads(own, said, smca, name)
    if not said:
        notes.append(
            "the file does not say with which options it was trained; taken for granted: "
            + (f"--smooth {_SMOOTH:g}" if smca else f"--nheads {_HEADS}")
            + ", no dilation (DC5)"
        )
    fields |= {
        "num_heads": heads,
        "cross_attention": "smca" if smca else "dense",
        "dropout": _number(said, "dropout", _DROPOUT, name),
    }
    if smca:
        fields |= _prior(own, said, name, fields["strides"][0], heads)
    classes, more = _classes(own, softmax=not smca)
    fields |= {"position_encoding": "detr", "padding_cells": "nearest"} | classes
    fields["class_scores"] = "sigmoid" if smca else "softmax"
    # By way of JSON, whose values are held to the types of the fields: they may come from anywhere.
    config = ModelConfig.from_json(json.dumps(fields), f"{name}, by its options and sizes")
    return checked(Source(name, SMCA if smca else DETR, config, own, (*notes, *more)))


def _refuse(name: str, weights: Mapping[str, Tensor]) -> None:
    """Variants that are known, and have no equivalent here."""
    variants = {
        r"(detr\.|mask_head\.|bbox_attention\.)": "a panoptic DETR, with mask heads: expected a detector. Take the "
        "checkpoint without masks that it was made from",
        r"backbone\.1\.": "a model with learned position embeddings (--position_embedding learned): expected sine positions, "
        "which are all that there is here. Take a checkpoint trained with those",
        r"(input_proj_|transformer\.level_embed)": "the authors' multi-scale model: expected their single-scale one, which "
        "alone is understood so far. Train multi-scale from that: --init with --model.strides 16 32 64",
    }
    for pattern, what in variants.items():
        if any(re.match(pattern, key) for key in weights):
            raise ValueError(f"{name} is {what}")


def _renamed(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """By our names, and the names that neither program has."""
    own: dict[str, Tensor] = {}
    foreign: list[str] = []
    for name, value in weights.items():
        body = name.removeprefix("backbone.0.body.")
        if body != name:
            new = resnet.renamed(body)
            new = None if new is None else f"backbone.body.{new}"
        else:
            new = next((re.sub(f"^{p}", to, name) for p, to in _NAMES if re.match(p, name)), None)
        if is_counter(name):
            continue
        if new is None:
            foreign.append(name)
        else:
            own |= _split(new, value)
    return own, foreign


def _split(name: str, value: Tensor) -> dict[str, Tensor]:
    """A joint projection as its three."""
    place, found, kind = name.partition(".in_proj_")
    if not found:
        return {name: value}
    return {f"{place}.{q}_proj.{kind}": part for q, part in zip("qkv", value.chunk(3), strict=False)}


def _shape_of(own: dict[str, Tensor], name: str) -> dict[str, Any]:
    """What the sizes say."""
    prefix = "backbone.body."
    try:
        options = resnet.architecture({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)})
        queries, width = own["decoder.query_position"].shape
        wide = own["decoder.layers.0.linear1.weight"].shape[0]
        # A classifier's bias says nothing here; it must be there all the same.
        _ = own["decoder.class_head.weight"], own["decoder.class_head.bias"]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name} lacks {cut(error)} (in this project's names): expected all weights of a DETR with a ResNet. Is "
            "it half of a checkpoint? Take another copy"
        ) from error
    return {
        "backbone": asdict(BackboneConfig("resnet", options=options, frozen_norm=True, frozen_stages=2)),
        "strides": (2 * 2 ** len(options["depths"]),),
        "hidden_dim": width,
        "num_queries": queries,
        "feedforward_dim": wide,
        "encoder_layers": resnet.count(own, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": resnet.count(own, r"decoder\.layers\.(\d+)\."),
        "pre_norm": "encoder.norm.weight" in own,
    }


def _heads(own: Mapping[str, Tensor], said: Mapping[str, Any], smca: bool, name: str) -> int:
    """Attention heads: an offset head has two numbers for each."""
    offsets = own.get("decoder.layers.0.prior.offset_head.bias")
    if smca and offsets is None:
        raise ValueError(
            f"{name} lacks transformer.decoder.layers.0.point2: expected all weights of a model. Take another copy"
        )
    return int(_number(said, "nheads", _HEADS, name)) if offsets is None else offsets.numel() // 2


def _number(said: Mapping[str, Any], option: str, default: float, name: str) -> float:
    value = said.get(option, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(
            f"{name}: expected a number for the option --{option} in it, got {cut(value)}: take another copy"
        )
    return value


def _prior(own: dict[str, Tensor], said: Mapping[str, Any], name: str, stride: int, heads: int) -> dict[str, Any]:
    """Fields of the prior; half a cell goes into the offsets."""
    if "encoder.norm.weight" in own or said.get("pre_norm"):
        raise ValueError(f"{name} says --pre_norm, with which the authors' SMCA does not run: is it another program's?")
    scale = own.get("decoder.layers.0.prior.scale_head.bias")
    rows = 0 if scale is None else scale.numel() // heads
    kind = said.get("dynamic_scale") or {0: "type1", 1: "type2", 2: "type3", 3: "type4"}.get(rows, "unknown")
    if kind not in _SCALES:
        raise ValueError(
            f"{name} has a prior of {cut(kind)} (--dynamic_scale), which adds the product of both squared distances "
            f"and is no Gaussian (docs/deviations.md): expected one of {', '.join(_SCALES)}. Take a checkpoint of one "
            "of those"
        )
    for key in own:
        if key.endswith("prior.offset_head.bias"):
            own[key] = own[key] + 0.5
    smooth = _number(said, "smooth", _SMOOTH, name)
    if smooth == 0:
        raise ValueError(f"{name}: expected a positive number for the option --smooth in it, got 0: take another copy")
    return {
        "prior_scale": _SCALES[kind],
        "prior_sigma_px": stride * math.sqrt(smooth / 2),
        "prior_state": "entering",
    }


def _classes(own: dict[str, Tensor], *, softmax: bool) -> tuple[dict[str, Any], list[str]]:
    """Fields of the classes, whose rows are what remains of the class head."""
    rows = own["decoder.class_head.weight"].shape[0]
    ids = tuple(COCO_CLASSES) if rows == COCO_COLUMNS else tuple(range(rows - 1))
    kept = [*ids, rows - 1] if softmax else list(ids)
    for kind in ("weight", "bias"):
        own[f"decoder.class_head.{kind}"] = own[f"decoder.class_head.{kind}"][torch.tensor(kept)]
    fields: dict[str, Any] = {"num_classes": len(ids)}
    if rows == COCO_COLUMNS:
        fields |= {"class_names": tuple(COCO_CLASSES.values()), "category_ids": ids}
        return fields, [dropped(rows - len(kept), softmax)]
    return fields, [f"the file names no classes: they are the {len(ids)} columns of its class head, in order"]


def dropped(columns: int, softmax: bool) -> str:
    """What it means that so many columns of a class head are left out."""
    ids = f"{columns} columns of the class head belong to category ids that COCO does not use and are left out"
    if softmax:
        return f"{ids}: the scores of the others are exact but for what those had of the softmax, next to nothing"
    return f"{ids}; the scores of the others are exact"


def tensors_of(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights by name in what a file holds: its "model", or all of it."""
    held = state.get("model", state) if isinstance(state, dict) else {}
    for name, value in held.items() if isinstance(held, dict) else ():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield name, value
