"""What a model takes from a trained one: the same function where that can be, a part of it otherwise, and a report of which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.presets import tiny_resnet
from smca.gpu.weights import Plan, Source, plan_start
from smca.gpu.weights.heads import QUIET

SMALL = ModelConfig(
    num_classes=3,
    class_names=("cat", "traffic light", "dog"),
    category_ids=(1, 2, 3),
    backbone=tiny_resnet(1, 1, 1),
    strides=(16,),
    hidden_dim=16,
    num_heads=4,
    num_queries=6,
    encoder_layers=2,
    decoder_layers=2,
    feedforward_dim=24,
    dropout=0.0,
    image_short_side=64,
    image_max_size=96,
)
LEVELS = replace(SMALL, strides=(8, 16, 32))


def trained(config: ModelConfig, seed: int = 0) -> SMCADETR:
    """A model none of whose weights is as they start."""
    torch.manual_seed(seed)
    model = SMCADETR(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model


def source_of(model: SMCADETR) -> Source:
    return Source("there", "a model of this project", model.config, model.state_dict())


def started(there: SMCADETR, here: ModelConfig, *parts: Any) -> tuple[SMCADETR, Plan]:
    """A model of a configuration that takes what fits of another, and the plan of it."""
    plan = plan_start(source_of(there), here, parts)
    torch.manual_seed(1)
    model = SMCADETR(here).double().eval()
    plan.apply(model)
    return model, plan


def lines_of(plan: Plan) -> dict[str, str]:
    """Part → what the report says of it; "start", "not exact" and "note" likewise."""
    lines = [line.strip() for line in plan.report.split("\n")]
    return {fit.part: fit.line.partition(" ")[2].strip() for fit in plan.parts} | {"report": "\n".join(lines)}


def outputs_of(model: SMCADETR) -> dict[str, Tensor]:
    """For two images, one of them padded."""
    torch.manual_seed(5)
    images, padding = torch.rand(2, 3, 64, 96, dtype=torch.float64), torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 50:], padding[1, :, 70:] = True, True
    with torch.no_grad():
        found: dict[str, Tensor] = model(images, padding)
    return found


def worst_of(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(worst_of(a[name], b[name]) for name in ("logits", "boxes"))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, cross_attention="dense"),
        replace(SMALL, query_init="grid", prior_scale="fixed"),
        replace(LEVELS, cross_level_blocks=(1,), box_refinement=True),
        replace(
            LEVELS,
            query_init="selected",
            dense_head=True,
            prior_unit="box",
            denoising_groups=1,
            pre_norm=True,
            encoder="pyramid_conv",
        ),
        replace(LEVELS, encoder="conv", halve_finest=True),
        replace(LEVELS, query_init="anchors", box_refinement=True, prior_heads="shared"),
    ],
)
def test_the_same_configuration_gives_the_same_model(config: ModelConfig) -> None:
    there = trained(config)
    here, plan = started(there, config)
    state = there.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in here.state_dict().items())
    assert all(fit.whole for fit in plan.parts)
    assert not [line for line in plan.report.split("\n") if "not exact" in line or "afresh" in line]


def test_the_report_has_a_line_per_part() -> None:
    there = trained(SMALL)
    here = replace(SMALL, class_names=("Dog", "Traffic_Light", "cow"), num_queries=9, encoder="conv")
    plan = plan_start(source_of(there), here)
    assert plan.report == (
        "start: there, a model of this project: 2 + 2 layers, 6 queries, 3 classes (sigmoid)\n"
        "  backbone     whole\n"
        "  projections  whole\n"
        "  encoder      not taken; encoder is 'attention' there, 'conv' here: --model.encoder attention\n"
        "  queries      6 of 9; num_queries is 6 there, 9 here: --model.num-queries 6; the others start afresh, and are "
        "attended to: not exact\n"
        "  decoder      whole, 2 layers\n"
        "  prior        whole\n"
        "  class_head   in part; 2 of 3 classes, by name (not there: cow)\n"
        "  box_heads    whole"
    )


def test_classes_are_found_by_name() -> None:
    """ "traffic light" in another order and spelling; a class that is not there starts as any does."""
    there = trained(SMALL)
    config = replace(
        SMALL, num_classes=4, class_names=("Dog", "Traffic_Light", "cow", "sheep"), category_ids=(1, 2, 3, 4)
    )
    here, plan = started(there, config)
    torch.manual_seed(1)
    fresh = SMCADETR(config).double()
    for kind in ("weight", "bias"):
        own, old, new = (getattr(model.decoder.class_head, kind) for model in (here, there, fresh))
        assert torch.equal(own[:2], old[[2, 1]])
        assert torch.equal(own[2:], new[2:])
    assert torch.equal(outputs_of(here)["boxes"], outputs_of(there)["boxes"])
    assert worst_of(outputs_of(here)["logits"][..., :2], outputs_of(there)["logits"][..., [2, 1]]) < 1e-14
    assert lines_of(plan)["class_head"] == "in part; 2 of 4 classes, by name (not there: cow, sheep)"

    _, plan = started(there, replace(SMALL, class_names=("a", "b", "c")))
    assert lines_of(plan)["class_head"] == (
        "not taken; none of the classes has the name of one there (cat, traffic light, dog there, a, b, c here)"
    )
    unnamed = trained(replace(SMALL, class_names=(), category_ids=()))
    _, plan = started(unnamed, SMALL)
    assert lines_of(plan)["class_head"] == "all 3 classes by position, as the classes there have no names"
    _, plan = started(unnamed, config)
    assert lines_of(plan)["class_head"] == "not taken; the 3 classes there have no names, and there are 4 here"
    _, plan = started(there, replace(SMALL, class_names=(), category_ids=()))
    assert lines_of(plan)["class_head"] == (
        "not taken; the classes here have no names yet: they come with the data, and those of the same name are taken"
    )


def with_no_object(there: SMCADETR) -> Source:
    """A trained model with a row for "no object", as a softmax has."""
    source = source_of(there)
    rows = {name: value for name, value in source.weights.items() if name.startswith("decoder.class_head.")}
    torch.manual_seed(2)
    more = {name: torch.cat([value, torch.randn_like(value[:1])]) for name, value in rows.items()}
    config = replace(there.config, class_scores="softmax")
    return replace(source, config=config, weights={**source.weights, **more})


def test_scores_of_a_softmax_become_sigmoids_against_no_object() -> None:
    """p_k/(p_k + p_∅), whatever the other classes have."""
    there = trained(SMALL)
    source = with_no_object(there)
    plan = plan_start(source, replace(SMALL, class_names=("dog", "cow", "cat")))
    here = SMCADETR(replace(SMALL, class_names=("dog", "cow", "cat"))).double().eval()
    plan.apply(here)
    states = torch.randn(5, 16, dtype=torch.float64)
    weight, bias = (source.weights[f"decoder.class_head.{kind}"] for kind in ("weight", "bias"))
    p = (states @ weight.T + bias).softmax(-1)
    found = here.decoder.class_head(states).sigmoid()
    assert worst_of(found[:, [0, 2]], (p / (p + p[:, -1:]))[:, [2, 0]]) < 1e-14
    assert lines_of(plan)["class_head"] == (
        "in part; 2 of 3 classes, by name (not there: cow); scores of a softmax there become sigmoids of w_k − w_∅: each is "
        "exactly "
        "p_k/(p_k + p_∅), that is p_k where no other class competes"
    )
    assert "3 classes (softmax)" in plan.report


def test_a_softmax_from_a_softmax_and_not_from_sigmoids() -> None:
    softmax = replace(SMALL, class_scores="softmax")
    there = trained(SMALL)
    source = with_no_object(there)
    plan = plan_start(source, replace(softmax, class_names=("dog", "cow", "cat")))
    here = SMCADETR(replace(softmax, class_names=("dog", "cow", "cat"))).double()
    plan.apply(here)
    assert torch.equal(
        here.decoder.class_head.weight[[0, 2, 3]], source.weights["decoder.class_head.weight"][[2, 0, 3]]
    )
    _, plan = started(there, softmax)
    assert lines_of(plan)["class_head"] == (
        "not taken; sigmoid scores there, a softmax here, which has no row for no object: --model.class-scores sigmoid"
    )


def test_classes_of_a_dense_head_and_of_noised_queries() -> None:
    config = replace(SMALL, query_init="selected", dense_head=True, denoising_groups=1)
    there = trained(config)
    here, plan = started(there, replace(config, class_names=("dog", "cat", "cow")))
    assert here.dense_head is not None
    assert there.dense_head is not None
    assert torch.equal(here.dense_head.class_head.weight[:2], there.dense_head.class_head.weight[[2, 0]])
    own, old = here.decoder.label_embed, there.decoder.label_embed
    assert own is not None
    assert old is not None
    assert torch.equal(own[:2], old[[2, 0]])
    assert not torch.equal(own[2], old[1])
    assert lines_of(plan)["dense_head"] == "boxes; 2 of 3 classes, by name (not there: cow)"
    assert lines_of(plan)["queries"] == "all 6; contents of noised queries: 2 of 3 classes, by name (not there: cow)"

    _, plan = started(trained(SMALL), config)
    assert lines_of(plan)["dense_head"] == "not taken; there is none there"
    assert (
        lines_of(plan)["queries"]
        == "not taken; query_init is 'random' there, 'selected' here: --model.query-init random"
    )
    assert lines_of(plan)["box_heads"] == (
        "not taken; boxes count from reference centres there, from the queries' own boxes here: --model.query-init random"
    )


def test_queries_as_far_as_they_go() -> None:
    there = trained(SMALL)
    fewer, plan = started(there, replace(SMALL, num_queries=4))
    assert fewer.decoder.query_position is not None
    assert there.decoder.query_position is not None
    assert torch.equal(fewer.decoder.query_position, there.decoder.query_position[:4])
    assert lines_of(plan)["queries"] == "all 4; the first of 6 there"
    more, plan = started(there, replace(SMALL, num_queries=8))
    assert more.decoder.query_position is not None
    assert torch.equal(more.decoder.query_position[:6], there.decoder.query_position)
    assert lines_of(plan)["queries"] == (
        "6 of 8; num_queries is 6 there, 8 here: --model.num-queries 6; the others start afresh, and are attended to: not exact"
    )


def test_levels_are_found_by_their_stride() -> None:
    """Weights of the level of stride 16 are those of stride 16 there, of all others fresh; and back."""
    there = trained(replace(LEVELS, prior_sigma_px=(20.0, 40.0, 80.0)))
    here, plan = started(there, replace(LEVELS, strides=(16, 32), prior_sigma_px=(40.0, 80.0)))
    with torch.no_grad():
        state = torch.randn(1, 6, 16, dtype=torch.float64)
        reference = torch.rand(1, 6, 4, dtype=torch.float64)
        ours = here.decoder.layers[0].prior(state, reference, _grids(2))
        theirs = there.decoder.layers[0].prior(state, reference, _grids(3))
    for own, old in zip(ours, theirs[1:], strict=True):
        assert all(worst_of(a, b) < 1e-13 for a, b in zip(own, old, strict=True))
    assert here.level_embed is not None
    assert there.level_embed is not None
    assert torch.equal(here.level_embed, there.level_embed[1:])
    assert torch.equal(here.input_proj[1].weight, there.input_proj[2].weight)
    assert lines_of(plan)["projections"] == "whole"
    assert lines_of(plan)["prior"] == "whole"

    back, plan = started(trained(SMALL), LEVELS)
    assert lines_of(plan)["projections"] == (
        "1 of 3 levels; what belongs to stride 8, 32 starts afresh: the strides there are 16"
    )
    assert lines_of(plan)["prior"] == (
        "in part; the weights of levels start afresh: there are none there; what belongs to stride 8, 32 starts afresh: the "
        "strides there "
        "are 16"
    )
    assert back.level_embed is not None
    assert torch.equal(back.level_embed, torch.zeros_like(back.level_embed))


def test_kernels_of_a_convolutional_encoder_are_found_by_stride() -> None:
    """And the level that is halved for the decoder is not the one of that stride."""
    config = replace(LEVELS, encoder="conv", halve_finest=True)  # 8, 16, 32; to the decoder 16, 16, 32
    there = trained(config)
    here, plan = started(there, replace(SMALL, strides=(16, 32), encoder="conv"))
    for layer in range(2):
        own, old = (model.encoder.layers[layer].conv.own for model in (here, there))
        assert all(torch.equal(own[level].weight, old[level + 1].weight) for level in range(2))
    offsets, wanted = (model.decoder.layers[1].prior.offset_head.bias.reshape(4, -1, 2) for model in (here, there))
    assert torch.equal(offsets, wanted[:, 1:])
    assert {part: lines_of(plan)[part] for part in ("encoder", "prior")} == {
        "encoder": "whole, 2 layers",
        "prior": "whole",
    }

    _, plan = started(trained(replace(LEVELS, encoder="conv")), config)
    assert lines_of(plan)["encoder"] == (
        "whole, 2 layers; halve_finest is False there, True here: --model.halve-finest False"
    )
    assert lines_of(plan)["prior"] == "in part; what belongs to stride 16 starts afresh: the strides there are 8 16 32"
    assert not plan.parts[2].whole


def _grids(levels: int) -> list[Any]:
    from smca.gpu.model.layers import Grid

    return [Grid((4, 4), torch.tensor([[3.5, 4.0]], dtype=torch.float64), None) for _ in range(levels)]


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"prior_sigma_px": 40.0}, {"prior_sigma_px": 100.0}),
        ({"prior_scale": "single"}, {"prior_scale": "independent"}),
        ({"prior_scale": "fixed", "prior_sigma_px": 40.0}, {"prior_scale": "single", "prior_sigma_px": 64.0}),
        ({"prior_heads": "shared"}, {"prior_heads": "independent"}),
        ({"query_init": "random"}, {"query_init": "grid"}),
    ],
)
def test_priors_that_say_the_same_in_another_form(there: dict[str, Any], here: dict[str, Any]) -> None:
    """More heads, axes or centres than there, or another unit of widths: the same function, to rounding."""
    old = trained(replace(SMALL, **there))
    new, plan = started(old, replace(SMALL, **here))
    assert worst(outputs_of(new), outputs_of(old)) < 1e-13
    assert all(fit.whole for fit in plan.parts)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            {},
            {"prior_scale": "single"},
            "in part; offsets and widths start afresh: prior_scale is 'independent' there, 'single' here: --model.prior-scale "
            "independent",
        ),
        (
            {},
            {"prior_heads": "shared"},
            "in part; offsets and widths start afresh: prior_heads is 'independent' there, 'shared' here: "
            "--model.prior-heads independent",
        ),
        (
            {"prior_scale": "fixed"},
            {"prior_scale": "fixed", "prior_sigma_px": 30.0},
            "in part; offsets and widths start afresh: prior_sigma_px is 64.0 there, 30.0 here: --model.prior-sigma-px 64.0",
        ),
    ],
)
def test_priors_that_do_not(there: dict[str, Any], here: dict[str, Any], message: str) -> None:
    _, plan = started(trained(replace(SMALL, **there)), replace(SMALL, **here))
    assert lines_of(plan)["prior"] == message


@pytest.mark.parametrize("query_init", ["random", "grid", "anchors"])
def test_a_prior_grows_from_next_to_nothing_in_a_model_that_had_none(query_init: Any) -> None:
    """DETR's outputs at first; and the widths move, which they would not from exactly 0."""
    there = trained(replace(SMALL, cross_attention="dense", query_init=query_init))
    here, plan = started(there, replace(SMALL, query_init=query_init))
    distance = worst(outputs_of(here), outputs_of(there))
    assert 0 < distance < 1e-4, "r is small, not 0"
    assert lines_of(plan)["decoder"] == (
        "whole, 2 layers; there is no prior there, so it starts next to nothing (r = 0.01) and grows from there"
    )
    assert lines_of(plan)["prior"] == "not taken; there is none there"

    fresh, _ = started(there, replace(SMALL, query_init=query_init), "backbone", "encoder")
    assert worst(outputs_of(fresh), outputs_of(there)) > 0.1

    optimizer = torch.optim.AdamW(here.parameters(), lr=1e-3, weight_decay=0.0)
    heads = [layer.prior.scale_head.bias for layer in here.decoder.layers]
    for step in range(20):
        found = here(torch.rand(2, 3, 64, 96, dtype=torch.float64))
        optimizer.zero_grad()
        (found["boxes"][..., 0].square().sum() + found["logits"].square().sum()).backward()
        if step == 0:
            assert all(float(head.grad.abs().min()) > 0 for head in heads)
        optimizer.step()
    assert all(float((head - QUIET).abs().max()) > 5e-3 for head in heads)


def test_a_prior_at_exactly_nothing_would_stay_there() -> None:
    """Why r starts at 0.01."""
    there = trained(replace(SMALL, cross_attention="dense"))
    here, _ = started(there, SMALL)
    with torch.no_grad():
        for layer in here.decoder.layers:
            layer.prior.scale_head.bias.zero_()
    assert worst(outputs_of(here), outputs_of(there)) < 1e-14
    here(torch.rand(1, 3, 64, 96, dtype=torch.float64))["boxes"].square().sum().backward()
    assert all(float(layer.prior.scale_head.bias.grad.abs().max()) == 0 for layer in here.decoder.layers)


def test_a_prior_of_fixed_width_cannot_start_from_nothing() -> None:
    there = trained(replace(SMALL, cross_attention="dense"))
    _, plan = started(there, replace(SMALL, prior_scale="fixed"))
    assert lines_of(plan)["decoder"] == (
        "whole, 2 layers; there is no prior there, and one of fixed width cannot start at nothing: not exact; "
        "--model.prior-scale independent"
    )


def test_a_prior_that_is_left_out() -> None:
    _, plan = started(trained(SMALL), replace(SMALL, cross_attention="dense"))
    assert lines_of(plan)["prior"] == "not taken; the model has none: --model.cross-attention smca"
    assert lines_of(plan)["decoder"] == "whole, 2 layers"
    assert lines_of(plan)["box_heads"] == (
        "whole; boxes count from reference centres there, from the middle of the image here: not exact; "
        "--model.cross-attention smca keeps "
        "it so"
    )


def test_conventions_that_differ_are_named() -> None:
    there = trained(replace(SMALL, position_encoding="detr", padding_cells="nearest", prior_state="entering"))
    _, plan = started(there, SMALL)
    assert plan.report.split("\n")[-3:] == [
        "  not exact: position_encoding is 'detr' there, 'centers' here: --model.position-encoding detr is exact",
        "  not exact: padding_cells is 'nearest' there, 'covered' here: --model.padding-cells nearest is exact",
        "  not exact: prior_state is 'entering' there, 'attended' here: --model.prior-state entering is exact",
    ]


def test_backbones() -> None:
    """Norms that learn and norms that do not have the same weights; another architecture is left out whole; later stages may
    lack."""
    frozen = trained(replace(SMALL, backbone=replace(SMALL.backbone, frozen_norm=True)))
    here, plan = started(frozen, SMALL)
    assert worst(outputs_of(here), outputs_of(frozen)) < 1e-13
    assert lines_of(plan)["backbone"] == "whole"
    back, plan = started(here, frozen.config)
    assert torch.equal(outputs_of(back)["boxes"], outputs_of(frozen)["boxes"])

    _, plan = started(frozen, replace(SMALL, backbone=tiny_resnet(1, 1), strides=(8,)))
    assert lines_of(plan)["backbone"] == "whole"
    _, plan = started(trained(replace(SMALL, backbone=tiny_resnet(1, 1), strides=(8,))), SMALL)
    assert lines_of(plan)["backbone"].startswith(
        "not taken; 15 weights are not there or of another shape, such as backbone."
    )
    assert lines_of(plan)["projections"] == "not taken; they read the features of another backbone"

    _, plan = started(frozen, replace(SMALL, backbone=tiny_resnet(1, 2, 1)))
    assert lines_of(plan)["backbone"] == "not taken; another architecture, depths is [1, 1, 1] there, [1, 2, 1] here"
    swin = BackboneConfig(
        "swin", options={"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "image_size": 64}
    )
    _, plan = started(frozen, replace(SMALL, backbone=swin))
    assert lines_of(plan)["backbone"] == "not taken; another architecture, 'resnet' there, 'swin' here"
    _, plan = started(frozen, replace(SMALL, pixel_mean=(0.5, 0.5, 0.5)))
    assert lines_of(plan)["backbone"].startswith(
        "whole; pixels are scaled otherwise, pixel_mean is (0.485, 0.456, 0.406) there"
    )


def test_layers_as_far_as_they_go() -> None:
    there = trained(replace(SMALL, encoder_layers=1, decoder_layers=3, box_refinement=True))
    here, plan = started(there, replace(SMALL, encoder_layers=2, decoder_layers=2, box_refinement=True))
    assert lines_of(plan)["encoder"] == "1 of 2 layers; encoder_layers is 1 there, 2 here: --model.encoder-layers 1"
    assert lines_of(plan)["decoder"] == "whole, 2 layers; the first 2 of 3 layers there"
    assert lines_of(plan)["box_heads"] == "whole"
    shorter = replace(SMALL, encoder_layers=1, decoder_layers=2, box_refinement=True)
    here, plan = started(there, shorter)
    assert float((outputs_of(here)["boxes"] - outputs_of(there)["boxes"][:2]).abs().max()) < 1e-14


def test_named_parts_must_fit_whole() -> None:
    there = trained(SMALL)
    here, plan = started(there, replace(SMALL, num_queries=9), "encoder", "decoder")
    assert [fit.part for fit in plan.parts] == ["encoder", "decoder"]
    assert torch.equal(here.encoder.layers[0].linear1.weight, there.encoder.layers[0].linear1.weight)
    assert not torch.equal(here.decoder.class_head.weight, there.decoder.class_head.weight)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared
        started(there, replace(SMALL, num_queries=9), "encoder", "queries")
    assert str(caught.value) == (
        "--init-parts asks for all of queries, but of there it does not fit whole: 6 of 9; num_queries is 6 there, 9 here: "
        "--model.num-queries 6; the others start afresh, and are attended to: not exact. Without --init-parts what fits is taken"
    )
    with pytest.raises(ValueError, match="names dense_head, which neither this model has nor there: leave it out"):
        started(there, SMALL, "dense_head")


def test_heads_are_not_taken_without_the_decoder() -> None:
    there = trained(replace(SMALL, dense_head=True))
    here, plan = started(there, replace(SMALL, dense_head=True, feedforward_dim=32))
    said = lines_of(plan)
    for part in ("queries", "prior", "class_head", "box_heads"):
        assert said[part] == "not taken; it is for the decoder, which starts afresh"
    assert said["dense_head"] == "not taken; it is for the encoder, which starts afresh"
    taken = {fit.part for fit in plan.parts if fit.writes}
    assert taken == {"backbone", "projections"}
    assert not torch.equal(here.decoder.class_head.weight, there.decoder.class_head.weight)


def test_nothing_of_importance() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared
        started(trained(SMALL), replace(SMALL, hidden_dim=32, backbone=tiny_resnet(2, 1, 1)))
    message = str(caught.value)
    assert message.startswith(
        "neither backbone nor encoder nor decoder of there fits this model:\nstart: there, a model"
    )
    assert "  encoder      not taken; hidden_dim is 16 there, 32 here: --model.hidden-dim 16\n" in message
    assert message.endswith("\nTake the options that it names, or leave --init out")
