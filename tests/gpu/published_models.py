"""DETR and single-scale SMCA as their authors' papers and programs define them, written down once more as plain functions of a
checkpoint's weights: what a converted model is compared with. Everything is as there: cells at (i, j), masks by nearest neighbour,
positions by counting. For one or several padded images.

Shape letters: B images, N queries, C channels, h heads, L = H·W cells, K classes and one more row, M decoder layers.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

Weights = dict[str, Tensor]

HEADS = 2
SMALL: dict[str, Any] = {"width": 16, "wide": 24, "encoder_layers": 2, "decoder_layers": 3, "queries": 5, "rows": 92}
"""Sizes of a checkpoint that is quick to compute."""


def draw_checkpoint(
    kind: str, *, pre_norm: bool = False, basic: bool = False, seed: int = 0, **changes: int
) -> Weights:
    """Random weights by the names of the authors' files.

    Args:
        kind: "detr", or the authors' --dynamic_scale: "type1" to "type4".
        pre_norm: DETR's --pre_norm.
        basic: a ResNet of basic blocks (18, 34), not of bottlenecks.
        seed: of the numbers.
        changes: to ``SMALL``.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {**SMALL, **changes}
    width, wide = sizes["width"], sizes["wide"]
    w: Weights = {}

    def draw(name: str, *shape: int, around: float = 0.0, scale: float | None = None) -> None:
        fan = math.prod(shape[1:]) if len(shape) > 1 else 9
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        w[name] = around + noise * (fan**-0.5 if scale is None else scale)

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs)
        draw(f"{name}.bias", outputs)

    def norm(name: str, channels: int) -> None:
        draw(f"{name}.weight", channels, around=1.0, scale=0.1)
        draw(f"{name}.bias", channels, scale=0.1)

    def batch_norm(name: str, channels: int) -> None:
        norm(name, channels)
        draw(f"{name}.running_mean", channels, scale=0.1)
        w[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)

    body = "backbone.0.body"
    draw(f"{body}.conv1.weight", 8, 3, 7, 7)
    batch_norm(f"{body}.bn1", 8)
    channels = 8
    for stage, blocks in enumerate((1, 2, 1, 1), 1):
        inner = 2 * 2**stage
        out = inner if basic else 4 * inner
        kernels = [(inner, 3), (out, 3)] if basic else [(inner, 1), (inner, 3), (out, 1)]
        for block in range(blocks):
            place, before = f"{body}.layer{stage}.{block}", channels
            for number, (outputs, side) in enumerate(kernels, 1):
                draw(f"{place}.conv{number}.weight", outputs, before, side, side)
                batch_norm(f"{place}.bn{number}", outputs)
                before = outputs
            if block == 0 and (stage > 1 or channels != out):
                draw(f"{place}.downsample.0.weight", out, channels, 1, 1)
                batch_norm(f"{place}.downsample.1", out)
            channels = out

    def attention(name: str) -> None:
        draw(f"{name}.in_proj_weight", 3 * width, width)
        draw(f"{name}.in_proj_bias", 3 * width)
        linear(f"{name}.out_proj", width, width)

    draw("input_proj.weight", width, channels, 1, 1)
    draw("input_proj.bias", width)
    draw("query_embed.weight", sizes["queries"], width, scale=1.0)
    linear("class_embed", sizes["rows"], width)
    for number, outputs in enumerate((width, width, 4)):
        linear(f"bbox_embed.layers.{number}", outputs, width)
    for part, layers in (("encoder", sizes["encoder_layers"]), ("decoder", sizes["decoder_layers"])):
        for layer in range(layers):
            place = f"transformer.{part}.layers.{layer}"
            attention(f"{place}.self_attn")
            linear(f"{place}.linear1", wide, width)
            linear(f"{place}.linear2", width, wide)
            for number in (1, 2, 3)[: 2 + (part == "decoder")]:
                norm(f"{place}.norm{number}", width)
            if part == "decoder":
                attention(f"{place}.multihead_attn")
            if part == "decoder" and kind != "detr":
                norm(f"{place}.norm4", width)
                linear(f"{place}.point2", 2 * HEADS, width)
                scales = {"type1": 0, "type2": 1, "type3": 2, "type4": 3}[kind]
                if scales:
                    linear(f"{place}.point3", scales * HEADS, width)
                for number, outputs in enumerate((width, width, 2)) if layer == 0 else ():
                    linear(f"{place}.point1.layers.{number}", outputs, width)
    norm("transformer.decoder.norm", width)
    if pre_norm:
        norm("transformer.encoder.norm", width)
    return w


def options(kind: str, **changes: Any) -> Namespace:
    """What the authors' programs keep beside the weights (and more that nobody here reads)."""
    known = {
        "nheads": HEADS,
        "dropout": 0.1,
        "dilation": False,
        "position_embedding": "sine",
        "pre_norm": False,
        "lr": 1e-4,
    }
    known |= {"masks": False, "output_dir": "runs", "backbone": "resnet50"}
    if kind != "detr":
        known |= {"smooth": 5.0, "dynamic_scale": kind}
    return Namespace(**{**known, **changes})


def save_checkpoint(path: Path, kind: str, weights: Weights, **args: Any) -> str:
    torch.save({"model": weights, "optimizer": {}, "lr_scheduler": {}, "epoch": 7, "args": options(kind, **args)}, path)
    return str(path)


def detr_of_transformers(folder: Path, kind: str = "detr", **changes: Any) -> Any:
    """A random DETR or Conditional DETR of transformers with a ResNet of transformers, as it saves it."""
    torch.manual_seed(0)
    depths = [1, 2, 1, 1]
    backbone = ResNetConfig(
        depths=depths, hidden_sizes=[8, 16, 24, 32], embedding_size=8, layer_type="basic", out_features=["stage4"]
    )
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "num_queries": 5, "num_labels": 4}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    config, network = {
        "detr": (DetrConfig, DetrForObjectDetection),
        "conditional_detr": (ConditionalDetrConfig, ConditionalDetrForObjectDetection),
    }[kind]
    model: Any = network(config(backbone_config=backbone, use_timm_backbone=False, **{**sizes, **changes}))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            buffer.add_(torch.rand_like(buffer) if name.endswith("running_var") else 0.1 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return model


def features_of(w: Weights, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] → the last stage's map, [B, channels, ⌈H/32⌉, ⌈W/32⌉]."""
    body = "backbone.0.body"

    def convolve(x: Tensor, conv: str, norm: str, stride: int) -> Tensor:
        kernel = w[f"{conv}.weight"]
        x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, weight, bias = (
            w[f"{norm}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return weight * (x - mean) / (var + 1e-5).sqrt() + bias

    x = convolve(pixels, f"{body}.conv1", f"{body}.bn1", 2).relu()
    x = functional.max_pool2d(x, 3, stride=2, padding=1)
    for stage in (1, 2, 3, 4):
        block = 0
        while f"{body}.layer{stage}.{block}.conv1.weight" in w:
            place = f"{body}.layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            convolutions = 3 if f"{place}.conv3.weight" in w else 2
            y = x
            for number in range(1, convolutions + 1):  # it is the 3×3 convolution that strides, the first of two
                at = stride if number == convolutions - 1 else 1
                y = convolve(y, f"{place}.conv{number}", f"{place}.bn{number}", at)
                y = y.relu() if number < convolutions else y
            if f"{place}.downsample.0.weight" in w:
                x = convolve(x, f"{place}.downsample.0", f"{place}.downsample.1", stride)
            x = (x + y).relu()
            block += 1
    return x


def detect(
    w: Weights,
    features: Tensor,
    padding: Tensor,
    sizes: Tensor,
    *,
    kind: str,
    smooth: float = 8.0,
    pre_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """The transformer and the heads.

    Args:
        w: weights.
        features: [B, channels, H, W].
        padding: [B, height, width] bool of the padded images, True = padded.
        sizes: [B, 2] (height, width) of the unpadded ones.
        kind, pre_norm: as of ``draw_checkpoint``.
        smooth: the authors' --smooth.

    Returns:
        Outputs of the class head [M, B, N, K + 1] and boxes [M, B, N, 4].
    """
    batch, _, height, width = features.shape
    mask = functional.interpolate(padding[None].double(), size=(height, width))[0].bool()
    channels = w["query_embed.weight"].shape[1]
    pos = _positions(mask, channels)
    mask = mask.flatten(1)
    memory = functional.conv2d(features, w["input_proj.weight"], w["input_proj.bias"]).flatten(2).transpose(1, 2)
    for layer in range(SMALL["encoder_layers"]):
        place = f"transformer.encoder.layers.{layer}"
        y = _norm(w, f"{place}.norm1", memory) if pre_norm else memory
        memory = memory + _attend(w, f"{place}.self_attn", y + pos, y + pos, y, mask)
        memory = memory if pre_norm else _norm(w, f"{place}.norm1", memory)
        memory = _feed_forward(w, place, "norm2", memory, pre_norm)
    if pre_norm:
        memory = _norm(w, "transformer.encoder.norm", memory)

    query = w["query_embed.weight"].expand(batch, -1, -1)
    t = torch.zeros_like(query)
    reference = torch.zeros(batch, query.shape[1], 2, dtype=torch.float64)
    logits, boxes = [], []
    for layer in range(SMALL["decoder_layers"]):
        place = f"transformer.decoder.layers.{layer}"
        bias = torch.zeros(batch, HEADS, query.shape[1], height * width, dtype=torch.float64)
        if kind != "detr":
            state = _norm(w, f"{place}.norm4", t + query)  # of the query as it enters the layer
            if layer == 0:
                reference = _mlp(w, f"{place}.point1", state)
            bias = _log_gaussian(w, place, state, reference, sizes, (height, width), kind, smooth)
        y = _norm(w, f"{place}.norm1", t) if pre_norm else t
        t = t + _attend(w, f"{place}.self_attn", y + query, y + query, y)
        t = t if pre_norm else _norm(w, f"{place}.norm1", t)
        y = _norm(w, f"{place}.norm2", t) if pre_norm else t
        t = t + _attend(w, f"{place}.multihead_attn", y + query, memory + pos, memory, mask, bias)
        t = t if pre_norm else _norm(w, f"{place}.norm2", t)
        t = _feed_forward(w, place, "norm3", t, pre_norm)
        out = _norm(w, "transformer.decoder.norm", t)
        logits.append(_linear(w, "class_embed", out))
        boxes.append((_mlp(w, "bbox_embed", out) + functional.pad(reference, (0, 2))).sigmoid())
    return torch.stack(logits), torch.stack(boxes)


def _log_gaussian(
    w: Weights,
    place: str,
    state: Tensor,
    reference: Tensor,
    sizes: Tensor,
    cells: tuple[int, int],
    kind: str,
    smooth: float,
) -> Tensor:
    """log G [B, h, N, L]: −(r_x²·dx² + r_y²·dy²)/smooth, dx and dy from the centre to cell (i, j), in cells."""
    batch, count, _ = state.shape
    offset = _linear(w, f"{place}.point2", state).reshape(batch, count, HEADS, 2)
    center = (reference.sigmoid() * sizes.flip(-1)[:, None] / 32)[:, :, None] + offset  # [B, N, h, 2]
    r = torch.ones(batch, count, HEADS, 2, dtype=torch.float64)
    if kind != "type1":
        r = r * _linear(w, f"{place}.point3", state).reshape(batch, count, HEADS, -1)
    found = torch.empty(batch, HEADS, count, *cells, dtype=torch.float64)
    for j in range(cells[0]):
        for i in range(cells[1]):
            distance = (center - torch.tensor([float(i), float(j)], dtype=torch.float64)) ** 2
            found[..., j, i] = (-(distance * r**2).sum(-1) / smooth).transpose(1, 2)
    return found.flatten(3)


def _positions(mask: Tensor, channels: int) -> Tensor:
    """[B, H, W] → [B, L, C]: half the channels for the row, half for the column, each counted from 1 among cells that are
    not padded,
    over the last count and 10⁻⁶; sine and cosine in turn."""
    shown, half = (~mask).double(), channels // 2
    parts = []
    for axis in (1, 2):
        counted = shown.cumsum(axis)
        last = counted.select(axis, counted.shape[axis] - 1).unsqueeze(axis)
        angle = counted / (last + 1e-6) * 2 * math.pi
        waves = [
            (torch.cos if channel % 2 else torch.sin)(angle / 10000 ** (2 * (channel // 2) / half))
            for channel in range(half)
        ]
        parts.append(torch.stack(waves, dim=-1))
    return torch.cat(parts, dim=-1).flatten(1, 2)


def _attend(
    w: Weights,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """PyTorch's attention with a joint projection; `bias` [B, h, N, L] is added to the logits."""
    if bias is not None:
        bias = bias.flatten(0, 1)
    out, _ = functional.multi_head_attention_forward(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        query.shape[-1],
        HEADS,
        w[f"{name}.in_proj_weight"],
        w[f"{name}.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        w[f"{name}.out_proj.weight"],
        w[f"{name}.out_proj.bias"],
        training=False,
        key_padding_mask=None
        if mask is None
        else torch.zeros_like(mask, dtype=torch.float64).masked_fill(mask, -math.inf),
        attn_mask=bias,
        need_weights=False,
    )
    return out.transpose(0, 1)


def _feed_forward(w: Weights, place: str, norm: str, x: Tensor, pre_norm: bool) -> Tensor:
    y = _norm(w, f"{place}.{norm}", x) if pre_norm else x
    x = x + _linear(w, f"{place}.linear2", _linear(w, f"{place}.linear1", y).relu())
    return x if pre_norm else _norm(w, f"{place}.{norm}", x)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    for number in range(3):
        x = _linear(w, f"{name}.layers.{number}", x.relu() if number else x)
    return x


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
