"""What smca.reference.model says to wrong parameters, wrong features and wrong configurations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from reference_model_in_torch import VALID_SIZES, Config, random_features, random_params
from smca.reference.model import forward
from smca.reference.parameters import parameter_shapes


def test_wrong_parameters_are_named() -> None:
    config = Config()
    params, features = random_params(config), random_features(config)
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
    params, features = random_params(config), random_features(config)
    with pytest.raises(ValueError, match=r"features\[0\]: expected shape .* got \(5, 4, 5\)"):
        forward(params, features[0], VALID_SIZES, config)
    with pytest.raises(ValueError, match=r"features: expected 1 to 1 maps for config.strides = \(16,\), got 2"):
        forward(params, features * 2, VALID_SIZES, config)
    with pytest.raises(ValueError, match=r"features: expected 1 to 1 maps .* got 0"):
        forward(params, [], VALID_SIZES, config)
    with pytest.raises(ValueError, match=r"valid_sizes: expected shape \(3, 2\), got \(2, 2\)"):
        forward(params, features, VALID_SIZES[:2], config)
    with pytest.raises(ValueError, match=r"valid_sizes\[0\]: expected .* got \[64.0, 96.0\]"):
        forward(params, features, VALID_SIZES + np.array([[0, 16], [0, 0], [0, 0]]), config)
    with pytest.raises(ValueError, match=r"valid_sizes\[2\]: .* got \[0.0, 41.0\]"):
        forward(params, features, VALID_SIZES * np.array([[1, 1], [1, 1], [0, 1]]), config)


def test_wrong_levels_are_named() -> None:
    config = Config(strides=(8, 16, 32))
    params, features = random_params(config), random_features(config)
    with pytest.raises(ValueError, match=r"valid_sizes\[0\]: .* map of \(2, 1\) cells with a stride of 32 \(level 2\)"):
        forward(params, [*features[:2], features[2][..., :1]], VALID_SIZES, config)
    with pytest.raises(ValueError, match=r"features\[1\]: expected shape \(3, any, any, any\), got \(2, 7, 4, 5\)"):
        forward(params, [features[0], features[1][:2], features[2]], VALID_SIZES, config)
    convolved = replace(config, encoder="conv")
    with pytest.raises(
        ValueError, match=r'features\[2\]: expected a map of \(2, 3\) cells with encoder="conv", half of the \(4, 5\)'
    ):
        forward(random_params(convolved), [*features[:2], np.zeros((3, 6, 3, 3))], VALID_SIZES, convolved)
    single = Config(strides=(8,))
    params = {**random_params(single), "level_embed": np.zeros((1, 8))}
    with pytest.raises(ValueError, match=r"params\['level_embed'\]: expected no such parameter"):
        forward(params, features[:1], VALID_SIZES, single)
    with pytest.raises(ValueError, match=r"config.strides\[2\]: expected 32, twice the stride before it, .* got 48"):
        parameter_shapes(replace(config, strides=(8, 16, 48)), [5, 7])


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
        ({"prior_heads": "one"}, r"config.prior_heads: expected one of"),
        ({"encoder": "mlp"}, r"config.encoder: expected one of \['attention', 'conv', 'pyramid_conv'\], got 'mlp'"),
        ({"strides": ()}, r"config.strides: expected pixels per cell for each level, finest first, got \(\)"),
        ({"strides": (32, 16)}, r"config.strides: expected .* finest first, got \(32, 16\)"),
        ({"strides": (0, 16)}, r"config.strides: expected .* got \(0, 16\)"),
        (
            {"strides": (16, 24), "encoder": "pyramid_conv"},
            r"config.strides: expected multiples of one another .*\(16, 24\)",
        ),
        (
            {"strides": (8, 32), "encoder": "conv"},
            r"config.strides: expected each twice .*\(8, 32\).*pyramid_conv.*attention",
        ),
        ({"cross_level_blocks": (2,)}, r"config.cross_level_blocks: expected different indices of 2 .* got \(2,\)"),
        ({"cross_level_blocks": (-1,)}, r"config.cross_level_blocks: expected different indices .* got \(-1,\)"),
        ({"cross_level_blocks": (0, 0)}, r"config.cross_level_blocks: expected different indices .* got \(0, 0\)"),
        (
            {"cross_level_blocks": (0,), "encoder": "conv"},
            r'config.cross_level_blocks: expected \(\) with encoder="conv"',
        ),
        (
            {"cross_level_blocks": (0,), "encoder": "pyramid_conv"},
            r'config.cross_level_blocks: expected \(\) with encoder="pyramid_conv"',
        ),
    ],
)
def test_wrong_configurations_are_named(change: dict[str, Any], message: str) -> None:
    config = Config()
    with pytest.raises(ValueError, match=message):
        forward(random_params(Config()), random_features(config), VALID_SIZES, replace(Config(), **change))
