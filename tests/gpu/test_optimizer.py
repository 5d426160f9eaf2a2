"""The schedule of the learning rate, the optimiser's groups of parameters, and the moving average."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from smca.gpu.config import BackboneConfig, ModelConfig, OptimConfig
from smca.gpu.model import SMCADETR
from smca.gpu.presets import PRESETS, tiny_resnet
from smca.gpu.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rates, update_average


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
    optim = OptimConfig(schedule="step", drop_epoch=3)
    assert [learning_rate_factor(optim, 100 * epoch, epoch, 500) for epoch in range(5)] == [1, 1, 1, 0.1, 0.1]
    warm = OptimConfig(schedule="step", drop_epoch=1, warmup_steps=10)
    assert learning_rate_factor(warm, 4, 1, 500) == 0.5, "the warm-up goes on"


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_cosine_falls_from_one_to_nearly_zero(warmup: int) -> None:
    optim = OptimConfig(schedule="cosine", warmup_steps=warmup)
    total = 110
    factors = [learning_rate_factor(optim, step, 0, total) for step in range(warmup, total)]
    assert factors[0] == 1.0
    assert factors[(total - warmup) // 2] == pytest.approx(0.5)
    assert 0 < factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * (1 - 1 / (total - warmup)))))
    assert all(a > b for a, b in itertools.pairwise(factors))


def test_a_run_that_is_all_warm_up_divides_by_nothing() -> None:
    optim = OptimConfig(schedule="cosine", warmup_steps=10)
    assert learning_rate_factor(optim, 9, 0, 5) == 1.0
    assert 0 <= learning_rate_factor(optim, 10, 0, 10) <= 1


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


# Presets of several levels


@pytest.mark.parametrize("name", ["smca_r50_multiscale", "smca_r50_multiscale_conv", "smca_r101_multiscale"])
def test_the_multi_scale_presets(name: str) -> None:
    single, run = PRESETS["smca_r50"](), PRESETS[name]()
    model = run.model
    assert (model.strides, model.encoder_layers, model.decoder_layers) == ((16, 32, 64), 5, 6)
    assert model.cross_level_blocks == (() if "conv" in name else (2,))
    assert model.encoder == ("conv" if "conv" in name else "attention")
    assert model.backbone.options["depths"] == ([3, 4, 23, 3] if "101" in name else [3, 4, 6, 3])
    assert model.scale_selection
    assert (run.optim, run.loss, run.augmentation) == (single.optim, single.loss, single.augmentation)
    assert (model.hidden_dim, model.num_heads, model.num_queries) == (256, 8, 300)
    assert (model.feedforward_dim, model.dropout) == (single.model.feedforward_dim, single.model.dropout)
