"""DETR and Conditional DETR as transformers writes them: config.json and model.safetensors, of any of its versions.

DETR is mapped whole, onto cross_attention="dense" with DETR's conventions and softmax scores. (Compare with
auxiliary_loss=False: with True, transformers norms between the decoder's layers.)

Of Conditional DETR, the decoder's attentions have no equivalent. There the logit of a query t with position p and a key m
with position e is a product of contents, A·t with D·m, and another one of positions, each with a matrix of its own (in the
first layer that of their sums, too); here it is Q(t + p)·K(m + e). What is written into a query once the attention's weights
are known is the same: values, output projections, feed-forward blocks and norms are taken, and with them the heads.
Reference points are a function of the query's position alone, which is constant: they become the centres of
query_init="grid", exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ConditionalDetrConfig, DetrConfig, ResNetConfig

from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.config_json import cut
from smca.gpu.weights import resnet
from smca.gpu.weights.coco_classes import COCO_CLASSES
from smca.gpu.weights.detr import dropped
from smca.gpu.weights.source import Part, Source, checked, is_counter

KINDS: dict[str, tuple[str, Any]] = {
    "detr": ("DETR (transformers)", DetrConfig),
    "conditional_detr": ("Conditional DETR (transformers)", ConditionalDetrConfig),
}
"""model_type → in words, and the class of its configuration."""
_ATTENTIONS: dict[Part, str] = {
    "decoder": "queries and keys of its attentions, in which Conditional DETR projects content and position apart",
    "prior": "there is no Gaussian in Conditional DETR",
}
_LAYER = r"model\.((?:en|de)coder\.layers\.\d+)\."
_ENCODER, _DECODER = r"model\.(encoder\.layers\.\d+)\.", r"model\.(decoder\.layers\.\d+)\."
_NAMES = (
    (r"model\.input_projection\.", "input_proj.0."),
    (r"model\.query_position_embeddings\.weight$", "decoder.query_position"),
    (r"class_labels_classifier\.", "decoder.class_head."),
    (r"bbox_predictor\.", "decoder.box_heads.0."),
    (r"model\.decoder\.layernorm\.", "decoder.norm."),
    (_LAYER + r"(?:mlp\.)?fc([12])\.", r"\1.linear\2."),
    (_LAYER + r"self_attn_layer_norm\.", r"\1.norm1."),
    (_DECODER + r"encoder_attn_layer_norm\.", r"\1.norm2."),
    (_ENCODER + r"final_layer_norm\.", r"\1.norm2."),
    (_DECODER + r"final_layer_norm\.", r"\1.norm3."),
    (_LAYER + r"self_attn\.(?:o|out)_proj\.", r"\1.self_attn.out_proj."),
    (_DECODER + r"encoder_attn\.(?:o|out)_proj\.", r"\1.cross_attn.out_proj."),
    (_LAYER + r"self_attn\.([qkv])_proj\.", r"\1.self_attn.\2_proj."),
    (_DECODER + r"encoder_attn\.([qkv])_proj\.", r"\1.cross_attn.\2_proj."),
    # Conditional DETR, by the names of its earlier versions and of its files.
    (_DECODER + r"sa_v_proj\.", r"\1.self_attn.v_proj."),
    (_DECODER + r"ca_v_proj\.", r"\1.cross_attn.v_proj."),
)
"""Their names → ours, but for the backbone."""
_BACKBONE = re.compile(r"model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?")
_NOT_MAPPED = re.compile(
    r"model\.decoder\.(query_scale\.|ref_point_head\.)"
    r"|model\.decoder\.layers\.\d+\.((self_attn|encoder_attn)\.[qk]_\w+_proj|[sc]a_[qk]\w+_proj)\."
)
"""Of Conditional DETR."""


def read_transformers(name: str, config_text: str, read: Callable[[], Mapping[str, Tensor]]) -> Source:
    """A model of transformers in this project's names.

    Args:
        name: folder or repository.
        config_text: its config.json.
        read: gives its weights.

    Raises:
        ValueError: another kind of model, or a variant that this project has no equivalent of; says which.
    """
    said = json.loads(config_text)
    model_type = said.get("model_type")
    if model_type not in KINDS:
        raise ValueError(
            f"{name} holds a model of transformers of the type {cut(model_type)!r}: expected one of "
            f"{', '.join(KINDS)}. Give one of those, or a model of this project"
        )
    kind, settings = KINDS[model_type]
    values: dict[str, Any] = {**settings(use_timm_backbone=False).to_dict(), **said}
    _refuse(name, kind, values, said)
    conditional = model_type == "conditional_detr"
    weights = read()
    backbone = _backbone(name, said)
    own, foreign = _renamed(weights, conditional)
    if foreign:
        raise ValueError(
            f"{name} holds {len(foreign)} weights that no {kind} for detection has, such as {cut(foreign[0])}: "
            f"expected {'ConditionalDetrForObjectDetection' if conditional else 'DetrForObjectDetection'}, with a "
            "ResNet"
        )
    architecture = _architecture(name, own, backbone)
    stages = len(architecture["depths"])
    fields = {
        "backbone": asdict(BackboneConfig("resnet", options=architecture, frozen_norm=True, frozen_stages=2)),
        "strides": (2 * 2 ** (stages + bool(architecture["downsample_in_first_stage"])),),
        "hidden_dim": values["d_model"],
        "num_heads": values["encoder_attention_heads"],
        "num_queries": values["num_queries"],
        "feedforward_dim": values["encoder_ffn_dim"],
        "encoder_layers": values["encoder_layers"],
        "decoder_layers": values["decoder_layers"],
        "dropout": values["dropout"],
        "cross_attention": "smca" if conditional else "dense",
        "query_init": "grid" if conditional else "random",
        "position_encoding": "detr",
        "padding_cells": "nearest",
        "class_scores": "sigmoid" if conditional else "softmax",
    }
    if conditional:
        own["decoder.query_center"] = _reference_points(name, weights)
    classes, notes = _classes(name, own, said, softmax=not conditional)
    # By way of JSON, whose values are held to the types of the fields: they may come from anywhere.
    config = ModelConfig.from_json(json.dumps({**fields, **classes}), f"{name}, by its config.json")
    return checked(Source(name, kind, config, own, tuple(notes), _ATTENTIONS if conditional else {}))


def _refuse(name: str, kind: str, values: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """What there is no equivalent of."""
    wanted = {
        "position_embedding_type": ("sine", "sine positions"),
        "activation_function": ("relu", "ReLU in the feed-forward blocks"),
        "decoder_ffn_dim": (values["encoder_ffn_dim"], "feed-forward blocks as wide in the decoder as in the encoder"),
        "decoder_attention_heads": (
            values["encoder_attention_heads"],
            "as many heads in the decoder as in the encoder",
        ),
        "num_channels": (3, "colour images"),
    }
    for key, (value, words) in wanted.items():
        if values[key] != value:
            raise ValueError(
                f"{name}, a {kind}, has {key} = {cut(values[key])}: expected {words} ({cut(value)}), which is all "
                "that there is here. Take another model"
            )
    inner = said.get("backbone_config") or {}
    if values["dilation"] or (isinstance(inner, dict) and inner.get("output_stride") == 16):
        raise ValueError(
            f"{name}, a {kind}, is a DC5 model, whose last stage is dilated: expected a ResNet of stride 32, which is "
            "what there is here. Take the model without DC5"
        )


def _backbone(name: str, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers' settings of the ResNet; {} of timm's, which has one form only."""
    inner = said.get("backbone_config")
    if isinstance(inner, dict) and inner.get("model_type") == "resnet":
        return inner
    timm = inner.get("backbone") if isinstance(inner, dict) and inner.get("model_type") == "timm_backbone" else None
    if inner is None and said.get("use_timm_backbone", True):
        timm = said.get("backbone", "resnet50")
    if timm not in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        shown = inner.get("model_type") if timm is None and isinstance(inner, dict) else timm
        raise ValueError(
            f"{name} has the backbone {cut(shown)!r}: expected a ResNet, of timm or transformers. Take a model with one"
        )
    return {}


def _renamed(weights: Mapping[str, Tensor], conditional: bool) -> tuple[dict[str, Tensor], list[str]]:
    """By our names, and the names that no such model has."""
    own: dict[str, Tensor] = {}
    foreign: list[str] = []
    for name, value in weights.items():
        if is_counter(name) or (conditional and _NOT_MAPPED.match(name)):
            continue
        inside = _BACKBONE.match(name)
        if inside is not None:
            body = name[inside.end() :]
            new = body if body.startswith(("embedder.", "encoder.")) else resnet.renamed(body)
            new = None if new is None else f"backbone.body.{new}"
        else:
            new = next((re.sub(f"^{p}", to, name) for p, to in _NAMES if re.match(p, name)), None)
        if new is None:
            foreign.append(name)
        else:
            own[new] = value
    return own, foreign


def _architecture(name: str, own: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the backbone up to the stage that is read; weights of later ones are removed from `own`."""
    prefix = "backbone.body."
    try:
        options = resnet.architecture({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)})
    except (KeyError, IndexError) as error:
        raise ValueError(f"{name} lacks {cut(error)} of its backbone: take another copy") from error
    read, stages = settings.get("out_features"), len(options["depths"])
    if isinstance(read, list) and read and f"stage{stages}" not in read:
        last = int(re.sub(r"\D", "", str(read[-1])) or stages)
        for key in ("depths", "hidden_sizes"):
            options[key] = options[key][:last]
        for key in [k for k in own if re.match(rf"{prefix}encoder\.stages\.(\d+)\.", k)]:
            if int(key.split(".")[4]) >= last:
                del own[key]
    defaults = ResNetConfig()
    more = ("hidden_act", "downsample_in_first_stage", "downsample_in_bottleneck")
    return options | {key: settings.get(key, getattr(defaults, key)) for key in more}


def _reference_points(name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """Conditional DETR's: logits (x, y) of each query's, [N, 2]."""
    place = "model.decoder.ref_point_head.layers"
    try:
        first, last = ([weights[f"{place}.{i}.{kind}"] for kind in ("weight", "bias")] for i in range(2))
        hidden = functional.linear(weights["model.query_position_embeddings.weight"], *first).relu()
        return functional.linear(hidden, *last)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{name} lacks {cut(error)}: expected a whole Conditional DETR. Take another copy") from error


def _classes(
    name: str, own: dict[str, Tensor], said: Mapping[str, Any], *, softmax: bool
) -> tuple[dict[str, Any], list[str]]:
    """Fields of the classes, whose rows are what remains of the class head; columns named "N/A" are left out."""
    if "decoder.class_head.weight" not in own or "decoder.class_head.bias" not in own:
        raise ValueError(
            f"{name} lacks its class head (class_labels_classifier): expected a detector. Take another model"
        )
    rows = own["decoder.class_head.weight"].shape[0]
    columns = rows - softmax
    labels = said.get("id2label")
    names = [str(labels.get(str(c), "")) for c in range(columns)] if isinstance(labels, dict) else []
    if not names or any(label in ("", f"LABEL_{column}") for column, label in enumerate(names)):
        return {"num_classes": columns}, ["its config.json names no classes (id2label)"]
    kept = [column for column, label in enumerate(names) if label != "N/A"]
    notes = []
    if len(kept) < columns:
        index = torch.tensor([*kept, rows - 1] if softmax else kept)
        for kind in ("weight", "bias"):
            own[f"decoder.class_head.{kind}"] = own[f"decoder.class_head.{kind}"][index]
        notes.append(dropped(columns - len(kept), softmax))
    found = [names[column] for column in kept]
    ids = kept if len(kept) < columns or found == list(COCO_CLASSES.values()) else range(columns)
    return {"num_classes": len(kept), "class_names": tuple(found), "category_ids": tuple(ids)}, notes
