"""What an implementation under test looks like, and how to look one up by name.

An implementation is any object with some of the methods below. Each takes and returns NumPy arrays, has the argument
order of its namesake in `smca.reference`, and one keyword more, ``dtype``: the arithmetic to use, one of the names that
the object lists in ``dtypes``. Inputs arrive in float64 but hold only values that this dtype represents (centres,
precisions and boxes: float32, where dtype is a half precision), so converting them loses nothing. Of scores in half
precision, losses and costs are computed in float32. A method that is missing or
None is reported as not implemented. ``example_adapter.py`` is a template, docs/conformance.md a guide.

Shape letters: B images, N queries, h heads, d channels per head, J levels, L = H·W keys, M decoder layers, K classes,
T targets.

    smca_attention(q, k, v, center_xy, precision_xy, size, key_padding_mask, *, dtype) → [B, h, N, d]
    smca_attention_vjp(grad_out, *the same, dtype) → dq, dk, dv, dcenter_xy, dprecision_xy
    smca_attention_dropout(grad_out, *the same, rate, seed, dtype) → output and the five gradients, each weight of A dropped
        with probability `rate` and the others divided by 1 − rate; `seed`, an int64, determines which
    multi_scale_smca_attention(q, levels, level_weights, *, dtype) → [B, h, N, d]
    multi_scale_smca_attention_vjp(grad_out, q, levels, level_weights, *, dtype)
        → dq, a list of (dk, dv, dcenter_xy, dprecision_xy) by level, dlevel_weights
    match_cost(logits [N, K], boxes [N, 4], labels [T], target_boxes [T, 4], weights, *, dtype) → [N, T]
    assign(cost [n, m], *, dtype) → rows, cols, each [min(n, m)], as scipy.optimize.linear_sum_assignment; +inf forbids a pair
    generalized_box_iou(boxes1 [n, 4], boxes2 [m, 4], *, dtype) → [n, m], boxes as xyxy
    set_loss(logits [M, B, N, K], boxes [M, B, N, 4], targets, weights, *, dtype) → {"class/0": …, "loss": …}
    set_loss_vjp(the same) → gradients of "loss" with respect to logits and boxes
    forward(params, features, valid_sizes, config, *, dtype) → {"logits": [M, B, N, K], "boxes": [M, B, N, 4]}; with
        padded_size=(height, width) in pixels as well where config.padding_cells is "nearest"
    forward_vjp(grad_logits, grad_boxes, *as forward, dtype) → gradient of every entry of params, by name

and of what goes beyond the paper (docs/method.md §8):

    anchored_forward(params, features, valid_sizes, config, further, *, dtype) → all outputs of `smca.reference.model.forward`, for
        configurations with a box per query; further: None, or `FurtherQueries` (box_logits, labels, sees)
    anchored_forward_vjp(gradients of outputs by name, *as anchored_forward, dtype) → gradient of every entry of params, by name
    noised_queries(targets, noise, *, dtype) → box_logits [B, D, 4], labels [B, D], sees [B, D, D]
    training_loss(outputs, targets, weights, classification, *, dtype) → the terms of layers, noised queries and cells by name
    training_loss_vjp(the same) → gradient of "loss" with respect to each output that a loss reads, by name

and of DETR's own scores and loss (docs/method.md §5), z being the outputs for K classes and "no object":

    log_odds(z [n, K + 1], *, dtype) → [n, K], the log-odds of each class
    log_odds_vjp(grad_out [n, K], z, *, dtype) → gradient of z
    softmax_match_cost(logits [N, K], …as match_cost) → [N, T]; the logits are log-odds
    softmax_set_loss(z [M, B, N, K + 1], …as set_loss) → {"class/0": …, "loss": …}, "no object" weighing 0.1
    softmax_set_loss_vjp(the same) → gradients of "loss" with respect to z and boxes

and of what happens around the model in training (reference/training_step.py), for the detector of `smca.reference.small_detector`:

    train(params, steps, settings, *, dtype) → {"loss": [S], "gradient_norm": [S], "params.<name>": [S, …], "average.<name>": …}
        of S steps, each with `shards`, [process][part] of (x [B, N, I], targets), and `factor`, of all learning rates; settings:
        `TrainingSettings`. The loss is that before the step, the norm that before clipping, the rest is as after the step. Without
        an average (ema_decay=0) there is none of its names.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

OPERATIONS = (
    "smca_attention",
    "smca_attention_vjp",
    "smca_attention_dropout",
    "multi_scale_smca_attention",
    "multi_scale_smca_attention_vjp",
    "match_cost",
    "assign",
    "generalized_box_iou",
    "set_loss",
    "set_loss_vjp",
    "forward",
    "forward_vjp",
    "anchored_forward",
    "anchored_forward_vjp",
    "noised_queries",
    "training_loss",
    "training_loss_vjp",
    "log_odds",
    "log_odds_vjp",
    "softmax_match_cost",
    "softmax_set_loss",
    "softmax_set_loss_vjp",
    "train",
)
"""All operations that an implementation may offer."""

DTYPES = ("float64", "float32", "float16", "bfloat16")
"""All names that `dtypes` may hold."""


class Unavailable(Exception):
    """This implementation cannot run on this machine; the message says what is missing and how to get it."""


def implemented(implementation: Any, operation: str) -> bool:
    """Whether the object offers an operation."""
    return callable(getattr(implementation, operation, None))


def dtypes_of(implementation: Any) -> tuple[str, ...]:
    """The dtypes that the object lists, checked; ("float64",) if it lists none.

    Raises:
        ValueError: a name that is not in ``DTYPES``.
    """
    dtypes = tuple(getattr(implementation, "dtypes", ("float64",)))
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"{name_of(implementation)}.dtypes: expected some of {', '.join(DTYPES)}, got {dtype!r}")
    return dtypes


def name_of(implementation: Any) -> str:
    """What reports call the object: its `name`, or its class's."""
    return str(getattr(implementation, "name", type(implementation).__name__))


def address_of(implementation: Any) -> str:
    """By what `replay` finds the object: "package.module:Class" for an outside one, else its name."""
    return str(getattr(implementation, "conformance_address", name_of(implementation)))


def expanded_up_to(implementation: Any, dtype: str) -> float:
    """Largest λ·(extent/2)² up to which it forms log G in the expanded form (docs/method.md §6), from x²·λ and x·λ·c apart.

    That form suffers from cancellation, so it is held to a bound of its own (`tolerances`). An implementation declares it
    by an attribute ``expanded_up_to``, dtype → limit. A dtype that is not listed has a limit of 0: log G is formed from (x − c)².
    """
    limits: dict[str, float] = getattr(implementation, "expanded_up_to", {})
    return float(limits.get(dtype, 0.0))


def skips_below(implementation: Any) -> float:
    """What the weights of skipped keys may add up to, as a fraction of all weights.

    An implementation that skips keys too far away to matter declares it by an attribute ``skips_below``, and is held to it.
    """
    return float(getattr(implementation, "skips_below", 0.0))


def leaves_out(implementation: Any) -> tuple[str, ...]:
    """Names of properties that the object says it does not have, by an attribute ``leaves_out``: ("assign.forbidden_pairs",).

    They are reported as not implemented.
    """
    return tuple(getattr(implementation, "leaves_out", ()))


def load_outside(target: str) -> Any:
    """The implementation that "package.module:Class" names: the class, called without arguments.

    Raises:
        ValueError: not of that form, no such module or class, or an object that offers none of ``OPERATIONS``.
    """
    module_name, colon, class_name = target.partition(":")
    if not (module_name and colon and class_name):
        raise ValueError(f"--implementation: expected package.module:Class, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the command is run in, as `python -m` has it
    try:
        made = getattr(importlib.import_module(module_name), class_name)()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--implementation {target}: {error}. Run in the folder it is in, install it, or set PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise ValueError(f"--implementation {target}: {error}. Is the class named correctly?") from error
    if not any(implemented(made, operation) for operation in OPERATIONS):
        raise ValueError(
            f"--implementation {target}: it has none of the operations {', '.join(OPERATIONS)}. Name a class that has some."
        )
    dtypes_of(made)
    made.conformance_address = target
    return made
