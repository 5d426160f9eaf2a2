"""What a class head, a box head and the heads of the prior take from a trained model's: row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from smca.gpu.config import ModelConfig
from smca.gpu.weights.pair import Pair, PartFit, Write, missing_levels, option

QUIET = 0.01
"""r = 1/s of the Gaussians that a model without any goes on with: log G is then a ten-thousandth of what it is at r = 1.
At 0 it would be nothing at all, but so would be its gradient, λ being r²·unit, and it would stay 0 for ever."""
SIGMOIDS = (
    "scores of a softmax there become sigmoids of w_k − w_∅: each is exactly p_k/(p_k + p_∅), that is p_k where no other "
    "class competes"
)
_AXES = {"fixed": 0, "single": 1, "independent": 2}


def fit_class_rows(pair: Pair, fit: PartFit, head: str) -> None:
    """Rows of the classifier `head` for the classes that are the same."""
    weights = pair.source.weights
    pairs, words = pair.classes()
    rows_here, rows_there = pair.layout[f"{head}.weight"][0], weights[f"{head}.weight"].shape[0]
    softmax_here, softmax_there = rows_here > pair.here.num_classes, rows_there > pair.there.num_classes
    if softmax_here and not softmax_there:
        fit.lacking.append(
            "sigmoid scores there, a softmax here, which has no row for no object: --model.class-scores sigmoid"
        )
        return
    if not pairs:
        fit.lacking.append(words)
        return
    here, there = [list(labels) for labels in zip(*pairs, strict=True)]
    if softmax_here:
        here, there = [*here, rows_here - 1], [*there, rows_there - 1]
    for kind in ("weight", "bias"):
        value = weights[f"{head}.{kind}"]
        rows = value[torch.tensor(there)]
        if softmax_there and not softmax_here:
            rows = (rows.double() - value[-1].double()).to(value.dtype)
        fit.writes.append(Write(f"{head}.{kind}", rows, tuple(here)))
    if softmax_there and not softmax_here:
        fit.remarks.append(SIGMOIDS)
    if len(pairs) == pair.here.num_classes:
        fit.taken = fit.taken or words
    else:
        fit.lacking.append(words)
        fit.taken = fit.taken or "in part"


def fit_class_head(pair: Pair) -> PartFit:
    """The decoder's classifier."""
    fit = PartFit("class_head", lacking=pair.differences("hidden_dim"))
    if not fit.lacking:
        fit_class_rows(pair, fit, "decoder.class_head")
    return fit


def reference_of(config: ModelConfig) -> str:
    """From where a box head's boxes count, in words."""
    if config.has_anchors:
        return "from the queries' own boxes"
    return "from reference centres" if config.cross_attention == "smca" else "from the middle of the image"


def fit_box_heads(pair: Pair) -> PartFit:
    """The decoder's box heads: one, or one per layer."""
    here, there = pair.here, pair.there
    fit = PartFit("box_heads", lacking=pair.differences("hidden_dim", "box_refinement"))
    if here.has_anchors != there.has_anchors:
        fit.lacking.append(
            f"boxes count {reference_of(there)} there, {reference_of(here)} here: {option('query_init', there.query_init)}"
        )
    if fit.lacking:
        return fit
    heads = min(here.decoder_layers, there.decoder_layers) if here.box_refinement else 1
    names = [name for name in pair.names("box_heads") if int(name.split(".")[2]) < heads]
    if not pair.copy(fit, names):
        fit.taken = "whole"
    if here.box_refinement and here.decoder_layers > heads:
        fit.taken = f"{heads} of {here.decoder_layers}"
        fit.lacking += pair.differences("decoder_layers")
    if there.cross_attention == "smca" and here.cross_attention == "dense" and not here.has_anchors:
        fit.remarks.append(
            f"boxes count {reference_of(there)} there, {reference_of(here)} here: not exact; "
            f"{option('cross_attention', 'smca')} keeps it so"
        )
    return fit


def fit_dense_head(pair: Pair) -> PartFit | None:
    """The head of the cells, if the model has one."""
    if not pair.names("dense_head"):
        return None
    fit = PartFit("dense_head", lacking=pair.differences("hidden_dim"))
    if not pair.has("dense_head"):
        fit.lacking = ["there is none there"]
    if fit.lacking:
        return fit
    pair.copy(fit, [name for name in pair.names("dense_head") if ".box_head." in name])
    fit.taken = "boxes"
    fit_class_rows(pair, fit, "dense_head.class_head")
    if fit.whole:
        fit.taken = pair.classes()[1]
    if pair.here.decoder_strides[-1] != pair.there.decoder_strides[-1]:
        fit.remarks.append(
            "cells start with boxes in proportion to the coarsest level's, which is another one here: not exact"
        )
    return fit


def fit_prior(pair: Pair) -> PartFit | None:
    """Reference centres, offsets, widths and the weights of levels: what a query's state O is read for."""
    names, here, there = pair.names("prior"), pair.here, pair.there
    fit = PartFit("prior")
    if not names:
        if not pair.has("prior"):
            return None
        fit.lacking = [f"the model has none: {option('cross_attention', there.cross_attention)}"]
        return fit
    if not pair.has("prior"):
        fit.lacking = [pair.source.absent.get("prior", "there is none there")]
        return fit
    if lacking := pair.differences("hidden_dim"):
        fit.lacking = lacking
        return fit
    layers = min(here.decoder_layers, there.decoder_layers)
    kept = [name for name in names if name.startswith("decoder.center_head.") or int(name.split(".")[2]) < layers]
    if pair.copy(fit, [name for name in kept if name.startswith("decoder.center_head.")]):
        fit.lacking.append("the centre head starts afresh: there is none there")
    gaussians = [name for name in kept if ".prior." in name]
    reasons = _unlike(pair) if gaussians else []
    fit.lacking += [f"offsets and widths start afresh: {reason}" for reason in reasons]
    for name in gaussians if not reasons else ():
        _gaussians(pair, fit, name)
    weights = [name for name in kept if ".level_head." in name]
    for name in weights:
        if name in pair.source.weights:
            _by_level(pair, fit, name, pair.source.weights[name], [1, 1], [1, 1])
        elif name == weights[0]:
            fit.lacking.append("the weights of levels start afresh: there are none there")
    if not fit.writes:
        return fit
    pair.copy(fit, [name for name in kept if ".state_norm." in name])
    if any(".layers." in write.name and ".center_head." not in write.name for write in fit.writes):
        fit.lacking += missing_levels(pair.decoder_levels, pair.here.decoder_strides, pair.there.decoder_strides)
    if layers < here.decoder_layers:
        fit.lacking += pair.differences("decoder_layers")
    fit.taken = "whole" if not fit.lacking else "in part"
    return fit


def _unlike(pair: Pair) -> list[str]:
    """Why a model's Gaussians cannot be another's."""
    here, there = pair.here, pair.there
    if there.cross_attention != "smca":
        return ["there are none there"]
    found = pair.differences("prior_unit")
    if there.prior_heads != here.prior_heads and there.prior_heads != "shared":
        found += pair.differences("prior_heads")
    elif there.num_heads != here.num_heads and there.prior_heads != "shared":
        found += pair.differences("num_heads")
    if _AXES[there.prior_scale] > _AXES[here.prior_scale]:
        found += pair.differences("prior_scale")
    if here.prior_scale == "fixed" and any(factor != 1 for factor in _widths(pair)):
        found += pair.differences("prior_sigma_px") or [f"another width, of the strides {there.strides} there"]
    return found


def _widths(pair: Pair) -> list[float]:
    """What r is here where it is 1 there, on each level that both have: the same width in another unit, as λ = (stride/σ)²·r²."""
    if pair.here.prior_unit == "box":
        return [1.0 for level in pair.decoder_levels if level is not None]
    here, there = pair.here.sigma_of_levels, pair.there.sigma_of_levels
    return [sigma / there[level] for sigma, level in zip(here, pair.decoder_levels, strict=True) if level is not None]


def _gaussians(pair: Pair, fit: PartFit, name: str) -> None:
    """Rows of an offset or scale head. One Gaussian for all heads becomes one for each, one width for both axes two; of a width
    that was not predicted, r = 1."""
    here, there = pair.here, pair.there
    gaussians = [1 if config.prior_heads == "shared" else config.num_heads for config in (here, there)]
    if ".offset_head." in name:
        _by_level(pair, fit, name, pair.source.weights[name], gaussians, [2, 2])
        return
    axes, widths = [_AXES[config.prior_scale] for config in (here, there)], _widths(pair)
    value = pair.source.weights.get(name)
    if value is None:
        rows = gaussians[1] * len(there.strides)
        value = torch.ones(rows) if name.endswith("bias") else torch.zeros(rows, pair.layout[name][1])
    _by_level(pair, fit, name, value, gaussians, [axes[0], max(axes[1], 1)], widths)


def _by_level(
    pair: Pair,
    fit: PartFit,
    name: str,
    value: Tensor,
    gaussians: list[int],
    axes: list[int],
    factors: list[float] | None = None,
) -> None:
    """Rows [g, J, a] of a head from rows [g', J', a'] of one there, for the levels that both have; a single g' or a' serves all.

    Args:
        pair, fit, name: of the head.
        value: [g'·J'·a', …] there.
        gaussians: g and g'.
        axes: a and a'.
        factors: for each level that both have.
    """
    levels = [(level, other) for level, other in enumerate(pair.decoder_levels) if other is not None]
    if not levels:
        return
    rest = value.shape[1:]
    rows = value.reshape(gaussians[1], len(pair.there.strides), axes[1], *rest)
    rows = rows[:, torch.tensor([other for _, other in levels])]
    if factors is not None:
        rows = rows * torch.tensor(factors, dtype=torch.float64).reshape(-1, 1, *(1 for _ in rest))
    rows = rows.expand(gaussians[0], -1, axes[0], *rest).flatten(0, 2)
    index = torch.arange(gaussians[0] * len(pair.here.strides) * axes[0]).reshape(gaussians[0], -1, axes[0])
    index = index[:, torch.tensor([own for own, _ in levels])]
    fit.writes.append(Write(name, rows, tuple(index.flatten().tolist())))


def quiet_prior(pair: Pair) -> tuple[list[Write], list[str]]:
    """What makes a model with a prior start as one without did: no reference centres, Gaussians nearly without an end; and
    in words."""
    writes = []
    for name, shape in pair.layout.items():
        zero = torch.zeros(shape)
        last = "decoder.center_head.layers.2."
        if name.startswith(last) or name.endswith(".scale_head.weight"):
            writes.append(Write(name, zero))
        elif name.endswith(".scale_head.bias"):
            writes.append(Write(name, zero + QUIET))
    if pair.here.prior_scale == "fixed":
        return writes, [
            "there is no prior there, and one of fixed width cannot start at nothing: not exact; "
            + option("prior_scale", "independent")
        ]
    return writes, [f"there is no prior there, so it starts next to nothing (r = {QUIET}) and grows from there"]


def moved(value: Tensor, like: Tensor) -> Tensor:
    """`value` where `like` is, in its precision."""
    return value.to(device=like.device, dtype=like.dtype)
