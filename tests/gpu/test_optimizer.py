"""The schedule of the learning rate, the optimiser's groups of parameters, and the moving average."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from smca.gpu import train
from smca.gpu.config import BackboneConfig, ModelConfig, OptimConfig, RunConfig
from smca.gpu.files import load_checkpoint, save_checkpoint
from smca.gpu.model import SMCADETR
from smca.gpu.presets import PRESETS, tiny_resnet
from smca.gpu.training.optimizer import (
    clip_gradient,
    learning_rate_factor,
    make_optimizer,
    set_learning_rates,
    update_average,
)
from tiny_run import tiny


def model_of(**changes: Any) -> SMCADETR:
    small: dict[str, Any] = {
        "hidden_dim": 16,
        "num_heads": 2,
        "num_queries": 4,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "feedforward_dim": 16,
    }
    return SMCADETR(
        ModelConfig(**{"backbone": tiny_resnet(1, 1), "strides": (8,), "num_classes": 2, **small, **changes})
    )


# The schedule


def test_warm_up_rises_evenly_to_the_full_rate() -> None:
    optim = OptimConfig(warmup_steps=4, schedule="cosine")
    assert [learning_rate_factor(optim, step, 0, 1000) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_factor(optim, 4, 0, 1000) == 1.0, "the cosine begins where the warm-up ends"


def test_the_step_schedule_falls_to_a_tenth_once_so_many_epochs_are_done() -> None:
    optim = OptimConfig(schedule="step", drop_epoch=(3,))
    assert [learning_rate_factor(optim, 100 * epoch, epoch, 500) for epoch in range(5)] == [1, 1, 1, 0.1, 0.1]
    warm = OptimConfig(schedule="step", drop_epoch=(1,), warmup_steps=10)
    assert learning_rate_factor(warm, 4, 1, 500) == 0.5, "the warm-up goes on"


def test_the_step_schedule_drops_several_times_or_never() -> None:
    optim = OptimConfig(schedule="step", drop_epoch=(1, 3))
    assert [learning_rate_factor(optim, 0, epoch, 500) for epoch in range(5)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01]
    )
    constant = OptimConfig(schedule="step", drop_epoch=())
    assert {learning_rate_factor(constant, step, step, 500) for step in range(500)} == {1.0}
    parsed = train.parse(["smca_r50", "--optim.drop-epoch", "8", "11"]).optim
    assert (parsed.schedule, parsed.drop_epoch) == ("step", (8, 11))
    for wrong in ((0,), (3, 3), (4, 2)):
        with pytest.raises(
            ValueError, match=r"optim.drop_epoch must be rising numbers of epochs, each at least 1, got"
        ):
            OptimConfig(drop_epoch=wrong)


def test_one_drop_that_was_saved_as_a_number_is_the_same_drop(tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-3, schedule="step", drop_epoch=(1,))
    train.train(tiny(tmp_path, optim=optim, max_steps=1))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    state["settings"]["optim"]["drop_epoch"] = 1
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match=r"--optim.lr is 0.002, was 0.001") as caught:
        train.train(tiny(tmp_path, optim=replace(optim, lr=2e-3), max_steps=2, resume=True))
    assert "drop-epoch" not in str(caught.value)


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_cosine_falls_from_one_to_nearly_zero(warmup: int) -> None:
    optim = OptimConfig(schedule="cosine", warmup_steps=warmup)
    total = 110
    factors = [learning_rate_factor(optim, step, 0, total) for step in range(warmup, total)]
    assert factors[0] == 1.0
    assert factors[(total - warmup) // 2] == pytest.approx(0.5)
    assert 0 < factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * (1 - 1 / (total - warmup)))))
    assert all(a > b for a, b in itertools.pairwise(factors))


def test_wsd_is_constant_and_falls_along_a_line_over_the_last_fifth() -> None:
    optim = OptimConfig(schedule="wsd", warmup_steps=10)
    factors = [learning_rate_factor(optim, step, step // 30, 100) for step in range(100)]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([left / 20 for left in range(20, 0, -1)])
    assert learning_rate_factor(optim, 100, 3, 100) == 0.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_that_is_all_warm_up_divides_by_nothing(schedule: Literal["cosine", "wsd"]) -> None:
    optim = OptimConfig(schedule=schedule, warmup_steps=10)
    assert learning_rate_factor(optim, 9, 0, 5) == 1.0
    assert 0 <= learning_rate_factor(optim, 10, 0, 10) <= 1


def rates_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Train; the learning rates (the rest's, the backbone's) of every step."""
    rates: list[list[float]] = []
    original = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noting)
        train.train(config)
    return rates


def test_a_run_follows_the_cosine_to_its_last_step_and_max_steps_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = OptimConfig(lr=1e-3, backbone_lr=1e-4, warmup_steps=2, schedule="cosine")
    cosine = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3))]  # five steps of at most six
    rates = rates_of(tiny(tmp_path / "cut", optim=optim, max_steps=5), monkeypatch)
    assert rates == [pytest.approx([1e-3 * factor, 1e-4 * factor]) for factor in cosine]
    rates = rates_of(tiny(tmp_path / "whole", optim=optim, max_steps=50), monkeypatch)
    assert len(rates) == 6, "max_steps does not lengthen a run, nor its schedule"
    assert rates[-1] == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * 3 / 4)), 0.1 * rates[-1][0]])


def test_a_run_follows_wsd_to_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = OptimConfig(lr=1e-3, backbone_lr=1e-4, schedule="wsd")
    rates = rates_of(tiny(tmp_path, optim=optim, epochs=4, max_steps=10), monkeypatch)
    assert rates == [pytest.approx([1e-3 * factor, 1e-4 * factor]) for factor in [1.0] * 9 + [0.5]]


def test_a_run_drops_its_rates_after_so_many_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = OptimConfig(lr=1e-3, backbone_lr=0.0, schedule="step", drop_epoch=(1,))
    rates = rates_of(tiny(tmp_path, optim=optim), monkeypatch)
    assert rates == [pytest.approx([rate]) for rate in [1e-3] * 3 + [1e-4] * 3]


# Groups


def names_of(model: SMCADETR, group: dict[str, Any]) -> set[str]:
    inside = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def test_the_backbone_has_a_rate_of_its_own_and_every_trained_parameter_is_in_one_group() -> None:
    model = model_of()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3, backbone_lr=1e-5, weight_decay=0.1), torch.device("cpu"))
    rest, backbone = optimizer.param_groups
    assert (rest["lr"], backbone["lr"], rest["weight_decay"], backbone["weight_decay"]) == (1e-3, 1e-5, 0.1, 0.1)
    assert all(name.startswith("backbone.") for name in names_of(model, backbone))
    assert not any(name.startswith("backbone.") for name in names_of(model, rest))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names_of(model, rest) | names_of(model, backbone) == trained
    assert len(rest["params"]) + len(backbone["params"]) == len(trained)


def test_a_backbone_rate_of_zero_leaves_it_untrained() -> None:
    model = model_of()
    optimizer = make_optimizer(model, OptimConfig(backbone_lr=0.0), torch.device("cpu"))
    assert len(optimizer.param_groups) == 1
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


def test_frozen_stages_are_in_no_group() -> None:
    options = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    model = model_of(backbone=BackboneConfig(options=options, frozen_stages=1))
    optimizer = make_optimizer(model, OptimConfig(), torch.device("cpu"))
    assert not any("embedder" in name for group in optimizer.param_groups for name in names_of(model, group))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_norms_biases_and_embeddings_need_not_decay(optimizer: Literal["adamw", "muon"]) -> None:
    """Steps with gradients of zero: what is decayed shrinks, nothing else moves."""
    changes: dict[str, Any] = {"query_init": "anchors", "denoising_groups": 1, "strides": (4, 8)}
    moved = {}
    for decayed in ("all", "matrices"):
        model = model_of(**changes)
        optim = OptimConfig(optimizer, lr=0.1, backbone_lr=0.1, weight_decay=0.5, decayed=decayed)
        made = make_optimizer(model, optim, torch.device("cpu"))
        before = {}
        for name, parameter in model.named_parameters():
            nn.init.uniform_(parameter, 1.0, 2.0)
            before[name], parameter.grad = parameter.detach().clone(), torch.zeros_like(parameter)
        made.step()
        moved[decayed] = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        sizes = [len(group["params"]) for group in made.param_groups]
        assert sum(sizes) == len(before)
        assert len(sizes) == {"all": 2, "matrices": 4}[decayed] + 2 * (optimizer == "muon")
    assert moved["matrices"] < moved["all"]
    assert all(name.endswith(".weight") and "norm" not in name for name in moved["matrices"])
    kept = moved["all"] - moved["matrices"]
    assert {"level_embed", "decoder.query_anchor", "decoder.query_content", "decoder.label_embed"} < kept
    assert all("norm" in name or "bias" in name or "quer" in name or "embed" in name.split(".")[-1] for name in kept)
    heads = {"decoder.class_head.weight", "decoder.layers.0.prior.offset_head.weight"}
    assert heads < moved["matrices"]
    assert ("decoder.layers.0.linear1.weight" in moved["matrices"]) == (optimizer == "adamw"), (
        "Muon's have no decay at all"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_earlier_stages_learn_at_lower_rates(optimizer: Literal["adamw", "muon"]) -> None:
    model = model_of(strides=(4, 8), backbone=tiny_resnet(1, 1))
    optim = OptimConfig(optimizer, lr=1e-3, backbone_lr=1e-4, backbone_lr_decay=0.5)
    rate_of = {
        name: group["lr"]
        for group in make_optimizer(model, optim, torch.device("cpu")).param_groups
        for name in names_of(model, group)
    }
    for part, factor in {"embedder": 0.25, "encoder.stages.0": 0.5, "encoder.stages.1": 1.0}.items():
        rates = {rate for name, rate in rate_of.items() if name.startswith(f"backbone.body.{part}.")}
        with_muon = optimizer == "muon" and part != "embedder"  # which is the convolution that reads the image
        assert sorted(rates) == pytest.approx([1e-4 * factor, 2e-3 * factor][: 1 + with_muon]), part
    outside = {rate for name, rate in rate_of.items() if not name.startswith("backbone.")}
    assert sorted(outside) == [1e-3, 0.02][: 1 + (optimizer == "muon")]


def test_layerwise_rates_leave_frozen_stages_out_and_reach_every_layer_of_a_transformer() -> None:
    options = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
    model = model_of(backbone=BackboneConfig("dinov2", options, frozen_stages=1))
    optim = OptimConfig(backbone_lr=1.0, backbone_lr_decay=0.1)
    _, *groups = make_optimizer(model, optim, torch.device("cpu")).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1.0, 0.1, 0.01])
    for layer, group in zip((2, 1, 0), groups, strict=True):
        inside = {name for name in names_of(model, group) if "layernorm" not in name}
        assert all(f"encoder.layer.{layer}." in name for name in inside)
    with pytest.raises(ValueError, match=r"optim.backbone_lr_decay must be in \(0, 1\], got 1.5"):
        OptimConfig(backbone_lr_decay=1.5)


def test_rates_follow_the_factor() -> None:
    model = model_of()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3, backbone_lr=1e-5), torch.device("cpu"))
    set_learning_rates(optimizer, [1e-3, 1e-5], 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [2.5e-4, 2.5e-6]


# The average


def test_the_average_moves_by_its_decay_and_copies_counters() -> None:
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(10.0)  # type: ignore[union-attr]
        model.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    update_average(average, model, 0.9)
    assert average.weight.tolist() == pytest.approx([1.2, 1.2])
    assert average.running_mean.tolist() == pytest.approx([1.0, 1.0])  # type: ignore[union-attr]
    assert average.num_batches_tracked == 7


# Presets, as published


def test_the_single_scale_preset() -> None:
    run = PRESETS["smca_r50"]()
    model, optim = run.model, run.optim
    assert (model.strides, model.encoder_layers, model.decoder_layers) == ((32,), 6, 6)
    assert (model.hidden_dim, model.num_heads, model.num_queries) == (256, 8, 300)
    assert (model.feedforward_dim, model.dropout, model.encoder, model.cross_level_blocks) == (
        2048,
        0.1,
        "attention",
        (),
    )
    assert (run.epochs, run.batch_size, run.max_steps) == (50, 16, None)
    assert (optim.schedule, optim.drop_epoch, optim.warmup_steps, optim.ema_decay) == ("step", (40,), 0, 0.0)
    assert (optim.lr, optim.backbone_lr, optim.weight_decay, optim.clip_norm) == (1e-4, 1e-5, 1e-4, 0.1)
    assert (model.backbone.frozen_norm, model.backbone.frozen_stages) == (True, 2)


@pytest.mark.parametrize("name", ["smca_r50_multiscale", "smca_r50_multiscale_conv", "smca_r101_multiscale"])
def test_the_multi_scale_presets(name: str) -> None:
    """As the authors ran them: https://github.com/gaopengcuhk/SMCA-DETR, and the archive of their multi-scale models."""
    single, run, conv = PRESETS["smca_r50"](), PRESETS[name](), "conv" in name
    model = run.model
    assert (model.strides, model.encoder_layers) == (((8, 16, 32, 64), 6) if conv else ((16, 32, 64), 5))
    assert model.decoder_strides == ((16, 16, 32, 64) if conv else (16, 32, 64))
    assert (model.decoder_layers, model.feedforward_dim, run.batch_size) == (6, 1024, 8)
    assert model.cross_level_blocks == (() if conv else (2,))
    assert model.encoder == ("conv" if conv else "attention")
    assert model.backbone.options["depths"] == ([3, 4, 23, 3] if "101" in name else [3, 4, 6, 3])
    assert model.scale_selection
    # Squared distances in cells, over 8, times ½, 1, 2.
    beta = [
        2 * (sigma / stride) ** 2 for sigma, stride in zip(model.sigma_of_levels, model.decoder_strides, strict=True)
    ]
    assert beta == pytest.approx([16, 16, 8, 4] if conv else [16, 8, 4])
    varied = (
        "strides",
        "encoder_layers",
        "cross_level_blocks",
        "encoder",
        "backbone",
        "feedforward_dim",
        "halve_finest",
        "prior_sigma_px",
    )
    levels = {name: getattr(model, name) for name in varied}
    plain = replace(single, output=run.output, batch_size=8, model=replace(single.model, **levels))
    assert plain == run, "nothing else differs"


@pytest.mark.parametrize(
    ("name", "classes", "trained", "every"),
    [
        ("smca_r50_multiscale", 92, 39_529_908, 39_752_308),
        ("smca_r50_multiscale", 80, 39_526_824, 39_749_224),
        ("smca_r50_multiscale_conv", 92, 40_763_514, 40_985_914),  # in their log, n_parameters of what is trained
        ("smca_r50_multiscale_conv", 80, 40_760_430, 40_982_830),
    ],
)
def test_parameters_of_the_multi_scale_presets(name: str, classes: int, trained: int, every: int) -> None:
    """The authors' models have 92 class outputs, and stem and first stage, which are not trained, have 222,400 parameters."""
    config = PRESETS[name]().model
    with torch.device("meta"):
        model = SMCADETR(replace(config, num_classes=classes), download=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in model.parameters()) == every == trained + 222_400


@pytest.mark.parametrize("value", [1e-3, 5.0, 3e38, math.inf])
def test_gradients_are_clipped_as_torch_does(value: float) -> None:
    mine, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    for layer in (mine, theirs):
        for parameter in layer.parameters():
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
        layer.weight.grad[1, 2] = value  # type: ignore[index]
    assert torch.equal(clip_gradient(mine.parameters(), 0.1), nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_a_norm_that_is_nan_leaves_the_other_gradients_as_they_are() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.ones(2, 3)
    layer.bias.grad = torch.tensor([1.0, math.nan])
    assert clip_gradient(layer.parameters(), 0.1).isnan()
    assert layer.weight.grad.isfinite().all()
    assert layer.bias.grad.isfinite().tolist() == [True, False]
