"""smca.reference.model against an independent torch formula in every configuration, and by what must not matter."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from smca.reference.layers import encoder_layer
from smca.reference.model import forward, key_padding_mask, parameter_shapes
from smca.reference.position import sine_position_encoding

C_IN = 5
SIZE = (4, 5)
VALID_SIZES = np.array([[64, 80], [33, 50], [16, 41]])  # pixels, at a stride of 16: 4 × 5, 2.06 × 3.1, 1 × 2.6 cells


@dataclass(frozen=True)
class Config:
    num_classes: int = 3
    hidden_dim: int = 8
    num_heads: int = 2
    num_queries: int = 6
    encoder_layers: int = 2
    decoder_layers: int = 3
    feedforward_dim: int = 12
    pre_norm: bool = False
    cross_attention: str = "smca"
    prior_scale: str = "independent"
    prior_sigma_px: float = 20.0
    query_init: str = "random"
    box_refinement: bool = False
    stride: int = 16


ALL_CONFIGS = [
    Config(pre_norm=pre, cross_attention="smca", prior_scale=scale, query_init=init, box_refinement=refine)
    for pre, scale, init, refine in itertools.product(
        [False, True], ["fixed", "single", "independent"], ["random", "grid"], [False, True]
    )
] + [
    Config(pre_norm=pre, cross_attention="dense", box_refinement=refine)
    for pre, refine in itertools.product([False, True], [False, True])
]


def config_id(config: Config) -> str:
    words = [config.cross_attention, "pre" if config.pre_norm else "post"]
    if config.cross_attention == "smca":
        words += [config.prior_scale, config.query_init]
    return "-".join([*words, "refined"] if config.box_refinement else words)


def random_params(config: Config, seed: int = 0) -> dict[str, Any]:
    """Every parameter away from 0; norm weights around 1, or else post-norm layers forget what they were given."""
    rng = np.random.default_rng(seed)
    params = {key: rng.normal(size=shape) * 0.5 for key, shape in parameter_shapes(config, C_IN).items()}
    return {k: 1.0 + 0.5 * v if "norm" in k and k.endswith("weight") else v for k, v in params.items()}


def random_features(seed: int = 1, size: tuple[int, int] = SIZE) -> Any:
    return np.random.default_rng(seed).normal(size=(3, C_IN, *size))


def in_torch(params: Any, features: Any, valid_sizes: Any, config: Config) -> dict[str, Any]:
    """The model once more, from torch's own parts: multi_head_attention_forward with the prior as an additive mask."""
    p = {key: torch.from_numpy(value) for key, value in params.items()}
    c, heads, (rows, columns) = config.hidden_dim, config.num_heads, features.shape[2:]
    h_w = torch.from_numpy(np.asarray(valid_sizes)).double() / config.stride
    ys, xs = torch.arange(rows).double() + 0.5, torch.arange(columns).double() + 0.5
    padding = ((ys - 0.5)[None, :, None] >= h_w[:, :1, None]) | ((xs - 0.5)[None, None, :] >= h_w[:, 1:, None])
    mask = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf).flatten(1)

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

    pos_y = waves(ys / h_w[:, :1] * 2 * torch.pi)[:, :, None].expand(-1, -1, columns, -1)
    pos_x = waves(xs / h_w[:, 1:] * 2 * torch.pi)[:, None].expand(-1, rows, -1, -1)
    pos = torch.cat([pos_y, pos_x], dim=-1).flatten(1, 2)

    x = functional.conv2d(torch.from_numpy(features), p["input_proj.weight"], p["input_proj.bias"])
    x = x.flatten(2).transpose(1, 2)
    for i in range(config.encoder_layers):
        n = f"encoder.layers.{i}"
        if config.pre_norm:
            y = norm(x, f"{n}.norm1")
            x = x + attend(y + pos, y + pos, y, f"{n}.self_attn", mask)
            x = x + ffn(norm(x, f"{n}.norm2"), n)
        else:
            x = norm(x + attend(x + pos, x + pos, x, f"{n}.self_attn", mask), f"{n}.norm1")
            x = norm(x + ffn(x, n), f"{n}.norm2")
    if config.pre_norm:
        x = norm(x, "encoder.norm")

    query = p["decoder.query_position"].expand(len(x), -1, -1)
    t = torch.zeros_like(query)
    reference = torch.zeros(*query.shape[:2], 4, dtype=torch.float64)
    key_xy = torch.stack([xs.repeat(rows), ys.repeat_interleave(columns)], dim=-1)
    all_logits, all_boxes = [], []
    for i in range(config.decoder_layers):
        n = f"decoder.layers.{i}"
        if config.pre_norm:
            y = norm(t, f"{n}.norm1")
            t = t + attend(y + query, y + query, y, f"{n}.self_attn")
        else:
            t = norm(t + attend(t + query, t + query, t, f"{n}.self_attn"), f"{n}.norm1")
        bias = None
        if config.cross_attention == "smca":
            o = norm(t + query, f"{n}.prior.norm")
            if i == 0:
                center = mlp(o, "decoder.center_head")
                if config.query_init == "grid":
                    center = center + p["decoder.query_center"]
                reference = torch.cat([center, torch.zeros_like(center)], dim=-1)
            w_h = h_w.flip(-1)
            log_g = []
            for head in range(heads):
                offset = lin(o, f"{n}.prior.offset_head")[..., 2 * head : 2 * head + 2]
                r = torch.ones_like(offset)
                if config.prior_scale == "single":
                    r = lin(o, f"{n}.prior.scale_head")[..., head : head + 1].expand_as(offset)
                elif config.prior_scale == "independent":
                    r = lin(o, f"{n}.prior.scale_head")[..., 2 * head : 2 * head + 2]
                c_xy = reference[..., :2].sigmoid() * w_h[:, None] + offset
                beta = 2 * (config.prior_sigma_px / config.stride) ** 2
                squared = (key_xy - c_xy[:, :, None]) ** 2 * (r**2 / beta)[:, :, None]
                log_g.append(-squared.sum(dim=-1))
            bias = torch.stack(log_g, dim=1).flatten(0, 1)  # [B·h, N, L]
        if config.pre_norm:
            y = norm(t, f"{n}.norm2")
            t = t + attend(y + query, x + pos, x, f"{n}.cross_attn", mask, bias)
            t = t + ffn(norm(t, f"{n}.norm3"), n)
        else:
            t = norm(t + attend(t + query, x + pos, x, f"{n}.cross_attn", mask, bias), f"{n}.norm2")
            t = norm(t + ffn(t, n), f"{n}.norm3")
        d = norm(t, "decoder.norm")
        box_logits = mlp(d, f"decoder.box_heads.{i if config.box_refinement else 0}") + reference
        all_logits.append(lin(d, "decoder.class_head"))
        all_boxes.append(box_logits.sigmoid())
        if config.box_refinement:
            reference = box_logits
    return {"logits": torch.stack(all_logits).numpy(), "boxes": torch.stack(all_boxes).numpy()}


def assert_same(got: dict[str, Any], want: dict[str, Any], atol: float = 1e-11) -> None:
    assert set(got) == {"logits", "boxes"}
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=atol, err_msg=name)


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=config_id)
def test_forward_equals_torch(config: Config) -> None:
    params, features = random_params(config), random_features()
    got = forward(params, features, VALID_SIZES, config)
    assert got["logits"].shape == (3, 3, 6, 3)
    assert got["boxes"].shape == (3, 3, 6, 4)
    assert_same(got, in_torch(params, features, VALID_SIZES, config))


@pytest.mark.parametrize("config", ALL_CONFIGS[::5], ids=config_id)
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_padded_cells_do_not_matter(config: Config, junk: float) -> None:
    params, features = random_params(config), random_features()
    want = forward(params, features, VALID_SIZES, config)
    padding = key_padding_mask(VALID_SIZES / config.stride, SIZE).reshape(3, 1, *SIZE)
    assert padding.any()
    with np.errstate(all="ignore"):  # the padded rows themselves do compute inf − inf
        got = forward(params, np.where(padding, junk, features), VALID_SIZES, config)
    assert_same(got, want, atol=0)


@pytest.mark.parametrize("config", ALL_CONFIGS[::5], ids=config_id)
def test_an_image_does_not_depend_on_its_batch(config: Config) -> None:
    """Alone and cropped to its own cells, an image gives what it gives in a padded batch."""
    params, features = random_params(config), random_features()
    together = forward(params, features, VALID_SIZES, config)
    for image in range(3):
        rows, columns = -(-VALID_SIZES[image] // config.stride)
        alone = forward(params, features[image : image + 1, :, :rows, :columns], VALID_SIZES[image : image + 1], config)
        assert_same(alone, {name: value[:, image : image + 1] for name, value in together.items()})


def test_queries_are_a_set() -> None:
    config = Config(query_init="grid", box_refinement=True)
    params, features = random_params(config), random_features()
    order = np.array([4, 0, 5, 2, 1, 3])
    turned = {k: v[order] if k.startswith("decoder.query_") else v for k, v in params.items()}
    got, want = forward(turned, features, VALID_SIZES, config), forward(params, features, VALID_SIZES, config)
    assert_same(got, {name: value[:, :, order] for name, value in want.items()})


@pytest.mark.parametrize("pre_norm", [False, True])
def test_without_prior_and_reference_it_is_detr(pre_norm: bool) -> None:
    """Scale heads that say r = 0, and a centre head that says 0, leave exactly the dense model."""
    config = Config(pre_norm=pre_norm)
    params, features = random_params(config), random_features()
    for key in params:
        if "scale_head" in key or "center_head.layers.2" in key:
            params[key] = np.zeros_like(params[key])
    dense = replace(config, cross_attention="dense")
    shared = {key: params[key] for key in parameter_shapes(dense, C_IN)}
    want = forward(shared, features, VALID_SIZES, dense)
    assert_same(forward(params, features, VALID_SIZES, config), want)
    params["decoder.layers.0.prior.scale_head.bias"] += 1.0
    assert np.abs(forward(params, features, VALID_SIZES, config)["boxes"] - want["boxes"]).max() > 1e-3


def test_prior_scales_are_special_cases_of_each_other() -> None:
    """fixed = single with r = 1; single = independent with the same r on both axes."""
    independent = Config()
    params, features = random_params(independent), random_features()
    single, fixed = replace(independent, prior_scale="single"), replace(independent, prior_scale="fixed")
    once = dict(params)
    for key in [k for k in params if "scale_head" in k]:
        once[key] = params[key][::2]
        params[key] = np.repeat(once[key], 2, axis=0)
    want = forward(params, features, VALID_SIZES, independent)
    assert_same(forward(once, features, VALID_SIZES, single), want)
    ones = {k: (1.0 if k.endswith("bias") else 0.0) + 0 * v if "scale_head" in k else v for k, v in once.items()}
    none = {k: v for k, v in once.items() if "scale_head" not in k}
    assert_same(forward(none, features, VALID_SIZES, fixed), forward(ones, features, VALID_SIZES, single))


def test_sigma_is_in_pixels() -> None:
    """Half the stride and half the σ in pixels are the same precision in cells."""
    fine, coarse = Config(stride=8, prior_sigma_px=20.0), Config(stride=16, prior_sigma_px=40.0)
    params, features = random_params(fine), random_features()
    assert_same(
        forward(params, features, VALID_SIZES // 2, fine), forward(params, features, VALID_SIZES // 2 * 2, coarse)
    )


def test_boxes_start_at_the_reference_centre() -> None:
    """A box head of zeros leaves the reference: the query's own centre, and half the image wide and high."""
    config = Config(query_init="grid", box_refinement=True)
    params = random_params(config)
    for key in params:
        if ("box_heads" in key and "layers.2" in key) or "center_head.layers.2" in key:
            params[key] = np.zeros_like(params[key])
    params["decoder.query_center"] = np.log([[1 / 3, 3.0]] * 6)  # σ(ln ⅓) = ¼, σ(ln 3) = ¾
    boxes = forward(params, random_features(), VALID_SIZES, config)["boxes"]
    np.testing.assert_allclose(boxes, np.broadcast_to([0.25, 0.75, 0.5, 0.5], boxes.shape), rtol=1e-14)


def test_encoder_layer_equals_torchs() -> None:
    torch.manual_seed(0)
    for pre_norm in (False, True):
        layer = torch.nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=pre_norm).double().train()
        state = {key: value.detach().numpy() for key, value in layer.state_dict().items()}
        params = {key: value for key, value in state.items() if "self_attn" not in key}
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            part = slice(8 * index, 8 * index + 8)
            params[f"self_attn.{name}.weight"] = state["self_attn.in_proj_weight"][part]
            params[f"self_attn.{name}.bias"] = state["self_attn.in_proj_bias"][part]
        params["self_attn.out_proj.weight"] = state["self_attn.out_proj.weight"]
        params["self_attn.out_proj.bias"] = state["self_attn.out_proj.bias"]
        x = np.random.default_rng(0).normal(size=(2, 7, 8))
        mask = np.zeros((2, 7), dtype=bool)
        mask[1, 5:] = True
        want = layer(torch.from_numpy(x), src_key_padding_mask=torch.from_numpy(mask)).detach().numpy()
        named = {f"e.{key}": value for key, value in params.items()}
        got = encoder_layer(x, np.zeros_like(x), mask, named, "e", num_heads=2, pre_norm=pre_norm)
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_position_encoding_by_hand() -> None:
    """Column 1, row 0 of an image 2 rows high and 3 columns wide: u_y = ½π, u_x = π; C = 8, so divisors 1 and 100."""
    encoding = sine_position_encoding((2, 4), np.array([[2.0, 3.0]]), 8)
    assert encoding.shape == (1, 8, 8)
    u_y, u_x = np.pi / 2, np.pi
    half_y = [1.0, 0.0, np.sin(u_y / 100), np.cos(u_y / 100)]
    half_x = [0.0, -1.0, np.sin(u_x / 100), np.cos(u_x / 100)]
    np.testing.assert_allclose(encoding[0, 1], half_y + half_x, atol=1e-15)
    with pytest.raises(ValueError, match="channels: expected a multiple of 4"):
        sine_position_encoding((2, 4), np.array([[2.0, 3.0]]), 6)


def test_cells_that_hold_a_pixel_are_not_padded() -> None:
    mask = key_padding_mask(np.array([[32, 33], [31, 16]]) / 16, (2, 4)).reshape(2, 2, 4)
    assert mask[0].tolist() == [[False, False, False, True]] * 2
    assert mask[1].tolist() == [[False, True, True, True]] * 2


def test_torch_tensors_drive_it_and_the_backbone_is_ignored() -> None:
    config = Config()
    params, features = random_params(config), random_features()
    tensors: dict[str, Any] = {key: torch.from_numpy(value) for key, value in params.items()}
    tensors["backbone.stem.weight"] = torch.zeros(3)
    got = forward(tensors, torch.from_numpy(features), torch.from_numpy(VALID_SIZES), config)
    assert_same(got, forward(params, features, VALID_SIZES, config), atol=0)


def test_no_encoder_is_legal() -> None:
    for pre_norm in (False, True):
        config = Config(encoder_layers=0, pre_norm=pre_norm)
        params, features = random_params(config), random_features()
        assert_same(forward(params, features, VALID_SIZES, config), in_torch(params, features, VALID_SIZES, config))


def test_wrong_parameters_are_named() -> None:
    config = Config()
    params, features = random_params(config), random_features()
    key = "decoder.layers.1.prior.scale_head.weight"
    without = {k: v for k, v in params.items() if k != key}
    with pytest.raises(ValueError, match=rf"params\['{key}'\]: expected shape \(4, 8\), got no such key"):
        forward(without, features, VALID_SIZES, config)
    with pytest.raises(ValueError, match=rf"params\['{key}'\]: expected shape \(4, 8\), got \(2, 8\)"):
        forward({**params, key: params[key][:2]}, features, VALID_SIZES, config)
    with pytest.raises(ValueError, match=r"params\['decoder.query_center'\]: expected no such parameter .* \(6, 2\)"):
        forward({**params, "decoder.query_center": np.zeros((6, 2))}, features, VALID_SIZES, config)


def test_wrong_input_is_named() -> None:
    config = Config()
    params, features = random_params(config), random_features()
    with pytest.raises(ValueError, match=r"features: expected shape .* got \(5, 4, 5\)"):
        forward(params, features[0], VALID_SIZES, config)
    with pytest.raises(ValueError, match=r"valid_sizes: expected shape \(3, 2\), got \(2, 2\)"):
        forward(params, features, VALID_SIZES[:2], config)
    with pytest.raises(ValueError, match=r"valid_sizes\[0\]: expected .* got \[64.0, 96.0\]"):
        forward(params, features, VALID_SIZES + np.array([[0, 16], [0, 0], [0, 0]]), config)
    with pytest.raises(ValueError, match=r"valid_sizes\[2\]: .* got \[0.0, 41.0\]"):
        forward(params, features, VALID_SIZES * np.array([[1, 1], [1, 1], [0, 1]]), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention": "sparse"}, r"config.cross_attention: expected one of \['smca', 'dense'\], got 'sparse'"),
        ({"prior_scale": "both"}, r"config.prior_scale: expected one of"),
        ({"query_init": "sobol"}, r"config.query_init: expected one of"),
        (
            {"hidden_dim": 12, "num_heads": 8},
            r"config.hidden_dim: expected a multiple of num_heads = 8 .* got 12",
        ),
        ({"hidden_dim": 6}, r"config.hidden_dim: expected a multiple"),
        ({"decoder_layers": 0}, r"config.decoder_layers: expected at least 1, got 0"),
        ({"encoder_layers": -1}, r"config.encoder_layers: expected at least 0, got -1"),
        ({"prior_sigma_px": 0.0}, r"config.prior_sigma_px: expected a number of pixels > 0, got 0.0"),
    ],
)
def test_wrong_configurations_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(random_params(Config()), random_features(), VALID_SIZES, replace(Config(), **change))
