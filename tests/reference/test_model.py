"""smca.reference.model against an independent torch formula in every configuration, and by what must not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from reference_model_in_torch import (
    MULTI_SCALE,
    OTHER_LEVELS,
    SINGLE_SCALE,
    VALID_SIZES,
    Config,
    assert_same,
    channels_of,
    config_id,
    in_torch,
    random_features,
    random_params,
)
from smca.reference.config import decoder_strides
from smca.reference.encoder import encoder_block
from smca.reference.layers import sigmoid
from smca.reference.model import forward
from smca.reference.parameters import parameter_shapes
from smca.reference.position import Grid, key_padding_mask, sine_position_encoding
from smca.reference.prior import spatial_prior

ALL_CONFIGS = SINGLE_SCALE + MULTI_SCALE + OTHER_LEVELS
SOME_CONFIGS = ALL_CONFIGS[::7] + OTHER_LEVELS[-4:]
KEEPING = [config for config in SOME_CONFIGS if config.encoder != "conv"]
"""Those that give an image the same in any batch."""


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=config_id)
def test_forward_equals_torch(config: Any) -> None:
    params, features = random_params(config), random_features(config)
    got = forward(params, features, VALID_SIZES, config)
    assert got["logits"].shape == (3, 3, 6, 3)
    assert got["boxes"].shape == (3, 3, 6, 4)
    assert_same(got, in_torch(params, features, VALID_SIZES, config))


@pytest.mark.parametrize("strides", [(32,), (8, 16, 32)])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_forward_equals_torch_in_detrs_conventions(strides: tuple[int, ...], pre_norm: bool) -> None:
    """Query state, position encoding and padding as in DETR's and the authors' code, and a width for each level."""
    config = Config(
        strides=strides,
        prior_sigma_px=(12.0, 20.0, 50.0)[: len(strides)],
        prior_state="entering",
        position_encoding="detr",
        padding_cells="nearest",
        pre_norm=pre_norm,
    )
    padded_size, valid_sizes = (70, 65), np.array([[70, 40], [33, 65], [24, 22]])
    params, features = random_params(config), random_features(config, size=padded_size)
    got = forward(params, features, valid_sizes, config, padded_size=padded_size)
    assert_same(got, in_torch(params, features, valid_sizes, config, padded_size))
    for name, usual in (("prior_state", "attended"), ("position_encoding", "centers"), ("padding_cells", "covered")):
        other = forward(params, features, valid_sizes, replace(config, **{name: usual}), padded_size=padded_size)
        assert np.abs(other["boxes"] - got["boxes"]).max() > 1e-5, name


@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_padded_cells_do_not_matter(config: Any, junk: float) -> None:
    params, features = random_params(config), random_features(config)
    want = forward(params, features, VALID_SIZES, config)
    for j, stride in enumerate(config.strides):
        padding = key_padding_mask(VALID_SIZES / stride, features[j].shape[2:]).reshape(3, 1, *features[j].shape[2:])
        assert padding.any()
        features[j] = np.where(padding, junk, features[j])
    with np.errstate(all="ignore"):  # the padded rows themselves do compute inf − inf
        assert_same(forward(params, features, VALID_SIZES, config), want, atol=0)


@pytest.mark.parametrize("config", KEEPING, ids=config_id)
def test_an_image_does_not_depend_on_its_batch(config: Any) -> None:
    """Alone and cropped to its own cells, an image gives what it gives in a padded batch."""
    params, features = random_params(config), random_features(config)
    together = forward(params, features, VALID_SIZES, config)
    for image in range(3):
        sizes = [-(-VALID_SIZES[image] // stride) for stride in config.strides]
        own = [x[image : image + 1, :, : size[0], : size[1]] for x, size in zip(features, sizes, strict=True)]
        alone = forward(params, own, VALID_SIZES[image : image + 1], config)
        assert_same(alone, {name: value[:, image : image + 1] for name, value in together.items()})


def test_with_the_authors_encoder_an_image_depends_on_its_padding_alone() -> None:
    """Not on the other images; but maps with padding give other boxes than those without, in every image that has some."""
    config = Config(strides=(8, 16, 32), encoder="conv")
    params, features = random_params(config), random_features(config)
    together = forward(params, features, VALID_SIZES, config)
    for image in range(3):
        own = [x[image : image + 1] for x in features]
        alone = forward(params, own, VALID_SIZES[image : image + 1], config)
        assert_same(alone, {name: value[:, image : image + 1] for name, value in together.items()})
        sizes = [-(-VALID_SIZES[image] // stride) for stride in config.strides]
        own = [x[:, :, : size[0], : size[1]] for x, size in zip(own, sizes, strict=True)]
        cropped = forward(params, own, VALID_SIZES[image : image + 1], config)
        assert (np.abs(cropped["boxes"] - alone["boxes"]).max() > 1e-6) == (image > 0)


def test_queries_are_a_set() -> None:
    config = Config(query_init="grid", box_refinement=True)
    params, features = random_params(config), random_features(config)
    order = np.array([4, 0, 5, 2, 1, 3])
    turned = {k: v[order] if k.startswith("decoder.query_") else v for k, v in params.items()}
    got, want = forward(turned, features, VALID_SIZES, config), forward(params, features, VALID_SIZES, config)
    assert_same(got, {name: value[:, :, order] for name, value in want.items()})


@pytest.mark.parametrize("pre_norm", [False, True])
def test_without_prior_and_reference_it_is_detr(pre_norm: bool) -> None:
    """Scale heads that say r = 0, and a centre head that says 0, leave exactly the dense model."""
    config = Config(pre_norm=pre_norm)
    params, features = random_params(config), random_features(config)
    for key in params:
        if "scale_head" in key or "center_head.layers.2" in key:
            params[key] = np.zeros_like(params[key])
    dense = replace(config, cross_attention="dense")
    without = {key: params[key] for key in parameter_shapes(dense, channels_of(dense))}
    want = forward(without, features, VALID_SIZES, dense)
    assert_same(forward(params, features, VALID_SIZES, config), want)
    params["decoder.layers.0.prior.scale_head.bias"] += 1.0
    assert np.abs(forward(params, features, VALID_SIZES, config)["boxes"] - want["boxes"]).max() > 1e-3


def test_prior_scales_are_special_cases_of_each_other() -> None:
    """fixed = single with r = 1; single = independent with the same r on both axes."""
    independent = Config()
    params, features = random_params(independent), random_features(independent)
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
    fine, coarse = Config(strides=(8,), prior_sigma_px=20.0), Config(strides=(16,), prior_sigma_px=40.0)
    params, features = random_params(fine), random_features(coarse)
    assert_same(
        forward(params, features, VALID_SIZES // 2, fine), forward(params, features, VALID_SIZES // 2 * 2, coarse)
    )


def test_boxes_start_at_the_reference_centre() -> None:
    """A box head of zeros leaves the reference: the query's own centre, and half the image wide and high."""
    config = Config(query_init="grid", box_refinement=True)
    params, features = random_params(config), random_features(config)
    for key in params:
        if ("box_heads" in key and "layers.2" in key) or "center_head.layers.2" in key:
            params[key] = np.zeros_like(params[key])
    params["decoder.query_center"] = np.log([[1 / 3, 3.0]] * 6)  # σ(ln ⅓) = ¼, σ(ln 3) = ¾
    boxes = forward(params, features, VALID_SIZES, config)["boxes"]
    np.testing.assert_allclose(boxes, np.broadcast_to([0.25, 0.75, 0.5, 0.5], boxes.shape), rtol=1e-14)


def test_encoder_block_equals_torchs() -> None:
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
        named = {f"encoder.layers.0.{key}": value for key, value in params.items()}
        grid = Grid((1, 7), 16, np.array([[1.0, 7.0], [1.0, 5.0]]), mask, np.zeros_like(x))
        (got,) = encoder_block([x], [grid], named, 0, Config(pre_norm=pre_norm))
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
    params, features = random_params(config), random_features(config)
    tensors: dict[str, Any] = {key: torch.from_numpy(value) for key, value in params.items()}
    tensors["backbone.stem.weight"] = torch.zeros(3)
    got = forward(tensors, [torch.from_numpy(x) for x in features], torch.from_numpy(VALID_SIZES), config)
    assert_same(got, forward(params, features, VALID_SIZES, config), atol=0)


def test_no_encoder_is_legal() -> None:
    for pre_norm in (False, True):
        config = Config(encoder_layers=0, pre_norm=pre_norm)
        params, features = random_params(config), random_features(config)
        assert_same(forward(params, features, VALID_SIZES, config), in_torch(params, features, VALID_SIZES, config))


# Several levels.

THREE = Config(strides=(8, 16, 32), cross_level_blocks=(1,))


@pytest.mark.parametrize(
    "config", [THREE, replace(THREE, encoder="pyramid_conv", cross_level_blocks=())], ids=config_id
)
@pytest.mark.parametrize("given", [1, 2])
def test_levels_beyond_the_backbones(config: Any, given: int) -> None:
    """The first from the backbone's last map, others from the level before, padding or not: equal to torch, whatever
    stands in padded cells."""
    params, features = random_params(config, given=given), random_features(config, given=given)
    want = in_torch(params, features, VALID_SIZES, config)
    assert_same(forward(params, features, VALID_SIZES, config), want)
    dirty = list(features)
    for j in range(given):
        size = features[j].shape[2:]
        padding = key_padding_mask(VALID_SIZES / config.strides[j], size).reshape(3, 1, *size)
        dirty[j] = np.where(padding, np.nan, features[j])
    with np.errstate(all="ignore"):
        assert_same(forward(params, dirty, VALID_SIZES, config), want)
    for image in range(3):
        sizes = [-(-VALID_SIZES[image] // stride) for stride in config.strides[:given]]
        own = [x[image : image + 1, :, : size[0], : size[1]] for x, size in zip(features, sizes, strict=True)]
        alone = forward(params, own, VALID_SIZES[image : image + 1], config)
        assert_same(alone, {name: value[:, image : image + 1] for name, value in want.items()})


@pytest.mark.parametrize("encoder", ["attention", "conv", "pyramid_conv"])
def test_levels_that_do_not_nest(encoder: str) -> None:
    """33 × 47 pixels are 5 × 6, 3 × 3 and 2 × 2 cells."""
    config = Config(strides=(8, 16, 32), encoder=encoder)
    params, features = random_params(config), random_features(config, size=(33, 47), batch=2)
    assert [x.shape[2:] for x in features] == [(5, 6), (3, 3), (2, 2)]
    sizes = np.array([[33, 47], [24, 17]])
    assert_same(forward(params, features, sizes, config), in_torch(params, features, sizes, config))


def test_one_level_has_no_level_parameters() -> None:
    names = set(parameter_shapes(Config(), [5]))
    assert names == set(parameter_shapes(Config(scale_selection=False), [5]))
    assert not [name for name in names if "level" in name or "finer" in name or "coarser" in name]
    assert "decoder.layers.0.state_norm.weight" in names
    several = Config(strides=(16, 32))
    assert parameter_shapes(several, [5, 5])["level_embed"] == (2, 8)
    assert parameter_shapes(replace(several, encoder="conv"), [5, 5])["level_embed"] == (2, 8)
    for change in ({"encoder": "pyramid_conv"}, {"encoder_layers": 0}):  # nobody reads it there
        assert "level_embed" not in parameter_shapes(replace(several, **change), [5, 5])
    dense = Config(cross_attention="dense")
    assert not [name for name in parameter_shapes(dense, [5]) if "state_norm" in name]
    assert "decoder.layers.0.state_norm.weight" in parameter_shapes(replace(dense, strides=(16, 32)), [5, 5])


@pytest.mark.parametrize("cross_attention", ["smca", "dense"])
@pytest.mark.parametrize("picked", [0, 1, 2])
def test_one_level_selected_is_the_model_of_that_level(picked: int, cross_attention: str) -> None:
    """A level head that says "level 1", and a level embedding of 0: the single-scale model of stride 16."""
    config = Config(strides=(8, 16, 32), cross_attention=cross_attention)
    params, features = random_params(config), random_features(config)
    params["level_embed"][:] = 0
    for layer in range(config.decoder_layers):
        name = f"decoder.layers.{layer}.level_head"
        params[f"{name}.weight"][:] = 0
        params[f"{name}.bias"][:] = -1000.0 * (np.arange(3) != picked)
    single = replace(config, strides=(config.strides[picked],))
    own = {"input_proj.0.weight": params[f"input_proj.{picked}.weight"]}
    own["input_proj.0.bias"] = params[f"input_proj.{picked}.bias"]
    for key in parameter_shapes(single, [features[picked].shape[1]]):
        if ".prior." in key:  # [h, J, 2, …] → [h, 1, 2, …]
            value = params[key].reshape(config.num_heads, 3, 2, *params[key].shape[1:])[:, picked]
            own[key] = value.reshape(-1, *params[key].shape[1:])
        elif not key.startswith("input_proj"):
            own[key] = params[key]
    got = forward(params, features, VALID_SIZES, config)
    assert_same(got, forward(own, [features[picked]], VALID_SIZES, single))


def test_halved_levels_have_positions_of_their_own() -> None:
    """Strides (8, 48) and the finest halved: nothing of the coarser level tells where the halved cells are."""
    config = Config(strides=(8, 48), halve_finest=True)
    assert decoder_strides(config) == (16, 48)
    params, features = random_params(config), random_features(config)
    want = in_torch(params, features, VALID_SIZES, config)
    assert_same(forward(params, features, VALID_SIZES, config), want)


def test_without_selection_every_level_weighs_the_same() -> None:
    params, features = random_params(THREE), random_features(THREE)
    want = forward(params, features, VALID_SIZES, THREE)
    even = {key: 0 * value if "level_head" in key else value for key, value in params.items()}
    without = {key: value for key, value in params.items() if "level_head" not in key}
    got = forward(without, features, VALID_SIZES, replace(THREE, scale_selection=False))
    assert_same(got, forward(even, features, VALID_SIZES, THREE))
    assert np.abs(got["boxes"] - want["boxes"]).max() > 1e-3


def test_shared_heads_are_equal_heads() -> None:
    shared_heads, independent = replace(THREE, prior_heads="shared"), THREE
    params, features = random_params(shared_heads), random_features(THREE)
    repeated = {k: np.concatenate([v, v]) if ".prior." in k else v for k, v in params.items()}
    assert_same(
        forward(params, features, VALID_SIZES, shared_heads), forward(repeated, features, VALID_SIZES, independent)
    )


def test_the_prior_of_every_level_is_at_the_same_place_and_as_wide_in_the_image() -> None:
    """In pixels: one reference centre, and offsets and standard deviations that only differ by what heads predict."""
    config = replace(THREE, prior_scale="fixed")
    grids = [
        Grid((4, 5), stride, VALID_SIZES / stride, np.zeros((3, 20), bool), np.zeros((3, 20, 8)))
        for stride in config.strides
    ]
    rng = np.random.default_rng(5)
    state, reference_logits = rng.normal(size=(3, 6, 8)), rng.normal(size=(3, 6, 4))
    offset = rng.normal(size=(2, 3, 2))  # [h, J, 2], in cells
    params = {"a.prior.offset_head.weight": np.zeros((12, 8)), "a.prior.offset_head.bias": offset.reshape(-1)}
    priors = spatial_prior(state, reference_logits, grids, params, "a", config)
    centre_px = sigmoid(reference_logits[..., :2]) * VALID_SIZES[:, None, ::-1]
    for j, (center_xy, precision_xy) in enumerate(priors):
        assert center_xy.shape == precision_xy.shape == (3, 2, 6, 2)
        px = (center_xy - offset[:, j][None, :, None]) * config.strides[j]
        np.testing.assert_allclose(px, np.broadcast_to(centre_px[:, None], px.shape), rtol=1e-12)
        np.testing.assert_allclose(config.strides[j] / np.sqrt(precision_xy), config.prior_sigma_px, rtol=1e-12)
