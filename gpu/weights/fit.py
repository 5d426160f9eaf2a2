"""What a model takes from a trained one: part by part, as much as means the same here, and why the rest starts afresh.

source = open_source("facebook/detr-resnet-50")
plan = plan_start(source, config.model)
print(plan.report)
plan.apply(SMCADETR(config.model))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smca.datasets.settings import shown
from smca.gpu.config import ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.weights import heads
from smca.gpu.weights.pair import Pair, PartFit, Write, missing_levels, option
from smca.gpu.weights.source import PARTS, Part, Source, blank, is_counter

_IMPORTANT: tuple[Part, ...] = ("backbone", "encoder", "decoder")
_FOR: dict[Part, tuple[Part, ...]] = {
    "decoder": ("queries", "prior", "class_head", "box_heads"),
    "encoder": ("dense_head",),
}
"""Part → those that mean something together with it only."""
_CONVENTIONS = ("position_encoding", "padding_cells")
_TRAINING = re.compile("drop|init")
"""In the name of a backbone's option: it says how to train, not what is built."""


@dataclass(frozen=True)
class Plan:
    """What a model takes from a trained one."""

    source: Source
    parts: tuple[PartFit, ...]
    """Those that are taken or looked at, in the order of ``PARTS``."""
    report: str
    """For people: a line per part."""

    @property
    def brings_backbone(self) -> bool:
        """Whether all of the backbone is set, so that published weights need not be read."""
        return any(fit.part == "backbone" and fit.whole for fit in self.parts)

    @torch.no_grad()
    def apply(self, model: SMCADETR) -> None:
        """Set the weights of a model of the configuration that was planned for; what is not taken stays as it is."""
        state = model.state_dict()
        for write in (write for fit in self.parts for write in fit.writes):
            weight = state[write.name]
            value = heads.moved(write.value, weight)
            if write.rows is None:
                weight.copy_(value)
            else:
                weight[torch.tensor(write.rows, device=weight.device)] = value


def plan_start(source: Source, config: ModelConfig, parts: Sequence[Part] = ()) -> Plan:
    """Compare a trained model with the one that is to start from it.

    Args:
        source: the trained model.
        config: of the other one.
        parts: which parts to take; each must fit whole. None = all that fits, as far as it does.

    Raises:
        ValueError: a part of `parts` does not fit whole; or, if none is named, neither backbone nor encoder nor decoder fits.
    """
    model = blank(config)
    pair = Pair(source, config, {k: v.shape for k, v in model.state_dict().items() if not is_counter(k)})
    backbone = _backbone(pair, model)
    found = (
        backbone,
        _projections(pair, same_backbone=not backbone.lacking),
        _encoder(pair),
        _queries(pair),
        _decoder(pair),
        heads.fit_prior(pair),
        heads.fit_class_head(pair),
        heads.fit_box_heads(pair),
        heads.fit_dense_head(pair),
    )
    fits = {fit.part: fit for fit in found if fit is not None}
    if parts:
        _require_whole(source, fits, parts)
    else:
        fits |= {part: PartFit(part, lacking=[reason]) for part, reason in _left_over(fits).items()}
    taken = tuple(fits[part] for part in PARTS if part in fits and (part in parts or not parts))
    report = _report(pair, taken)
    if not parts and not any(fits[part].taken for part in _IMPORTANT if part in fits):
        raise ValueError(
            f"neither backbone nor encoder nor decoder of {source.name} fits this model:\n{report}\n"
            "Take the options that it names, or leave --init out"
        )
    return Plan(source, taken, report)


def _require_whole(source: Source, fits: dict[Part, PartFit], parts: Sequence[Part]) -> None:
    for part in parts:
        if part not in fits:
            raise ValueError(f"--init-parts names {part}, which neither this model has nor {source.name}: leave it out")
        if not fits[part].whole:
            raise ValueError(
                f"--init-parts asks for all of {part}, but of {source.name} it does not fit whole: "
                f"{fits[part].line.partition(' ')[2].strip()}. Without --init-parts what fits is taken"
            )


def _left_over(fits: dict[Part, PartFit]) -> dict[Part, str]:
    """Parts that would fit, but that are for another one, which does not; and which that is. (Trained heads on what an untrained
    decoder gives are sure of things that are not there.)"""
    found: dict[Part, str] = {}
    for of, parts in _FOR.items():
        if of not in fits or not fits[of].taken:
            found |= {
                part: f"it is for the {of}, which starts afresh" for part in parts if part in fits and fits[part].taken
            }
    return found


def _backbone(pair: Pair, model: SMCADETR) -> PartFit:
    fit = PartFit("backbone")
    here, there = model.backbone.resolved(pair.here.backbone), pair.there.backbone
    if here.name != there.name:
        fit.lacking.append(f"another architecture, {shown(there.name)} there, {shown(here.name)} here")
        return fit
    for key in sorted(here.options.keys() & there.options.keys()):
        a, b = there.options[key], here.options[key]
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # a value per stage: later ones may not be read
            a, b = list(a), list(b)
            length = min(len(a), len(b))
            if a[:length] == b[:length]:
                continue
        if a != b and not _TRAINING.search(key):
            fit.lacking.append(f"another architecture, {key} is {shown(a)} there, {shown(b)} here")
            return fit
    left = pair.copy(fit, pair.names("backbone"))
    if left:
        fit.writes.clear()
        fit.lacking.append(
            f"{len(left)} weights are not there or of another shape, such as {left[0]}: is a stage not read there?"
        )
        return fit
    fit.taken = "whole"
    fit.remarks += [f"pixels are scaled otherwise, {text}" for text in pair.differences("pixel_mean", "pixel_std")]
    return fit


def _projections(pair: Pair, *, same_backbone: bool) -> PartFit:
    fit = PartFit("projections", lacking=pair.differences("hidden_dim"))
    if not same_backbone:
        fit.lacking.append("they read the features of another backbone")
    if fit.lacking:
        return fit
    taken = []
    for level, other in enumerate(pair.levels):
        for kind in ("weight", "bias"):
            value = pair.source.weights.get(f"input_proj.{other}.{kind}")
            name = f"input_proj.{level}.{kind}"
            if value is not None and value.shape == pair.layout[name]:
                fit.writes.append(Write(name, value))
                taken.append(level)
    embed = pair.source.weights.get("level_embed")
    if embed is not None and "level_embed" in pair.layout:
        rows = [(level, other) for level, other in enumerate(pair.levels) if other is not None]
        fit.writes += [Write("level_embed", embed[other][None], (level,)) for level, other in rows]
    strides, count = pair.here.strides, len(set(taken))
    if count:
        fit.taken = "whole" if count == len(strides) else f"{count} of {len(strides)} levels"
    levels = [level if level in taken else None for level in range(len(strides))]
    fit.lacking += missing_levels(levels, strides, pair.there.strides)
    if embed is not None and "level_embed" not in pair.layout and pair.here.encoder_layers:
        fit.remarks.append("level embeddings there, none here: not exact")
    return fit


def _layers(pair: Pair, fit: PartFit, which: str) -> int:
    """How many layers both have; says so."""
    here, there = getattr(pair.here, which), getattr(pair.there, which)
    both = min(here, there)
    fit.taken = f"whole, {here} layer{'s' * (here != 1)}" if both == here else f"{both} of {here} layers"
    if here > there:
        fit.lacking += pair.differences(which)
    if here < there:
        fit.remarks.append(f"the first {here} of {there} layers there")
    return int(both)


def _encoder(pair: Pair) -> PartFit | None:
    names = pair.names("encoder")
    if not names:
        return None
    attends = ("num_heads",) if pair.here.encoder == "attention" else ()
    fit = PartFit("encoder", lacking=pair.differences("hidden_dim", *attends, "encoder", "feedforward_dim", "pre_norm"))
    if not pair.has("encoder"):
        fit.lacking = ["there is none there"]
    if fit.lacking:
        return fit
    layers, of_levels = _layers(pair, fit, "encoder_layers"), False
    for name in names:
        number, kernel = (re.search(p, name) for p in (r"^encoder\.layers\.(\d+)\.", r"(?<=\.own\.)\d+(?=\.)"))
        if number is not None and int(number[1]) >= layers:
            continue
        if kernel is None:
            left = pair.copy(fit, [name])
            if left == ["halve.weight"]:
                fit.lacking += pair.differences("halve_finest")
        else:  # of one level
            of_levels, level = True, pair.levels[int(kernel[0])]
            if level is not None:
                there = f"{name[: kernel.start()]}{level}{name[kernel.end() :]}"
                fit.writes.append(Write(name, pair.source.weights[there]))
    if of_levels:
        fit.lacking += missing_levels(pair.levels, pair.here.strides, pair.there.strides)
    if pair.there.cross_level_blocks and len(pair.here.strides) > 1:
        fit.remarks += [f"not exact: {text} is exact" for text in pair.differences("cross_level_blocks")]
    return fit


def _queries(pair: Pair) -> PartFit:
    here, there, weights = pair.here, pair.there, pair.source.weights
    fit = PartFit("queries", lacking=pair.differences("hidden_dim"))
    if here.has_anchors != there.has_anchors:
        fit.lacking += pair.differences("query_init")
    if fit.lacking:
        return fit
    count = min(here.num_queries, there.num_queries)
    rows = tuple(range(count))
    for name in pair.names("queries"):
        if name == "decoder.label_embed":
            pairs, words = pair.classes()
            if name in weights and pairs:
                index = torch.tensor([other for _, other in pairs])
                fit.writes.append(Write(name, weights[name][index], tuple(label for label, _ in pairs)))
            if name not in weights or len(pairs) < here.num_classes:
                fit.lacking.append(
                    f"contents of noised queries: {words if name in weights else 'there are none there'}"
                )
        elif ".query_" in name and name in weights:
            fit.writes.append(Write(name, weights[name][:count], rows))
        elif name == "decoder.query_center":  # there, a centre is the centre head's alone
            fit.writes.append(Write(name, torch.zeros(count, 2), rows))
        elif name == "decoder.query_anchor":
            fit.lacking.append(
                f"their boxes start afresh, there they are those of cells: {option('query_init', 'selected')}"
            )
        elif pair.copy(fit, [name]):
            fit.lacking.append(f"{name} is not there")
    fit.taken = f"all {count}" if count == here.num_queries else f"{count} of {here.num_queries}"
    if count < here.num_queries:
        fit.lacking += pair.differences("num_queries")
        fit.remarks.append("the others start afresh, and are attended to: not exact")
    if count < there.num_queries:
        fit.remarks.append(f"the first of {there.num_queries} there")
    if "decoder.query_center" in weights and "decoder.query_center" not in pair.layout:
        fit.remarks.append(f"a centre per query there, none here: not exact; {option('query_init', 'grid')}")
    return fit


def _decoder(pair: Pair) -> PartFit:
    fit = PartFit("decoder")
    fit.lacking = pair.differences("hidden_dim", "num_heads", "feedforward_dim", "pre_norm")
    if fit.lacking:
        return fit
    layers = _layers(pair, fit, "decoder_layers")
    names = [n for n in pair.names("decoder") if not n.startswith("decoder.layers.") or int(n.split(".")[2]) < layers]
    if pair.copy(fit, names):
        fit.taken = "in part"
        fit.lacking.append(f"afresh start {pair.source.absent.get('decoder', 'weights that are not there')}")
    if pair.there.cross_attention == "dense" and pair.here.cross_attention == "smca":
        writes, words = heads.quiet_prior(pair)
        fit.writes += writes
        fit.remarks += words
    if len(pair.here.strides) > len(pair.there.strides):
        fit.remarks.append("queries weigh all levels alike at first, and read levels that start afresh: not exact")
    return fit


def _report(pair: Pair, fits: Sequence[PartFit]) -> str:
    source, there = pair.source, pair.there
    lines = [
        f"start: {source.name}, {source.kind}: {there.encoder_layers} + {there.decoder_layers} layers, "
        f"{there.num_queries} queries, {there.num_classes} classes ({there.class_scores})"
    ]
    lines += [f"  {fit.line}" for fit in fits]
    both = [*_CONVENTIONS, *(["prior_state"] if there.cross_attention == pair.here.cross_attention == "smca" else [])]
    lines += [f"  not exact: {text} is exact" for text in pair.differences(*both)]
    lines += [f"  note: {note}" for note in source.notes]
    return "\n".join(lines)
