"""The whole model once more, in torch's own parts and by other means, with configurations and inputs to try it on.

What `smca.reference.model` is compared with. The tests load this file by its path: tests/ is no package.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from smca.reference.config import ModelConfig
from smca.reference.parameters import parameter_shapes

CHANNELS = (5, 7, 6)  # of the backbone's maps
PADDED_SIZE = (64, 80)
VALID_SIZES = np.array([[64, 80], [33, 50], [16, 41]])  # pixels; at strides 8, 16, 32 the second has 5, 3, 2 rows


Config = functools.partial(
    ModelConfig,
    num_classes=3,
    hidden_dim=8,
    num_heads=2,
    num_queries=6,
    strides=(16,),
    encoder_layers=2,
    decoder_layers=3,
    feedforward_dim=12,
    prior_sigma_px=20.0,
)
"""A small model."""

SINGLE_SCALE = [
    Config(pre_norm=pre, prior_scale=scale, query_init=init, box_refinement=refine)
    for pre, scale, init, refine in itertools.product(
        [False, True], ["fixed", "single", "independent"], ["random", "grid"], [False, True]
    )
] + [
    Config(pre_norm=pre, cross_attention="dense", box_refinement=refine)
    for pre, refine in itertools.product([False, True], [False, True])
]
ATTENTION, CONV, PYRAMID = ("attention", (1,)), ("conv", ()), ("pyramid_conv", ())
MULTI_SCALE = [
    Config(
        strides=(8, 16, 32), encoder=encoder, cross_level_blocks=cross, pre_norm=pre, prior_scale=scale,
        prior_heads=heads, scale_selection=selection, query_init="grid" if pre else "random", box_refinement=pre,
    )
    for (encoder, cross), pre, scale, heads, selection in itertools.product(
        [ATTENTION, CONV, PYRAMID], [False, True], ["fixed", "single", "independent"], ["independent", "shared"], [True, False]
    )
] + [
    Config(strides=(8, 16, 32), encoder=encoder, cross_level_blocks=cross, pre_norm=pre, cross_attention="dense",
           scale_selection=selection)
    for (encoder, cross), pre, selection in itertools.product([ATTENTION, CONV, PYRAMID], [False, True], [True, False])
]  # fmt: skip
OTHER_LEVELS = [
    Config(prior_heads="shared"),
    Config(encoder="conv", pre_norm=True),
    Config(strides=(16, 32), cross_level_blocks=(0, 1), pre_norm=True),
    Config(encoder="pyramid_conv", pre_norm=True),
    Config(strides=(8, 32), encoder="pyramid_conv"),
    Config(strides=(8, 16, 24, 32), cross_level_blocks=(0,)),
    Config(strides=(8, 16, 32, 64), encoder="conv", pre_norm=True),
    Config(strides=(8, 16, 32, 64), encoder="pyramid_conv", pre_norm=True),
    Config(strides=(8, 16, 32, 64), encoder="conv", halve_finest=True),
    Config(strides=(8, 16, 32), encoder="pyramid_conv", halve_finest=True, pre_norm=True),
    Config(strides=(8, 16, 32), cross_level_blocks=(1,), halve_finest=True),
    Config(strides=(8,), halve_finest=True, encoder_layers=0),
    Config(cross_attention="dense", class_scores="softmax"),
    Config(strides=(8, 32), encoder="pyramid_conv", class_scores="softmax", box_refinement=True),
]


def config_id(config: ModelConfig) -> str:
    words = ["-".join(map(str, config.strides)), config.encoder, *map(str, config.cross_level_blocks)]
    words += ["pre" if config.pre_norm else "post", config.cross_attention]
    if config.cross_attention == "smca":
        words += [config.prior_scale, config.prior_heads, config.query_init]
    if len(config.strides) > 1:
        words.append("selected" if config.scale_selection else "mean")
    words += ["halved"] if config.halve_finest else []
    words += ["softmax"] if config.class_scores == "softmax" else []
    return "-".join([*words, "refined"] if config.box_refinement else words)


def channels_of(config: ModelConfig, given: int | None = None) -> list[int]:
    """Channels of the first `given` levels (None: all)."""
    return [CHANNELS[j % 3] for j in range(given or len(config.strides))]


def random_params(config: ModelConfig, seed: int = 0, given: int | None = None) -> dict[str, Any]:
    """Every parameter away from 0; norm weights around 1, or else post-norm layers forget what they were given."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(config, channels_of(config, given))
    params = {key: rng.normal(size=shape) * 0.5 for key, shape in shapes.items()}
    return {k: 1.0 + 0.5 * v if "norm" in k and k.endswith("weight") else v for k, v in params.items()}


def random_features(
    config: ModelConfig, seed: int = 1, given: int | None = None, size: tuple[int, int] = PADDED_SIZE, batch: int = 3
) -> list[Any]:
    """The first `given` maps (None: all) of a batch that is padded to `size` pixels."""
    rng = np.random.default_rng(seed)
    sizes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in config.strides]
    return [rng.normal(size=(batch, c, *sizes[j])) for j, c in enumerate(channels_of(config, given))]


def assert_same(got: dict[str, Any], want: dict[str, Any], atol: float = 1e-11) -> None:
    assert set(got) == set(want) >= {"logits", "boxes"}
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=atol, err_msg=name)


def detr_mask_and_coordinates(valid_sizes: Any, padded_size: Any, size: Any) -> tuple[Any, Any, Any]:
    """Padding [B, H, W] and coordinates (y, x) in 0–1 of a map as DETR has them, from a mask of pixels."""
    pixels = torch.ones(len(valid_sizes), *padded_size)
    for mask, (height, width) in zip(pixels, valid_sizes.tolist(), strict=True):
        mask[: int(height), : int(width)] = 0
    pad = functional.interpolate(pixels[:, None], size=tuple(size))[:, 0].bool()
    counts = [(~pad).double().cumsum(axis) for axis in (1, 2)]
    return pad, *(count / (count.amax(1 + axis, keepdim=True) + 1e-6) for axis, count in enumerate(counts))


def in_torch(
    params: Any, features: Any, valid_sizes: Any, config: ModelConfig, padded_size: Any = None
) -> dict[str, Any]:
    """The model, from multi_head_attention_forward with the prior as an additive mask, conv2d and interpolate."""
    p = {key: torch.from_numpy(value) for key, value in params.items()}
    sigmas = len(config.prior_sigma_px) if isinstance(config.prior_sigma_px, tuple) else 1
    c, heads, strides, levels = config.hidden_dim, config.num_heads, config.strides, range(len(config.strides))

    def lin(x: Any, name: str) -> Any:
        return functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (c,), p[f"{name}.weight"], p[f"{name}.bias"])

    def mlp(x: Any, name: str) -> Any:
        hidden = functional.relu(lin(functional.relu(lin(x, f"{name}.layers.0")), f"{name}.layers.1"))
        return lin(hidden, f"{name}.layers.2")

    def ffn(x: Any, name: str) -> Any:
        return lin(functional.relu(lin(x, f"{name}.linear1")), f"{name}.linear2")

    def attend(q: Any, k: Any, v: Any, name: str, key_mask: Any = None, bias: Any = None) -> Any:
        out, _ = functional.multi_head_attention_forward(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), c, heads, None,
            torch.cat([p[f"{name}.{x}_proj.bias"] for x in "qkv"]), None, None, False, 0.0,
            p[f"{name}.out_proj.weight"], p[f"{name}.out_proj.bias"], training=False, need_weights=False,
            key_padding_mask=key_mask, attn_mask=bias, use_separate_proj_weight=True,
            **{f"{x}_proj_weight": p[f"{name}.{x}_proj.weight"] for x in "qkv"},
        )  # fmt: skip
        return out.transpose(0, 1)

    def waves(u: Any) -> Any:  # [..., ] → [..., C/2], DETR's interleaved way
        divisor = 10000 ** (torch.arange(0, c // 2, 2).double() / (c // 2))
        return torch.stack([(u[..., None] / divisor).sin(), (u[..., None] / divisor).cos()], dim=-1).flatten(-2)

    def place(j: int, stride: int, size: Any) -> tuple[Any, ...]:
        """Of a level: the images' sizes in cells, padding, mask of logits, position encoding, centres of the cells."""
        size_px = torch.from_numpy(np.asarray(valid_sizes)).double() / stride
        ys, xs = torch.arange(size[0]).double() + 0.5, torch.arange(size[1]).double() + 0.5
        pad = ((ys - 0.5)[None, :, None] >= size_px[:, :1, None]) | ((xs - 0.5)[None, None] >= size_px[:, 1:, None])
        pos_y = waves(ys / size_px[:, :1] * 2 * torch.pi)[:, :, None].expand(-1, -1, size[1], -1)
        pos_x = waves(xs / size_px[:, 1:] * 2 * torch.pi)[:, None].expand(-1, size[0], -1, -1)
        if padded_size is not None:
            pad, detr_y, detr_x = detr_mask_and_coordinates(np.asarray(valid_sizes), padded_size, size)
            pos_y, pos_x = waves(detr_y * 2 * torch.pi), waves(detr_x * 2 * torch.pi)
        embed = p["level_embed"][j] if "level_embed" in p else torch.zeros(c, dtype=torch.float64)
        mask = torch.zeros(pad.shape, dtype=torch.float64).masked_fill(pad, -torch.inf).flatten(1)
        position = torch.cat([pos_y, pos_x], dim=-1).flatten(1, 2) + embed
        return size_px, pad, mask, position, torch.stack([xs.repeat(size[0]), ys.repeat_interleave(size[1])], dim=-1)

    def map_of(y: Any, j: int) -> Any:
        return y.transpose(1, 2).unflatten(2, tuple(sizes[j]))

    x, sizes, places = [], [], []
    for j in levels:
        weight, bias = p[f"input_proj.{j}.weight"], p[f"input_proj.{j}.bias"]
        if j < len(features):
            out = functional.conv2d(torch.from_numpy(features[j]), weight, bias)
        else:
            before = torch.from_numpy(features[-1]) if j == len(features) else out
            out = functional.conv2d(before.masked_fill(places[-1][1][:, None], 0.0), weight, bias, 2, 1)
        sizes.append(out.shape[2:])
        places.append(place(j, strides[j], sizes[j]))
        x.append(out.flatten(2).transpose(1, 2))
    h_w, paddings, masks, pos, key_xy = (list(each) for each in zip(*places, strict=True))

    def mix(y: Any, n: str, block: int) -> Any:
        if config.encoder == "conv":

            def depthwise(z: Any, kernel: str, stride: int = 1) -> Any:
                weight, bias = (p[f"{n}.conv.{kernel}.{each}"] for each in ("weight", "bias"))
                return functional.conv2d(z, weight, bias, stride, 3, groups=c)

            u = [depthwise(map_of(lin(y[j] + pos[j], f"{n}.conv.in_proj"), j), f"own.{j}") for j in levels]
            v = list(u)
            for fine, coarse in itertools.pairwise(levels):
                v[coarse] = v[coarse] + depthwise(u[fine], "finer", 2)
                v[fine] = v[fine] + functional.interpolate(
                    depthwise(u[coarse], "coarser"), tuple(sizes[fine]), mode="bilinear", align_corners=True
                )
            return [lin(each.flatten(2).transpose(1, 2), f"{n}.conv.out_proj") for each in v]
        if config.encoder == "pyramid_conv":
            maps = [map_of(y[j], j).masked_fill(paddings[j][:, None], 0) for j in levels]
            out = []
            for j in levels:
                kernels = {k: p.get(f"{n}.conv.{k}.weight") for k in ("own", "finer", "coarser")}
                total = functional.conv2d(maps[j], kernels["own"], padding=1, groups=c)
                others = []
                if j > 0:
                    step = strides[j] // strides[j - 1]
                    others.append(functional.conv2d(maps[j - 1], kernels["finer"], stride=step, padding=1, groups=c))
                if j + 1 < len(strides):
                    coarse = functional.conv2d(maps[j + 1], kernels["coarser"], padding=1, groups=c)
                    others.append(functional.interpolate(coarse, scale_factor=strides[j + 1] // strides[j]))
                for other in others:
                    rows, columns = (min(a, b) for a, b in zip(other.shape[2:], sizes[j], strict=True))
                    total[:, :, :rows, :columns] += other[:, :, :rows, :columns]
                out.append(lin(total.flatten(2).transpose(1, 2), f"{n}.conv.out_proj"))
            return out
        if block in config.cross_level_blocks:
            keys, values, mask = torch.cat([y[j] + pos[j] for j in levels], 1), torch.cat(y, 1), torch.cat(masks, 1)
            return [attend(y[j] + pos[j], keys, values, f"{n}.self_attn", mask) for j in levels]
        return [attend(y[j] + pos[j], y[j] + pos[j], y[j], f"{n}.self_attn", masks[j]) for j in levels]

    if config.encoder == "conv":
        x = [each.masked_fill(padding.flatten(1)[..., None], 0.0) for each, padding in zip(x, paddings, strict=True)]
    for i in range(config.encoder_layers):
        n = f"encoder.layers.{i}"
        if config.pre_norm:
            mixed = mix([norm(each, f"{n}.norm1") for each in x], n, i)
            x = [a + b for a, b in zip(x, mixed, strict=True)]
            x = [each + ffn(norm(each, f"{n}.norm2"), n) for each in x]
        else:
            x = [norm(a + b, f"{n}.norm1") for a, b in zip(x, mix(x, n, i), strict=True)]
            x = [norm(each + ffn(each, n), f"{n}.norm2") for each in x]
    if config.pre_norm:
        x = [norm(each, "encoder.norm") for each in x]
    if config.halve_finest:
        finest = map_of(x[0], 0).masked_fill(paddings[0][:, None], 0.0)
        finest = functional.conv2d(finest, p["halve.weight"], p["halve.bias"], 2, 1)
        strides = (2 * strides[0], *strides[1:])
        h_w[0], _, masks[0], pos[0], key_xy[0] = place(0, strides[0], finest.shape[2:])
        x[0] = finest.flatten(2).transpose(1, 2)

    query = p["decoder.query_position"].expand(len(x[0]), -1, -1)
    t = torch.zeros_like(query)
    reference = torch.zeros(*query.shape[:2], 4, dtype=torch.float64)
    all_logits, all_boxes = [], []
    for i in range(config.decoder_layers):
        n, entering = f"decoder.layers.{i}", t
        if config.pre_norm:
            y = norm(t, f"{n}.norm1")
            t = t + attend(y + query, y + query, y, f"{n}.self_attn")
        else:
            t = norm(t + attend(t + query, t + query, t, f"{n}.self_attn"), f"{n}.norm1")
        selects = config.scale_selection and len(strides) > 1
        if config.cross_attention == "smca" or selects:
            o = norm((t if config.prior_state == "attended" else entering) + query, f"{n}.state_norm")
        biases = [None for _ in levels]
        if config.cross_attention == "smca":
            if i == 0:
                center = mlp(o, "decoder.center_head")
                if config.query_init == "grid":
                    center = center + p["decoder.query_center"]
                reference = torch.cat([center, torch.zeros_like(center)], dim=-1)
            for j in levels:
                log_g = []
                for head in range(heads):
                    number = (0 if config.prior_heads == "shared" else head) * len(strides) + j
                    offset = lin(o, f"{n}.prior.offset_head")[..., 2 * number : 2 * number + 2]
                    r = torch.ones_like(offset)
                    if config.prior_scale == "single":
                        r = lin(o, f"{n}.prior.scale_head")[..., number : number + 1].expand_as(offset)
                    elif config.prior_scale == "independent":
                        r = lin(o, f"{n}.prior.scale_head")[..., 2 * number : 2 * number + 2]
                    c_xy = reference[..., :2].sigmoid() * h_w[j].flip(-1)[:, None] + offset
                    beta = (
                        2
                        * (torch.tensor(config.prior_sigma_px).double().flatten()[min(j, -1 + sigmas)] / strides[j])
                        ** 2
                    )
                    squared = (key_xy[j] - c_xy[:, :, None]) ** 2 * (r**2 / beta)[:, :, None]
                    log_g.append(-squared.sum(dim=-1))
                biases[j] = torch.stack(log_g, dim=1).flatten(0, 1)  # [B·h, N, L]
        y = norm(t, f"{n}.norm2") if config.pre_norm else t
        # The weights sum to 1, so projecting back (bias and all) before mixing is the same as after it.
        found = [attend(y + query, x[j] + pos[j], x[j], f"{n}.cross_attn", masks[j], biases[j]) for j in levels]
        alpha = torch.full((len(strides),), 1 / len(strides), dtype=torch.float64)
        if selects:
            alpha = lin(o, f"{n}.level_head").softmax(dim=-1)
        t = t + sum(alpha[..., j, None] * found[j] for j in levels)
        if config.pre_norm:
            t = t + ffn(norm(t, f"{n}.norm3"), n)
        else:
            t = norm(t, f"{n}.norm2")
            t = norm(t + ffn(t, n), f"{n}.norm3")
        d = norm(t, "decoder.norm")
        box_logits = mlp(d, f"decoder.box_heads.{i if config.box_refinement else 0}") + reference
        all_logits.append(lin(d, "decoder.class_head"))
        all_boxes.append(box_logits.sigmoid())
        if config.box_refinement:
            reference = box_logits
    logits, more = torch.stack(all_logits), {}
    if config.class_scores == "softmax":  # in float64, where no output has all of the probability
        p, more = logits.softmax(-1), {"class_logits": logits.numpy()}
        logits = torch.stack(
            [p[..., k] / (p[..., :k].sum(-1) + p[..., k + 1 :].sum(-1)) for k in range(p.shape[-1] - 1)], -1
        ).log()
    return {"logits": logits.numpy(), "boxes": torch.stack(all_boxes).numpy(), **more}
