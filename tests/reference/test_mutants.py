"""Proof that the tests of smca.reference can fail: each mutant is one deliberate error, and a named test must go red.

A mutant is the specification with one piece of the source of one module replaced (``smca.conformance.mutants``). Its functions
take the place of the true ones in the test while that runs.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from smca.conformance.mutants import Mutant, planted_package

LEVELS = {"strides": (8, 16, 32), "cross_level_blocks": (1,)}
CONFIGS: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"pre_norm": True, "query_init": "grid", "box_refinement": True},
    "three": LEVELS,
    "mean": LEVELS | {"scale_selection": False},
    "dense": LEVELS | {"cross_attention": "dense"},
    "conv": {"strides": (8, 16, 32), "encoder": "conv"},
    "conv-pre": {"strides": (8, 16, 32), "encoder": "conv", "pre_norm": True},
    "pyramid": {"strides": (8, 16, 32), "encoder": "pyramid_conv"},
    "halved": {"strides": (8, 16, 32), "halve_finest": True},
    "softmax": {"class_scores": "softmax"},
}

# (module, source, its replacement, test file, test, its arguments)
MUTANTS: list[tuple[str, str, str, str, str, tuple[Any, ...]]] = [
    # The prior: cell centres, row-major order, the factor ½, the sign, the axes.
    ("gaussian", "key % width + 0.5", "key % width + 0.0", "attention", "attention_equals_loops", ((3, 4), False)),
    ("gaussian", "[key % width + 0.5, key // width + 0.5]", "[key // height + 0.5, key % height + 0.5]",
     "attention", "attention_equals_loops", ((3, 4), False)),
    ("attention_forward", "-0.5 * np.einsum(\"bhna,bhnla->bhnl\"", "-1.0 * np.einsum(\"bhna,bhnla->bhnl\"",
     "attention", "attention_equals_torch", ()),
    ("attention_forward", "log_prior = -0.5", "log_prior = 0.5", "attention", "prior_enters_as_the_weight_map", ()),
    ("gaussian", "key_xy - center_xy[..., None, :]", "key_xy - center_xy[..., None, ::-1]",
     "attention", "attention_equals_loops", ((4, 3), True)),
    ("attention_forward", "/ q.shape[-1] ** 0.5 +", "/ q.shape[-1] +", "attention", "precision_of_zero_is_plain_attention", ()),
    ("gaussian", "-distance_x[..., None, :] - distance_y[..., :, None]",
     "-0.5 * distance_x[..., None, :] - 0.5 * distance_y[..., :, None]",
     "attention", "weight_map_is_the_papers_equation", ()),
    ("gaussian", "2.0 / (beta * scale_xy**2)", "1.0 / (beta * scale_xy**2)",
     "attention", "weight_map_equals_its_precision_form", ()),
    ("attention_forward", " - np.max(logits, axis=-1, keepdims=True)", "", "attention",
     "a_distant_narrow_prior_does_not_overflow", ()),
    ("attention_forward", "np.where(key_padding_mask[:, None, None, :], -np.inf, logits)", "logits + 0.0",
     "attention", "padding_is_the_same_as_a_smaller_map", ()),
    ("attention_forward", "np.where(key_padding_mask[:, None, :, None], 0.0, keys)", "keys",
     "attention", "padded_keys_are_never_read", (float("nan"),)),
    ("gaussian", "key = np.arange(height * width, like=center_xy)", "key = np.arange(height * width)",
     "attention", "runs_on_foreign_arrays_through_numpys_protocols", ()),
    # The backward pass, equation by equation.
    ("attention_backward", "np.swapaxes(weights, -1, -2) @ grad_out", "np.swapaxes(weights, -1, -2) @ (0.5 * grad_out)",
     "attention", "vjp_equals_central_differences", ()),
    ("attention_backward", "(dweights - np.sum(weights * dweights, axis=-1, keepdims=True))", "dweights",
     "attention", "vjp_equals_central_differences", ()),
    ("attention_backward", "dq = dlogits @ k / root_d", "dq = dlogits @ k", "attention", "vjp_equals_autograd", (1.0, False)),
    ("attention_backward", "dcenter_xy = precision_xy *", "dcenter_xy = -precision_xy *",
     "attention", "vjp_equals_central_differences", ()),
    ("attention_backward", "dlogits, -0.5 * difference_xy**2", "dlogits, -difference_xy**2",
     "attention", "vjp_equals_autograd", (1.0, True)),
    # Boxes.
    ("boxes", "_ratio(intersection, union) - _ratio(hull - union, hull)", "_ratio(intersection, union)",
     "boxes", "giou_by_hand", ()),
    ("boxes", "_ratio(hull - union, hull)", "_ratio(hull - union, union)",
     "boxes", "iou_and_giou_by_counting_cells", ()),
    ("boxes", "np.where(whole == 0, 1.0, whole)", "whole", "boxes", "boxes_without_area_give_numbers", ()),
    ("boxes", "np.maximum(a[..., :2], b[..., :2]), 0.0)", "np.maximum(a[..., :2], b[..., :2]), -9.0)",
     "boxes", "giou_by_hand", ()),
    # Matching: the cost's terms, and the steps of the assignment.
    ("matching", "cost_class = positive - negative", "cost_class = positive",
     "matching", "cost_equals_method_in_torch", ()),
    ("matching", "cost_giou = -generalized", "cost_giou = 1 - generalized",
     "matching", "cost_equals_method_in_torch", ()),
    ("matching", "sigmoid(-logits) ** gamma", "(1 - sigmoid(logits)) ** (gamma + 1)",
     "matching", "focal_terms_by_hand_and_far_out", ()),
    ("matching", "price_col[settled] -= surplus", "price_col[settled] -= 0.5 * surplus",
     "matching", "assignment_equals_scipys", ("floats",)),
    ("matching", "price_row[new_row] += walked", "price_row[new_row] += 0.9 * walked",
     "matching", "assignment_equals_scipys", ("integers",)),
    ("matching", "surplus = walked - distance[settled]", "surplus = walked + 0 * distance[settled]",
     "matching", "assignment_equals_scipys", ("floats",)),
    ("matching", "return rows[cols], cols", "return rows, np.arange(len(rows))",
     "matching", "assignment_equals_scipys", ("floats",)),
    ("matching", "if settled[nearest] or distance[nearest] == np.inf:", "if False:",
     "matching", "assignment_equals_scipys", ("forbidden",)),
    # The loss.
    ("losses", "max(1, int(valid.sum()))", "max(1, len(valid))", "losses", "set_loss_by_hand", ()),
    ("losses", "max(1, int(valid.sum()))", "1", "losses", "the_number_of_boxes_divides", ()),
    ("losses", "num_boxes = max(1, int(valid.sum()))", "num_boxes = np.float64(valid.sum())",
     "losses", "no_object_anywhere", (3,)),
    ("losses", "present[(*pairs, labels)] = 1.0", "present[(*pairs, labels * 0)] = 1.0", "losses", "set_loss_by_hand", ()),
    ("losses", "real[columns]] = queries", "columns] = queries", "losses", "set_loss_by_hand", ()),
    ("losses", "match_cost(\n                logits[layer, image],\n                boxes[layer, image]",
     "match_cost(\n                logits[0, image],\n                boxes[0, image]", "losses", "set_loss_by_hand", ()),
    ("losses", "weights[term] * total / num_boxes", "total / num_boxes", "losses", "set_loss_by_hand", ()),
    # DETR's own scores and loss.
    ("softmax_scores", "np.delete(z, k, axis=-1)", "z[..., -1:]", "softmax_scores", "their_sigmoid_is_the_softmax", ()),
    ("softmax_scores", "np.delete(z, k, axis=-1)", "z", "softmax_scores", "their_sigmoid_is_the_softmax", ()),
    ("softmax_scores", "wanted = np.full(z.shape[:2], no_object)", "wanted = np.full(z.shape[:2], 0)",
     "softmax_scores", "loss_is_torchs_mean_cross_entropy", (1.0, 0.1)),
    ("softmax_scores", ".sum() / weight.sum())", ".sum() / weight.size)", "softmax_scores", "set_loss_is_detrs", ()),
    ("losses", "match(logits, boxes, targets, weights, classification)", "match(logits, boxes, targets, weights)",
     "softmax_scores", "set_loss_is_detrs", ()),
    ("matching", "cost_class = -sigmoid(logits[:, labels])", "cost_class = softplus(-logits[:, labels])",
     "softmax_scores", "set_loss_is_detrs", ()),
    ("model", "logits = log_odds(z) if", "logits = z[..., :-1] if", "model", "forward_equals_torch", ("softmax",)),
    # Layers and positions.
    ("layers", "LAYER_NORM_EPSILON = 1e-5", "LAYER_NORM_EPSILON = 1e-6", "model", "encoder_block_equals_torchs", ()),
    ("layers", "np.mean(centered**2, axis=-1, keepdims=True)", "np.var(x, axis=-1, keepdims=True, ddof=1)",
     "model", "encoder_block_equals_torchs", ()),
    ("encoder", "x + grid.position, x + grid.position, x,", "x + grid.position, x + grid.position, x + grid.position,",
     "model", "forward_equals_torch", ("post",)),
    ("layers", "v = np.where(key_padding_mask[:, None, :, None], 0.0, v)", "v = v * 1.0",
     "model", "padded_cells_do_not_matter", ("post", float("nan"))),
    ("position", "[encoded_y, encoded_x]", "[encoded_x, encoded_y]", "model", "position_encoding_by_hand", ()),
    ("position", "2 * (t // 2) / channels", "t / channels", "model", "position_encoding_by_hand", ()),
    ("position", "(np.arange(width) + 0.5)", "(np.arange(width) + 1.0)", "model", "position_encoding_by_hand", ()),
    # The decoder and the model.
    ("prior", "valid_cells[:, None, ::-1]", "valid_cells[:, None, :]", "model", "forward_equals_torch", ("post",)),
    ("prior", "/ sigma_xy) ** 2", "/ sigma_xy) ** 2 * 2",
     "model", "forward_equals_torch", ("post",)),
    ("decoder", "state = layer_norm(state,", "state = layer_norm(t,",
     "model", "forward_equals_torch", ("pre",)),
    ("decoder", "            reference_logits = box_logits", "            reference_logits = reference_logits",
     "model", "forward_equals_torch", ("pre",)),
    ("decoder", "if uses_prior(config) and index == 0 and", "if uses_prior(config) and",
     "model", "forward_equals_torch", ("post",)),
    ("decoder", "decoded = layer_norm(t, params, \"decoder.norm\")", "decoded = t",
     "model", "forward_equals_torch", ("pre",)),
    ("decoder", "linear(x + grid.position,", "linear(x,", "model", "forward_equals_torch", ("pre",)),
    ("decoder", "precision_xy, grid.size, grid.key_padding_mask)", "precision_xy, grid.size)",
     "model", "an_image_does_not_depend_on_its_batch", ("pre",)),
    ("prior", "sigma_px / grid.stride", "sigma_px * grid.stride",
     "model", "sigma_is_in_pixels", ()),
    ("position", "column_padded = np.arange(width) >=", "column_padded = np.arange(width) + 0.5 >=",
     "model", "cells_that_hold_a_pixel_are_not_padded", ()),
    ("encoder", "for x in levels] if config.pre_norm else levels", "for x in levels] if False else levels",
     "model", "forward_equals_torch", ("pre",)),
    ("layers", "height * width).transpose(0, 2, 1)", "height * width).transpose(0, 2, 1)[:, ::-1]",
     "model", "forward_equals_torch", ("post",)),
    # DETR's conventions.
    ("position", "np.arange(width) * padded_size[1] // width", "np.arange(width) * padded_size[0] // width",
     "model", "forward_equals_torch_in_detrs_conventions", ((32,), False)),
    ("position", "np.arange(height) * padded_size[0] // height >=", "np.arange(height) * 32 >=",
     "model", "forward_equals_torch_in_detrs_conventions", ((32,), False)),
    ("position", "(whole + 1e-6)", "whole.max()",
     "model", "forward_equals_torch_in_detrs_conventions", ((8, 16, 32), False)),
    ("position", "np.cumsum(shown, axis=axis)", "np.cumsum(shown, axis=axis) - 0.5 * shown",
     "model", "forward_equals_torch_in_detrs_conventions", ((32,), False)),
    ("decoder", "if config.prior_state == \"attended\":", "if True:",
     "model", "forward_equals_torch_in_detrs_conventions", ((32,), True)),
    ("config", "return sigma if isinstance(sigma, tuple) else", "return sigma[:1] * len(sigma) if isinstance(sigma, tuple) else",
     "model", "forward_equals_torch_in_detrs_conventions", ((8, 16, 32), True)),
    # Attention over several levels, forward and backward.
    ("attention_forward", "level_weights[:, None, :, j, None]", "level_weights[:, None, :, 0, None]",
     "scales", "one_hot_weights_pick_a_level", ()),
    ("attention_forward", "np.sum(np.stack(weighted), axis=0)", "np.mean(np.stack(weighted), axis=0)",
     "scales", "by_hand", ()),
    ("attention_forward", "of_level(level_weights, j) * smca_attention(q, *level) for",  # one softmax over all levels
     "of_level(level_weights, j) * smca_attention(q, *level) * np.exp(q @ level.k.swapaxes(2, 3)).sum(-1)[..., None] "
     "/ sum(np.exp(q @ x.k.swapaxes(2, 3)).sum(-1)[..., None] for x in levels) for",
     "scales", "each_softmax_is_over_its_own_level", ()),
    ("attention_forward", "of_level(level_weights, j) * smca_attention(q, *level) for",
     "of_level(level_weights, j) * smca_attention(q, *level[:5]) for",
     "scales", "padded_keys_are_never_read", (float("nan"),)),
    ("attention_forward", "of_level(level_weights, j) * smca_attention(q, *level) for",
     "of_level(level_weights, j) * smca_attention(q, *level._replace(center_xy=levels[0].center_xy)) for",
     "scales", "attention_equals_torch", ()),
    ("attention_backward", "grad_of_level = of_level(level_weights, j) * grad_out", "grad_of_level = grad_out",
     "scales", "vjp_equals_central_differences", ()),
    ("attention_backward", "np.einsum(\"bhnd,bhnd->bn\", grad_out", "np.einsum(\"bhnd,bhnd->bn\", grad_of_level",
     "scales", "vjp_equals_central_differences", ()),
    ("attention_backward", "np.sum(np.stack(dqs), axis=0)", "dqs[0]", "scales", "vjp_equals_autograd", ()),
    # Weights, offsets and scales of the levels.
    ("decoder", "softmax(linear(state, params, f\"{name}.level_head\"))",
     "softmax(linear(state, params, f\"{name}.level_head\").swapaxes(1, 2)).swapaxes(1, 2)",
     "model", "forward_equals_torch", ("three",)),
    ("decoder", "softmax(linear(state, params, f\"{name}.level_head\"))",
     "sigmoid(linear(state, params, f\"{name}.level_head\"))", "model", "forward_equals_torch", ("three",)),
    ("decoder", "1.0 / levels)", "1.0)", "model", "forward_equals_torch", ("mean",)),
    ("prior", "offset_xy[:, :, :, j]", "offset_xy[:, :, :, 0]", "model", "forward_equals_torch", ("three",)),
    ("prior", "inverse_scale[:, :, :, j]", "inverse_scale[:, :, :, -1]", "model", "forward_equals_torch", ("three",)),
    ("prior", "prior.offset_head\").reshape(*each, 2)",  # level before head
     "prior.offset_head\").reshape(batch, queries, len(grids), groups, 2).swapaxes(2, 3)",
     "model", "one_level_selected_is_the_model_of_that_level", (1, "smca")),
    ("prior", "sigma_px / grid.stride", "sigma_px / grids[0].stride",
     "model", "the_prior_of_every_level_is_at_the_same_place_and_as_wide_in_the_image", ()),
    ("prior", "grid.valid_cells[:, None, ::-1]", "grids[0].valid_cells[:, None, ::-1]",
     "model", "the_prior_of_every_level_is_at_the_same_place_and_as_wide_in_the_image", ()),
    ("prior", "(batch, queries, num_heads, 2)).transpose(0, 2, 1, 3)",
     "(batch, queries, num_heads, 2)).transpose(0, 2, 1, 3)[:, ::-1]", "model", "forward_equals_torch", ("three",)),
    ("decoder", "if uses_prior(config) or selects_scales(config):", "if uses_prior(config):",
     "model", "forward_equals_torch", ("dense",)),
    ("model", "position + params[\"level_embed\"][level]", "position + 0.0 * params[\"level_embed\"][level]",
     "model", "forward_equals_torch", ("three",)),
    ("model", "position + params[\"level_embed\"][level]", "position + params[\"level_embed\"][0]",
     "model", "forward_equals_torch", ("three",)),
    # What the encoder exchanges between levels.
    ("encoder", "elif index in config.cross_level_blocks:", "elif False:",
     "encoder", "which_levels_learn_of_a_change_in_the_finest", ({"cross_level_blocks": (1,)}, [True] * 3, False)),
    ("encoder", "elif index in config.cross_level_blocks:", "elif index + 1 in config.cross_level_blocks:",
     "model", "forward_equals_torch", ("three",)),
    ("encoder", "elif index in config.cross_level_blocks:", "elif True:",
     "encoder", "which_levels_learn_of_a_change_in_the_finest", ({}, [True, False, False], True)),
    ("encoder", "[grid.key_padding_mask for grid in grids]", "[grid.key_padding_mask & False for grid in grids]",
     "model", "an_image_does_not_depend_on_its_batch", ("three",)),
    ("encoder_conv", "zero_padded(map_of_cells(x, grid.size), grid.key_padding_mask)", "map_of_cells(x, grid.size)",
     "encoder", "pyramid_exchange_does_not_depend_on_padding", ((33, 47),)),
    ("encoder_conv", "maps[j - 1], params, f\"{name}.finer\"", "maps[j - 1], params, f\"{name}.coarser\"",
     "model", "forward_equals_torch", ("pyramid",)),
    ("encoder_conv", "depthwise_convolution(maps[j + 1], params, f\"{name}.coarser\")",
     "depthwise_convolution(maps[j + 1], params, f\"{name}.own\")", "model", "forward_equals_torch", ("pyramid",)),
    ("encoder_conv", "coarse.repeat(ratio, axis=2).repeat(ratio, axis=3)", "np.tile(coarse, (1, 1, ratio, ratio))",
     "encoder", "pyramid_exchange_reaches_neighbouring_cells_of_neighbouring_levels", ()),
    ("encoder_conv", "        if j > 0:\n            ratio", "        if j > 1:\n            ratio",
     "encoder", "pyramid_exchange_over_a_ratio_of_four", ()),
    ("encoder_conv", "x[:, :, : size[0], : size[1]]", "x[:, :, -size[0] :, -size[1] :]",
     "encoder", "pyramid_exchange_does_not_depend_on_padding", ((33, 47),)),
    ("encoder_conv", "(0, rows), (0, columns)", "(rows, 0), (columns, 0)",
     "encoder", "pyramid_exchange_takes_maps_that_lack_or_exceed_a_cell", ()),
    ("layers", "s : s + height : stride, t : t + width : stride", "t : t + height : stride, s : s + width : stride",
     "model", "forward_equals_torch", ("pyramid",)),
    ("layers", "(margin, margin), (margin, margin)", "(2 * margin, 0), (2 * margin, 0)",
     "encoder", "pyramid_exchange_reaches_neighbouring_cells_of_neighbouring_levels", ()),
    # The authors' convolutional encoder.
    ("encoder_conv", "f\"{name}.own.{j}\"", "f\"{name}.own.0\"", "model", "forward_equals_torch", ("conv",)),
    ("encoder_conv", "linear(x + grid.position, params, f\"{name}.in_proj\")", "linear(x, params, f\"{name}.in_proj\")",
     "model", "forward_equals_torch", ("conv",)),
    ("encoder_conv", "_with_bias(u[j - 1], params, f\"{name}.finer\", stride=2)",
     "_with_bias(map_of_cells(levels[j - 1], grids[j - 1].size), params, f\"{name}.finer\", stride=2)",
     "model", "forward_equals_torch", ("conv",)),
    ("encoder_conv", "stretch(_with_bias(u[j + 1], params, f\"{name}.coarser\"), grid.size)",
     "stretch(_with_bias(map_of_cells(levels[j + 1], grids[j + 1].size), params, f\"{name}.coarser\"), grid.size)",
     "model", "forward_equals_torch", ("conv",)),
    ("encoder_conv", "v = v + _with_bias(u[j - 1]", "v = v + _with_bias(v[:, :, :1, :1] + 0 * u[j - 1]",
     "model", "forward_equals_torch", ("conv",)),
    ("encoder_conv", "_with_bias(u[j - 1], params, f\"{name}.finer\", stride=2)",
     "depthwise_convolution(u[j - 1], params, f\"{name}.finer\", stride=2)",
     "encoder", "the_authors_exchange_tells_levels_and_places_apart", ()),
    ("encoder_conv", "stretch(_with_bias(u[j + 1], params, f\"{name}.coarser\"), grid.size)",
     "stretch(depthwise_convolution(u[j + 1], params, f\"{name}.coarser\"), grid.size)",
     "encoder", "the_authors_exchange_tells_levels_and_places_apart", ()),
    ("encoder_conv", "place = np.arange(count) * (of - 1) / max(1, count - 1)",  # corners not aligned
     "place = np.clip((np.arange(count) + 0.5) * of / count - 0.5, 0, of - 1)",
     "encoder", "stretch_equals_torchs_interpolation_with_aligned_corners", ()),
    ("encoder_conv", "1.0 - np.abs(place[:, None] - np.arange(of))", "1.0 - np.abs(np.round(place)[:, None] - np.arange(of))",
     "encoder", "stretch_equals_torchs_interpolation_with_aligned_corners", ()),
    ("encoder_conv", "max(1, count - 1)", "count", "encoder", "stretch_equals_torchs_interpolation_with_aligned_corners", ()),
    ("encoder_conv", "np.where(grid.key_padding_mask[..., None], 0.0, x)", "x + 0.0",
     "encoder", "padded_cells_enter_the_authors_encoder_as_0", ()),
    ("encoder", "if config.encoder == \"conv\" else list(levels)", "if False else list(levels)",
     "model", "padded_cells_do_not_matter", ("conv", float("nan"))),
    ("encoder", "y = [layer_norm(x, params, f\"{name}.norm1\") for x in levels] if config.pre_norm else list(levels)",
     "y = list(levels)", "model", "forward_equals_torch", ("conv-pre",)),
    # Levels beyond the backbone's, and the finest one halved.
    ("model", "features[-1] if j == len(features) else maps[-1]", "features[-1]",
     "model", "levels_beyond_the_backbones", ("three", 1)),
    ("model", "source = zero_padded(before, grids[j - 1].key_padding_mask)", "source = before",
     "model", "levels_beyond_the_backbones", ("three", 2)),
    ("model", "source = zero_padded(map_of_cells(memory[0], grids[0].size), grids[0].key_padding_mask)",
     "source = map_of_cells(memory[0], grids[0].size)", "model", "padded_cells_do_not_matter", ("halved", float("nan"))),
    ("model", "grids[0].valid_cells * grids[0].stride, size, stride, 0,",
     "grids[0].valid_cells * stride, size, stride, 0,", "model", "forward_equals_torch", ("halved",)),
    ("model", "decoder_strides(config)[0]", "grids[0].stride", "model", "forward_equals_torch", ("halved",)),
    ("config", "2 if config.halve_finest else 1", "1", "model", "forward_equals_torch", ("halved",)),
    ("model", "[cells_of_map(halved), *memory[1:]], [grid, *grids[1:]]",
     "[cells_of_map(halved), *memory[1:]], [*grids[1:2], *grids[1:]]",
     "model", "halved_levels_have_positions_of_their_own", ()),
]  # fmt: skip


def load(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def test_modules() -> dict[str, types.ModuleType]:
    names = ("attention", "scales", "boxes", "matching", "losses", "softmax_scores", "encoder", "model")
    return {name: load(Path(__file__).with_name(f"test_{name}.py"), f"_under_mutation_{name}") for name in names}


def arguments(tests: types.ModuleType, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """In place of a name in CONFIGS, that configuration."""
    configs = {name: tests.Config(**fields) for name, fields in CONFIGS.items()} if hasattr(tests, "Config") else {}
    return tuple(configs.get(item, item) if isinstance(item, str) else item for item in given)


def use(package: str, tests: types.ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Whatever of the specification a test calls, let it call that of `package`."""
    for name, value in list(vars(tests).items()):
        module = getattr(value, "__module__", None) or ""
        if callable(value) and module.startswith("smca.reference."):
            planted = importlib.import_module(module.replace("smca.reference", package, 1))
            patch.setattr(tests, name, getattr(planted, value.__name__))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("entry", MUTANTS, ids=[f"{m[0]}-{i}" for i, m in enumerate(MUTANTS)])
def test_mutant_is_caught(
    entry: tuple[str, str, str, str, str, tuple[Any, ...]],
    test_modules: dict[str, types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, source, replacement, test_file, test, given = entry
    tests = test_modules[test_file]
    run = getattr(tests, f"test_{test}")
    run(*arguments(tests, given))  # green on the true module
    with planted_package(Mutant(f"{source} → {replacement}", "reference", module, source, replacement)) as package:
        use(package, tests, monkeypatch)
        with pytest.raises((AssertionError, pytest.fail.Exception, TypeError, ValueError)):
            run(*arguments(tests, given))
