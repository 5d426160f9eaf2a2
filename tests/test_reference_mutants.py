"""Proof that the tests of smca.reference can fail: each mutant is one deliberate error, and a named test must go red.

A mutant is a module of the specification with one piece of its source replaced. Its functions take the place of the
true ones in every module that uses them, the test's own included, while that test runs.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

# (module, source, its replacement, test file, test, its arguments)
MUTANTS: list[tuple[str, str, str, str, str, tuple[Any, ...]]] = [
    # The prior: cell centres, row-major order, the factor ½, the sign, the axes.
    ("attention", "key % width + 0.5", "key % width + 0.0", "attention", "attention_equals_loops", ((3, 4), False)),
    ("attention", "[key % width + 0.5, key // width + 0.5]", "[key // height + 0.5, key % height + 0.5]",
     "attention", "attention_equals_loops", ((3, 4), False)),
    ("attention", "-0.5 * np.einsum(\"bhna,bhnla->bhnl\"", "-1.0 * np.einsum(\"bhna,bhnla->bhnl\"",
     "attention", "attention_equals_torch", ()),
    ("attention", "log_prior = -0.5", "log_prior = 0.5", "attention", "prior_enters_as_the_weight_map", ()),
    ("attention", "key_xy - center_xy[..., None, :]", "key_xy - center_xy[..., None, ::-1]",
     "attention", "attention_equals_loops", ((4, 3), True)),
    ("attention", "/ q.shape[-1] ** 0.5 +", "/ q.shape[-1] +", "attention", "precision_of_zero_is_plain_attention", ()),
    ("attention", "-distance_x[..., None, :] - distance_y[..., :, None]",
     "-0.5 * distance_x[..., None, :] - 0.5 * distance_y[..., :, None]",
     "attention", "weight_map_is_the_papers_equation", ()),
    ("attention", "2.0 / (beta * scale_xy**2)", "1.0 / (beta * scale_xy**2)",
     "attention", "weight_map_equals_its_precision_form", ()),
    ("attention", " - np.max(logits, axis=-1, keepdims=True)", "", "attention",
     "a_distant_narrow_prior_does_not_overflow", ()),
    ("attention", "np.where(key_padding_mask[:, None, None, :], -np.inf, logits)", "logits + 0.0",
     "attention", "padding_is_the_same_as_a_smaller_map", ()),
    ("attention", "np.where(key_padding_mask[:, None, :, None], 0.0, keys)", "keys",
     "attention", "padded_keys_are_never_read", (float("nan"),)),
    ("attention", "key = np.arange(height * width, like=center_xy)", "key = np.arange(height * width)",
     "attention", "runs_on_foreign_arrays_through_numpys_protocols", ()),
    # The backward pass, equation by equation.
    ("attention", "np.swapaxes(weights, -1, -2) @ grad_out", "np.swapaxes(weights, -1, -2) @ (0.5 * grad_out)",
     "attention", "vjp_equals_central_differences", ()),
    ("attention", "(dweights - np.sum(weights * dweights, axis=-1, keepdims=True))", "dweights",
     "attention", "vjp_equals_central_differences", ()),
    ("attention", "dq = dlogits @ k / root_d", "dq = dlogits @ k", "attention", "vjp_equals_autograd", (1.0, False)),
    ("attention", "dcenter_xy = precision_xy *", "dcenter_xy = -precision_xy *",
     "attention", "vjp_equals_central_differences", ()),
    ("attention", "dlogits, -0.5 * difference_xy**2", "dlogits, -difference_xy**2",
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
    ("losses", "num_boxes = max(1, int(valid.sum()))", "num_boxes = float(valid.sum())",
     "losses", "no_object_anywhere", (3,)),
    ("losses", "labels[image, target]] = 1.0", "labels[image, target] * 0] = 1.0", "losses", "set_loss_by_hand", ()),
    ("losses", "real[columns]] = queries", "columns] = queries", "losses", "set_loss_by_hand", ()),
    ("losses", "match_cost(\n                logits[layer, image], boxes[layer, image]",
     "match_cost(\n                logits[0, image], boxes[0, image]", "losses", "set_loss_by_hand", ()),
    ("losses", "weights[term] * total / num_boxes", "total / num_boxes", "losses", "set_loss_by_hand", ()),
    # Layers and positions.
    ("layers", "LAYER_NORM_EPSILON = 1e-5", "LAYER_NORM_EPSILON = 1e-6", "model", "encoder_layer_equals_torchs", ()),
    ("layers", "np.mean(centered**2, axis=-1, keepdims=True)", "np.var(x, axis=-1, keepdims=True, ddof=1)",
     "model", "encoder_layer_equals_torchs", ()),
    ("layers", "y + position, y + position, y,", "y + position, y + position, y + position,",
     "model", "forward_equals_torch", ("post",)),
    ("layers", "v = np.where(key_padding_mask[:, None, :, None], 0.0, v)", "v = v * 1.0",
     "model", "padded_cells_do_not_matter", ("post", float("nan"))),
    ("position", "[encoded_y, encoded_x]", "[encoded_x, encoded_y]", "model", "position_encoding_by_hand", ()),
    ("position", "2 * (t // 2) / channels", "t / channels", "model", "position_encoding_by_hand", ()),
    ("position", "(np.arange(width) + 0.5)", "(np.arange(width) + 1.0)", "model", "position_encoding_by_hand", ()),
    # The decoder and the model.
    ("decoder", "valid_cells[:, None, ::-1]", "valid_cells[:, None, :]", "model", "forward_equals_torch", ("post",)),
    ("decoder", "config.stride / config.prior_sigma_px) ** 2", "config.stride / config.prior_sigma_px) ** 2 * 2",
     "model", "forward_equals_torch", ("post",)),
    ("decoder", "state = layer_norm(t + query_position,", "state = layer_norm(t,",
     "model", "forward_equals_torch", ("pre",)),
    ("decoder", "            reference_logits = box_logits", "            reference_logits = reference_logits",
     "model", "forward_equals_torch", ("pre",)),
    ("decoder", "if index == 0:", "if True:", "model", "forward_equals_torch", ("post",)),
    ("decoder", "decoded = layer_norm(t, params, \"decoder.norm\")", "decoded = t",
     "model", "forward_equals_torch", ("pre",)),
    ("decoder", "memory + position, memory,", "memory, memory,", "model", "forward_equals_torch", ("pre",)),
    ("decoder", "smca_attention(q, k, v, center_xy, precision_xy, size, key_padding_mask)",
     "smca_attention(q, k, v, center_xy, precision_xy, size)",
     "model", "an_image_does_not_depend_on_its_batch", ("pre",)),
    ("decoder", "(inverse_scale_xy * config.stride", "(inverse_scale_xy / config.stride",
     "model", "sigma_is_in_pixels", ()),
    ("model", "column_padded = np.arange(width) >=", "column_padded = np.arange(width) + 0.5 >=",
     "model", "cells_that_hold_a_pixel_are_not_padded", ()),
    ("model", "return layer_norm(x, params, \"encoder.norm\") if config.pre_norm else x", "return x",
     "model", "forward_equals_torch", ("pre",)),
    ("model", ".transpose(0, 2, 1)  # [B, L, C_in], row-major", ".transpose(0, 2, 1)[:, ::-1]",
     "model", "forward_equals_torch", ("post",)),
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
    names = ("attention", "boxes", "matching", "losses", "model")
    return {
        name: load(Path(__file__).with_name(f"test_reference_{name}.py"), f"_under_mutation_{name}") for name in names
    }


def arguments(tests: types.ModuleType, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """In place of "post" and "pre", a whole configuration: the published form, and the one with every option."""
    configs = {}
    if hasattr(tests, "Config"):
        configs["post"] = tests.Config()
        configs["pre"] = tests.Config(pre_norm=True, query_init="grid", box_refinement=True)
    return tuple(configs.get(item, item) if isinstance(item, str) else item for item in given)


def put_in_place(mutant: types.ModuleType, true: types.ModuleType, tests: types.ModuleType, patch: Any) -> None:
    """Wherever a public name of the true module is used, use the mutant's."""
    users = [module for name, module in sys.modules.items() if name.startswith("smca.reference.")]
    for user in [*users, tests]:
        for name, value in list(vars(user).items()):
            if callable(value) and getattr(value, "__module__", None) == true.__name__ and hasattr(mutant, name):
                patch.setattr(user, name, getattr(mutant, name))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("entry", MUTANTS, ids=[f"{m[0]}-{i}" for i, m in enumerate(MUTANTS)])
def test_mutant_is_caught(
    entry: tuple[str, str, str, str, str, tuple[Any, ...]],
    test_modules: dict[str, types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, source, replacement, test_file, test, given = entry
    true = importlib.import_module(f"smca.reference.{module}")
    text = Path(str(true.__file__)).read_text(encoding="utf-8")
    assert text.count(source) == 1, f"{source!r} is no longer in {module}.py exactly once: update this mutant"
    mutant = types.ModuleType(f"mutant_{module}")
    mutant.__file__ = true.__file__
    monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
    exec(compile(text.replace(source, replacement), f"<mutant of {module}>", "exec"), mutant.__dict__)

    tests = test_modules[test_file]
    run = getattr(tests, f"test_{test}")
    run(*arguments(tests, given))  # green on the true module
    put_in_place(mutant, true, tests, monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, TypeError)):
        run(*arguments(tests, given))
